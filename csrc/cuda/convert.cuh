// 16-bit activations: between them and fp32, and into registers.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace mpq {

__device__ __forceinline__ uint32_t bits_of(__half v) { return __half_as_ushort(v); }
__device__ __forceinline__ uint32_t bits_of(__nv_bfloat16 v) { return __bfloat16_as_ushort(v); }

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T to_type(float v);
template <>
__device__ __forceinline__ float to_type(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half to_type(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 to_type(float v) {
  return __float2bfloat16_rn(v);
}

// The halves of a register as floats.
template <class T>
__device__ __forceinline__ float low(uint32_t v);
template <class T>
__device__ __forceinline__ float high(uint32_t v);
template <>
__device__ __forceinline__ float low<__half>(uint32_t v) {
  return __half2float(__ushort_as_half(uint16_t(v)));
}
template <>
__device__ __forceinline__ float high<__half>(uint32_t v) {
  return __half2float(__ushort_as_half(uint16_t(v >> 16)));
}
template <>
__device__ __forceinline__ float low<__nv_bfloat16>(uint32_t v) {
  return __uint_as_float(v << 16);
}
template <>
__device__ __forceinline__ float high<__nv_bfloat16>(uint32_t v) {
  return __uint_as_float(v & 0xffff0000);
}

// 8 values of a row from k on; 0 from `end` on. wide: rows start on 16 bytes.
template <class T>
__device__ __forceinline__ void load8(const T* row, int64_t k, int64_t end, bool wide, uint32_t (&v)[4]) {
  if (wide && k + 8 <= end) {
    const uint4 all = *reinterpret_cast<const uint4*>(row + k);
    v[0] = all.x, v[1] = all.y, v[2] = all.z, v[3] = all.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t at = k + 2 * i;
    v[i] = (at < end ? bits_of(row[at]) : 0) | (at + 1 < end ? bits_of(row[at + 1]) << 16 : 0);
  }
}

}  // namespace mpq
