// 8-bit activations of convolutions: what the rounded values of each sample stand for, one scale a sample.
#include "conv.h"
#include "convert.cuh"
#include "start.cuh"

namespace {

using namespace mpq;

constexpr int kThreads = 256, kPerBlock = 16 * kThreads;  // values

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

template <class T>
__global__ void __launch_bounds__(kThreads)
    round_by(const T* x, int64_t batch, int64_t count, const float* fixed, const uint32_t* most, float* out) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < batch * count;
       i += int64_t(gridDim.x) * kThreads) {
    const float top = __uint_as_float(most[i / count]);
    const bool finite = top < __int_as_float(0x7f800000);
    const float scale = !finite ? top : fixed ? *fixed : __fdiv_rn(top, 127);
    const float q = scale > 0 ? rintf(fminf(fmaxf(__fdiv_rn(to_float(x[i]), scale), -127.0f), 127.0f)) : 0;
    out[i] = __fmul_rn(q, scale);
  }
}

}  // namespace

int mpq_round_images(const void* x, int type, int64_t batch, int64_t count, const float* fixed, uint32_t* most,
                     float* out, void* stream) {
  return with_type(type, [&](auto t) {
    using T = decltype(t);
    const int64_t blocks = ceil_div(count, kPerBlock);
    const int error =
        start(largest<T>, batch * blocks, kThreads, stream, static_cast<const T*>(x), batch, count, blocks, most);
    if (error) return error;
    return start(round_by<T>, ceil_div(batch * count, kThreads), kThreads, stream, static_cast<const T*>(x), batch,
                 count, fixed, static_cast<const uint32_t*>(most), out);
  });
}
