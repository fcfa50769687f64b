// conv2d as an implicit GEMM by fp32 multiply-adds, for fp32 activations.
#include "patches.cuh"
#include "tile.cuh"

namespace {

using namespace mpq;

static_assert(kDeep == kDepth && kGatherers == tile_threads(kSquare), "tile.cuh multiplies what patches.cuh brings");

struct Shared {
  float patches[kSquare][kTileRow], weights[kSquare][kTileRow];
  Pixel pixels[kSquare];
};

struct Rows {
  float (*to)[kTileRow];

  __device__ void one(int row, int d, float v) const { to[row][d] = v; }
  __device__ void eight(int row, int d, const float (&v)[8]) const {
    *reinterpret_cast<float4*>(&to[row][d]) = make_float4(v[0], v[1], v[2], v[3]);
    *reinterpret_cast<float4*>(&to[row][d + 4]) = make_float4(v[4], v[5], v[6], v[7]);
  }
};

// last: channels lie side by side, in x and y, and so do the columns of a tile; else pixels do.
template <bool last>
__global__ void __launch_bounds__(kGatherers, 2) tiles(const ConvTask a, int64_t across, int64_t down) {
  constexpr int kSide = kSquare / kEach;
  __shared__ __align__(16) Shared s;
  const Grid grid(a.weight);
  for (int64_t task = blockIdx.x; task < across * down * a.groups; task += gridDim.x) {
    const Part part(a, task, across, down);
    const float* x = static_cast<const float*>(a.x) + part.x;
    __syncthreads();  // the tile before is done
    if (threadIdx.x < kSquare) s.pixels[threadIdx.x] = pixel_at(a, part.m0 + threadIdx.x);
    float sum[kEach][kEach] = {};
    for (int64_t k = 0; k < a.weight.k; k += kDeep) {
      __syncthreads();  // the chunk before has been used, the pixels are there
      gather<float, last>(a, x, s.pixels, part.pixels, k, Rows{s.patches});
      dequantize(a.weight, grid, part.n0, part.channels, k, Rows{s.weights});
      __syncthreads();
      multiply<kSquare>(last ? s.patches : s.weights, last ? s.weights : s.patches, sum);
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i)
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int r = threadIdx.x / kSide + i * kSide, c = threadIdx.x % kSide + j * kSide;
        part.store<float>(a, s.pixels, last ? r : c, last ? c : r, sum[i][j]);
      }
  }
}

}  // namespace

int mpq_conv_tiles(const ConvTask& a, void* stream) {
  if (Type(a.type) != Type::f32) return cudaErrorInvalidValue;
  return start_tiles(a.x_stride[1] == 1 ? tiles<true> : tiles<false>, a, stream);
}
