// From a lane's words of fragments.h to registers of mma.sync, with masks and shifts. A fragment's values are
//
//   (code + offset) * unit,   both constants of the row's half p (rows g and g + 8 of a strip)
//
// which `Decode` leaves to the fp32 side: sums of products are corrected once a group, not once a weight.
//
//   fp16   the code's bits are an fp16 as they stand, subnormal: code * 2^-24, exactly
//   bf16   2 and 4 bits are set into the mantissa of 128; 8 bits are a subnormal, scaled into the normal range
//   int8   the code's byte
#pragma once
#include "fragments.h"
#include "ptx.cuh"

namespace mpq {

struct Int8 {};  // activations rounded to 8 bits

template <int bits, class T>
struct Decode;

// Fields of a lane's words, at bit 8f + low of each 16-bit half.
template <int bits>
__device__ __forceinline__ uint32_t word_of(const uint32_t (&w)[4], int block, int h, int p) {
  return w[bits == 2 ? block : bits == 4 ? 2 * block + h : 2 * h + p];
}

template <int bits>
struct Decode<bits, __half> {
  MPQ_HD static constexpr float unit(int p) { return 0x1p-24f * (p == 0 || bits == 8 ? 1 : bits == 2 ? 4 : 16); }
  MPQ_HD static constexpr float offset(int) { return 0; }

  __device__ static __forceinline__ void get(const uint32_t (&w)[4], int block, int f, uint32_t (&a)[4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const uint32_t word = word_of<bits>(w, block, h, p) >> (8 * f + (bits == 2 ? 4 * h : 0));
        const uint32_t mask = bits == 8 ? 0x00ff00ff : bits == 4 ? 0x000f000fu << 4 * p : 0x00030003u << 2 * p;
        a[2 * h + p] = word & mask;
      }
  }
};

template <int bits>
struct Decode<bits, __nv_bfloat16> {
  MPQ_HD static constexpr float unit(int p) { return bits == 8 ? 0x1p-7f : bits == 2 && p == 1 ? 4 : 1; }
  MPQ_HD static constexpr float offset(int p) { return bits == 8 ? 0 : 128 / unit(p); }

  __device__ static __forceinline__ void get(const uint32_t (&w)[4], int block, int f, uint32_t (&a)[4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const uint32_t word = word_of<bits>(w, block, h, p) >> 8 * f;
        if (bits == 8)
          a[2 * h + p] = ptx::scale_bf16x2(word & 0x00ff00ff, 0x7e807e80);  // code * 2^-133 * 2^126
        else if (bits == 4)  // each nibble shifted down: 7 bits of mantissa hold no code * 16
          a[2 * h + p] = (word >> 4 * p & 0x000f000f) | 0x43004300;
        else
          a[2 * h + p] = (word >> 4 * h & 0x00030003u << 2 * p) | 0x43004300;
      }
  }
};

template <int bits>
struct Decode<bits, Int8> {
  MPQ_HD static constexpr float unit(int p) { return bits == 2 && p == 1 ? 4 : 1; }
  MPQ_HD static constexpr float offset(int) { return 0; }

  __device__ static __forceinline__ void get(const uint32_t (&w)[4], int block, uint32_t (&a)[4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const uint32_t word = word_of<bits>(w, block, h, p);
        a[2 * h + p] = bits == 8 ? word : bits == 4 ? word >> 4 * p & 0x0f0f0f0f : word >> 4 * h & 0x03030303u << 2 * p;
      }
  }
};

// Scales and zeros of the rows g and g + 8 of a strip.
struct Grid {
  const void *scales, *zeros;  // zeros may be null
  bool half, zero_each;
  int groups;
  int64_t n;
  float mid;

  __device__ explicit Grid(const Packed& w)
      : scales(w.scales),
        zeros(w.zeros),
        half(w.half),
        zero_each(w.zero_each),
        groups(int(w.groups)),
        n(w.n),
        mid(mid_zero(w.bits)) {}

  __device__ float number(const void* from, int64_t at) const {
    return half ? __half2float(static_cast<const __half*>(from)[at]) : static_cast<const float*>(from)[at];
  }
  // 0 for rows past the weight's, which are computed and thrown away
  __device__ float scale(int64_t row, int group) const { return row < n ? number(scales, row * groups + group) : 0; }
  __device__ float zero(int64_t row, int group) const {
    if (!zeros) return mid;
    return number(zeros, zero_each ? (row < n ? row * groups + group : 0) : 0);
  }
};

}  // namespace mpq
