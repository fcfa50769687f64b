// The end of a block of `many` or `warpgroup`: its fp32 sums become results, or its split's part of them.
#pragma once
#include <cuda_runtime.h>

#include "convert.cuh"
#include "linear.h"

namespace mpq {

constexpr int kOutLd = int(kRowsOfMany) + 8;  // 16-bit results of a token, in shared memory

// each(put) calls put(row, token, sum), counted from the block's first, for all sums of this thread. All threads of the
// block take part; nobody may need `shared`, columns * kOutLd * 2 bytes, any more.
template <int threads, int columns, class Each>
__device__ __forceinline__ void store_results(const LinearTask& a, char* shared, int64_t row0, int64_t token0,
                                              const Each& each) {
  const int64_t n = a.weight.n;
  auto* out = reinterpret_cast<uint16_t*>(shared);
  each([&](int in_row, int column, float v) {
    const int64_t row = row0 + in_row, token = token0 + column;
    const bool there = row < n && token < a.m;
    if (a.splits > 1) {
      if (there) a.partial[(blockIdx.z * a.m + token) * n + row] = v;
      return;
    }
    if (a.bias && there) v += a.bias[row];
    if (Type(a.type) == Type::f16)
      out[column * kOutLd + in_row] = uint16_t(bits_of(to_type<__half>(v)));
    else if (Type(a.type) == Type::bf16)
      out[column * kOutLd + in_row] = uint16_t(bits_of(to_type<__nv_bfloat16>(v)));
    else if (there)
      static_cast<float*>(a.y)[token * n + row] = v;
  });
  if (a.splits > 1 || Type(a.type) == Type::f32) return;
  __syncthreads();
  constexpr int kRows = int(kRowsOfMany);
  for (int i = threadIdx.x; i < columns * kRows; i += threads) {
    const int64_t row = row0 + i % kRows, token = token0 + i / kRows;
    if (row < n && token < a.m) static_cast<uint16_t*>(a.y)[token * n + row] = out[i / kRows * kOutLd + i % kRows];
  }
}

}  // namespace mpq
