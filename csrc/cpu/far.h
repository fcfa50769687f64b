// Results that go to memory past the caches.
#pragma once
#include <cstdint>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

namespace mpq {

// Whether `floats` results from y on do, each of so many products: only whole lines can, so pixels (or rows), `step`
// apart, have to begin with one.
bool goes_far(const float* y, int64_t step, int64_t floats, int64_t products);

// Behind it other threads find what this one has written so.
inline void fence_far() {
#ifdef __SSE__
  _mm_sfence();
#endif
}

}  // namespace mpq
