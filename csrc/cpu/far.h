// Results that go to memory past the caches.
#pragma once
#include <cstdint>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include "kernels.h"

namespace mpq {

// So many bytes have left a level 2 cache before someone comes back for them. What is written to a line by ordinary
// stores is read from memory first, and brings others from the caches: past them, layers that write much take half the
// time, and whoever reads the results loses less.
constexpr int64_t kFarBytes = 1024 * 1024;

// Whether results from y on go there: only whole lines can, so pixels (or rows) have to begin with one.
inline bool goes_far(const float* y, int64_t step, int64_t floats) {
  constexpr int64_t kLineFloats = kLine / int64_t(sizeof(float));
  return floats * int64_t(sizeof(float)) >= kFarBytes && step % kLineFloats == 0 &&
         reinterpret_cast<uintptr_t>(y) % kLine == 0;
}

// Behind it other threads find what this one has written so.
inline void land_far() {
#ifdef __SSE__
  _mm_sfence();
#endif
}

}  // namespace mpq
