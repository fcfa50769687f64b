// Products of fp32 tiles in shared memory: chunks of 32 along the depth, a row to 36 floats, so that the rows that 8
// threads read, 16 bytes each, are in different banks. A thread has kEach x kEach entries of a tile: rows
// ty + i * kSide and columns tx + j * kSide of threads in a square of kSide.
#pragma once
#include <cuda_runtime.h>

#include "../packed.h"

namespace mpq {

constexpr int kEach = 4, kDepth = 32, kTileRow = kDepth + 4;
MPQ_HD constexpr int tile_threads(int side) { return side / kEach * (side / kEach); }

// sum[i][j] += a[row i] . b[column j]
template <int kTile>
__device__ __forceinline__ void multiply(const float (*a)[kTileRow], const float (*b)[kTileRow],
                                         float (&sum)[kEach][kEach]) {
  constexpr int kSide = kTile / kEach;
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
#pragma unroll 1
  for (int k = 0; k < kDepth; k += 4) {
    float4 left[kEach], right[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      left[i] = *reinterpret_cast<const float4*>(&a[ty + i * kSide][k]);
      right[i] = *reinterpret_cast<const float4*>(&b[tx + i * kSide][k]);
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i)
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        float t = fmaf(left[i].x, right[j].x, sum[i][j]);
        t = fmaf(left[i].y, right[j].y, t);
        t = fmaf(left[i].z, right[j].z, t);
        sum[i][j] = fmaf(left[i].w, right[j].w, t);
      }
  }
}

}  // namespace mpq
