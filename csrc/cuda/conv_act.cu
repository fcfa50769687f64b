// 8-bit activations of convolutions: the rounded values of each sample, and its scale.
#include "conv.h"
#include "convert.cuh"
#include "start.cuh"

namespace {

using namespace mpq;

constexpr int kThreads = 256, kPerBlock = 16 * kThreads;  // values
constexpr int kTile = 64;                                 // pixels and channels that are turned at once

// most[sample] = the bits of max|x|, NaN where an x is not finite. As integers, bits of numbers that are not negative
// are in the order of the numbers, NaN above all.
template <class T>
__global__ void __launch_bounds__(kThreads)
    largest(const T* x, int64_t batch, int64_t count, int64_t blocks, uint32_t* most) {
  for (int64_t task = blockIdx.x; task < batch * blocks; task += gridDim.x) {
    const int64_t sample = task / blocks, begin = (task - sample * blocks) * kPerBlock;
    uint32_t high = 0;
    for (int64_t i = begin + threadIdx.x; i < begin + kPerBlock && i < count; i += kThreads) {
      const float v = to_float(x[sample * count + i]);
      const uint32_t bits = fabsf(v) < __int_as_float(0x7f800000) ? __float_as_uint(fabsf(v)) : 0x7fc00000u;
      high = bits > high ? bits : high;
    }
#pragma unroll
    for (int by = 16; by > 0; by /= 2) {
      const uint32_t other = __shfl_xor_sync(0xffffffff, high, by);
      high = other > high ? other : high;
    }
    if (threadIdx.x % 32 == 0) atomicMax(most + sample, high);
  }
}

__device__ float scale_of(uint32_t most, const float* fixed) {
  const float top = __uint_as_float(most);
  return !(top < __int_as_float(0x7f800000)) ? top : fixed ? *fixed : __fdiv_rn(top, 127);
}

__device__ int8_t rounded(float v, float scale) {
  return scale > 0 ? int8_t(rintf(fminf(fmaxf(__fdiv_rn(v, scale), -127.0f), 127.0f))) : int8_t(0);
}

template <class T>
__global__ void __launch_bounds__(kThreads) in_order(const T* x, int64_t batch, int64_t count, const float* fixed,
                                                     const uint32_t* most, int8_t* q, float* scales) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < batch * count;
       i += int64_t(gridDim.x) * kThreads) {
    const int64_t sample = i / count;
    const float scale = scale_of(most[sample], fixed);
    q[i] = rounded(to_float(x[i]), scale);
    if (i == sample * count) scales[sample] = scale;
  }
}

// x [channels][pixels] of each sample -> q [pixels][channels], through a tile in shared memory, so that lanes run along
// what lies side by side in both. Rows of 68 bytes: a column of them is in different banks.
template <class T>
__global__ void __launch_bounds__(kThreads) turned(const T* x, int64_t batch, int64_t channels, int64_t pixels,
                                                   const float* fixed, const uint32_t* most, int8_t* q, float* scales) {
  __shared__ int8_t tile[kTile][kTile + 4];
  const int64_t across = ceil_div(pixels, kTile), tiles = across * ceil_div(channels, kTile);
  for (int64_t task = blockIdx.x; task < batch * tiles; task += gridDim.x) {
    const int64_t sample = task / tiles, in = task - sample * tiles;
    const int64_t c0 = in / across * kTile, p0 = in % across * kTile, first = sample * channels * pixels;
    const int rows = int(channels - c0 < kTile ? channels - c0 : kTile);
    const int columns = int(pixels - p0 < kTile ? pixels - p0 : kTile);
    const float scale = scale_of(most[sample], fixed);
    __syncthreads();  // the tile before has been read
    const int p = threadIdx.x % kTile;
    for (int c = threadIdx.x / kTile; c < rows && p < columns; c += kThreads / kTile)
      tile[c][p] = rounded(to_float(x[first + (c0 + c) * pixels + p0 + p]), scale);
    __syncthreads();
    for (int i = threadIdx.x; i < rows * columns; i += kThreads)
      q[first + (p0 + i / rows) * channels + c0 + i % rows] = tile[i % rows][i / rows];
    if (in == 0 && threadIdx.x == 0) scales[sample] = scale;
  }
}

}  // namespace

int mpq_round_images(const void* x, int type, int64_t batch, int64_t channels, int64_t pixels, bool turn,
                     const float* fixed, uint32_t* most, int8_t* q, float* scales, void* stream) {
  return with_type(type, [&](auto t) {
    using T = decltype(t);
    const T* from = static_cast<const T*>(x);
    const uint32_t* tops = most;
    const int64_t count = channels * pixels, blocks = ceil_div(count, kPerBlock);
    const int error = start(largest<T>, batch * blocks, kThreads, stream, from, batch, count, blocks, most);
    if (error) return error;
    if (!turn)
      return start(in_order<T>, ceil_div(batch * count, kThreads), kThreads, stream, from, batch, count, fixed, tops, q,
                   scales);
    return start(turned<T>, batch * ceil_div(pixels, kTile) * ceil_div(channels, kTile), kThreads, stream, from, batch,
                 channels, pixels, fixed, tops, q, scales);
  });
}
