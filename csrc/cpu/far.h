// Results that go to memory past the caches.
#pragma once
#include <cstdint>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include "kernels.h"

namespace mpq {

// Ordinary stores read a line from memory before they write to it, and drive others out of the caches. Past these,
// layers that write much take half the time, and a fourth less together with who reads their results, if these are of
// so many bytes: fewer would have stayed in a cache. With as many products for each result as kFarProducts, memory has
// time enough and the caches are of more use to the products. Measured, both.
constexpr int64_t kFarBytes = 4 * 1024 * 1024, kFarBytesOfMany = 256 * 1024;
constexpr int64_t kFarProducts = 512;

// Whether `floats` results from y on go there: only whole lines can, so pixels (or rows), `step` apart, have to begin
// with one.
inline bool goes_far(const float* y, int64_t step, int64_t floats, int64_t products) {
  constexpr int64_t kLineFloats = kLine / int64_t(sizeof(float));
  return floats * int64_t(sizeof(float)) >= (products < kFarProducts ? kFarBytes : kFarBytesOfMany) &&
         step % kLineFloats == 0 && reinterpret_cast<uintptr_t>(y) % kLine == 0;
}

// Behind it other threads find what this one has written so.
inline void land_far() {
#ifdef __SSE__
  _mm_sfence();
#endif
}

}  // namespace mpq
