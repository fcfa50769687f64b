// What `many` needs to know of activations before it multiplies: their sums over units of k, aligned rows, and for
// 8-bit products the rounded values and their scales. A warp takes one stretch of a row: a unit, or a group. And what
// `warpgroup` needs: the activations in the order of its products, and sums over its stretches.
#include <cuda_runtime.h>

#include "convert.cuh"
#include "launch.h"
#include "start.cuh"

namespace {

using namespace mpq;

constexpr int kThreads = 256, kWarps = kThreads / 32;

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int by = 16; by > 0; by /= 2) v += __shfl_xor_sync(0xffffffff, v, by);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int by = 16; by > 0; by /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffff, v, by));
  return v;
}

// body(row, stretch) for all rows < rows and stretches < count, one warp each
template <class Body>
__device__ void each_warp(int64_t rows, int64_t count, const Body& body) {
  const int64_t step = int64_t(gridDim.x) * kWarps;
  for (int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; i < rows * count; i += step)
    body(i / count, i % count);
}

template <class T>
__global__ void row_sums(const T* x, int64_t m, int64_t k, int unit, int64_t units, float* sums, int64_t ld, T* copy,
                         int64_t copy_ld) {
  const int lane = threadIdx.x % 32;
  each_warp(ld, units, [&](int64_t row, int64_t u) {
    float sum = 0;
    if (row < m)
      for (int64_t i = u * unit + lane; i < (u + 1) * unit; i += 32) {
        const T v = i < k ? x[row * k + i] : T(0.0f);
        sum += to_float(v);
        if (copy && i < copy_ld) copy[row * copy_ld + i] = v;
      }
    sum = warp_sum(sum);
    if (lane == 0) sums[u * ld + row] = sum;
  });
}

template <class T>
__global__ void round_rows(const T* x, const Packed w, int64_t m, const float* fixed, bool each, int unit,
                           int64_t units, int8_t* q, float* sums, int64_t ld) {
  const int lane = threadIdx.x % 32;
  const int64_t q_ld = ceil_div(w.kp, 128) * 128;
  float* scales = sums + units * ld;
  each_warp(ld, w.groups, [&](int64_t row, int64_t group) {
    const int64_t begin = group * w.group, end = group == w.groups - 1 ? units * unit : begin + w.group;
    const auto value = [&](int64_t i) { return row < m && i < w.k ? to_float(x[row * w.k + i]) : 0.0f; };
    float most = 0, strange = 0;
    for (int64_t i = begin + lane; i < end; i += 32) {
      const float v = value(i);
      most = fmaxf(most, fabsf(v));
      strange = fmaf(v, 0, strange);  // NaN once there is an infinity or NaN
    }
    const float known = fixed ? fixed[each ? group : 0] : __fdiv_rn(warp_max(most), 127.0f);
    const float scale = known + warp_sum(strange);  // infinities and NaN reach every result
    for (int64_t u = begin / unit; u * unit < end; ++u) {
      float sum = 0;  // whole numbers, exact
      for (int64_t i = u * unit + lane; i < (u + 1) * unit; i += 32) {
        const float v = scale > 0 ? rintf(fminf(fmaxf(__fdiv_rn(value(i), scale), -127.0f), 127.0f)) : 0.0f;
        sum += v;
        if (row < m && i < q_ld) q[row * q_ld + i / 32 * 32 + byte_place(int(i % 32))] = int8_t(v);
      }
      sum = warp_sum(sum);
      if (lane == 0) {
        sums[u * ld + row] = sum;
        scales[u * ld + row] = row < m ? scale : 0;
      }
    }
  });
}

// out [ld / columns][pieces][columns][8] = x, zeros where there is none; sums [units][ld]. `warps` take 8 tokens of a
// unit, the last of which goes on to the end of all pieces: in each turn a warp reads 64 bytes of every token, four
// pieces, and writes whole lines of 128.
template <class T, int warps>
__global__ void arrange(const T* x, int64_t m, int64_t k, int64_t unit, int64_t units, int64_t pieces, int columns,
                        float* sums, int64_t ld, T* out) {
  __shared__ float parts[kWarps][8];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, token = lane % 8;
  const bool aligned = k % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  constexpr int kAtOnce = kWarps / warps;
  const int64_t count = ld / 8 * units;
  for (int64_t first = int64_t(blockIdx.x) * kAtOnce; first < count; first += int64_t(gridDim.x) * kAtOnce) {
    const int64_t i = first + warp / warps, u = i % units, row = i / units * 8 + token;
    const int64_t end = i >= count ? 0 : u == units - 1 ? pieces : (u + 1) * unit / 8;
    float sum = 0;
    for (int64_t piece = u * unit / 8 + warp % warps * 4 + lane / 8; piece < end; piece += 4 * warps) {
      alignas(16) T eight[8] = {};
      const T* from = x + row * k + piece * 8;
      if (row < m && aligned && piece * 8 < k)
        *reinterpret_cast<uint4*>(eight) = *reinterpret_cast<const uint4*>(from);
      else if (row < m)
#pragma unroll
        for (int j = 0; j < 8; ++j)
          if (piece * 8 + j < k) eight[j] = from[j];
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += to_float(eight[j]);
      *reinterpret_cast<uint4*>(out + ((row / columns * pieces + piece) * columns + row % columns) * 8) =
          *reinterpret_cast<const uint4*>(eight);
    }
#pragma unroll
    for (int by = 8; by < 32; by *= 2) sum += __shfl_xor_sync(0xffffffff, sum, by);
    if (warps > 1) {
      if (lane < 8) parts[warp][token] = sum;
      __syncthreads();
      sum = 0;
      for (int w = 0; w < warps; ++w) sum += parts[warp / warps * warps + w][token];
      __syncthreads();
    }
    if (i < count && warp % warps == 0 && lane < 8) sums[u * ld + row] = sum;
  }
}

// Splits of k added up in their order.
template <class T>
__global__ void join(const float* partial, int splits, int64_t n, int64_t count, const float* bias, T* y) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    float sum = partial[i];
    for (int s = 1; s < splits; ++s) sum += partial[s * count + i];
    y[i] = to_type<T>(sum + (bias ? bias[i % n] : 0));
  }
}

}  // namespace

int mpq_row_sums(const void* x, int type, int64_t m, int64_t k, int unit, float* sums, int64_t ld, void* copy,
                 int64_t copy_ld, void* stream) {
  const int64_t units = sum_units(padded(k), unit);
  return with_type(type, [&](auto t) {
    using T = decltype(t);
    return start(row_sums<T>, ceil_div(ld * units, kWarps), kThreads, stream, static_cast<const T*>(x), m, k, unit,
                 units, sums, ld, static_cast<T*>(copy), copy_ld);
  });
}

int mpq_arrange(const void* x, int type, int64_t m, int64_t k, int64_t unit, int64_t units, int64_t pieces, int columns,
                float* sums, int64_t ld, void* out, void* stream) {
  if (ld % columns != 0 || columns % 8 != 0) return cudaErrorInvalidValue;
  const auto with = [&](auto t) {
    using T = decltype(t);
    const bool long_units = unit >= 1024;  // so that there are threads enough where one unit is all of a row
    return start(long_units ? arrange<T, kWarps> : arrange<T, 1>, ceil_div(ld / 8 * units, long_units ? 1 : kWarps),
                 kThreads, stream, static_cast<const T*>(x), m, k, unit, units, pieces, columns, sums, ld,
                 static_cast<T*>(out));
  };
  if (Type(type) == Type::f16) return with(__half());
  if (Type(type) == Type::bf16) return with(__nv_bfloat16());
  return cudaErrorInvalidValue;
}

int mpq_round_rows(const void* x, int type, const Packed& w, int64_t m, const float* fixed, bool each, int unit,
                   int8_t* q, float* sums, int64_t ld, void* stream) {
  return with_type(type, [&](auto t) {
    using T = decltype(t);
    return start(round_rows<T>, ceil_div(ld * w.groups, kWarps), kThreads, stream, static_cast<const T*>(x), w, m,
                 fixed, each, unit, sum_units(w.kp, unit), q, sums, ld);
  });
}

int mpq_join(const LinearTask& a, void* stream) {
  return with_type(a.type, [&](auto t) {
    using T = decltype(t);
    const int64_t count = a.m * a.weight.n;
    return start(join<T>, ceil_div(count, kThreads), kThreads, stream, a.partial, a.splits, a.weight.n, count, a.bias,
                 static_cast<T*>(a.y));
  });
}
