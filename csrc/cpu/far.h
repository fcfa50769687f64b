// Results that go to memory past the caches.
#pragma once
#include <cstdint>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

namespace mpq {

// Results of fewer bytes stay in a cache until someone reads them. Of more they do not, and ordinary stores read each
// line before they write to it: past the caches, layers that write much take half the time, and a fourth less together
// with who reads their results. Measured with 1 MiB of a level 2 cache and 32 of a level 3.
constexpr int64_t kFarBytes = 4 * 1024 * 1024;

// Whether `floats` results from y on, `least` bytes or more, go there: only whole lines can (Kernels::far), so pixels
// (or rows), `step` apart, have to begin with one.
bool goes_far(const float* y, int64_t step, int64_t floats, int64_t least = kFarBytes);

// Behind it other threads find what this one has written so.
inline void fence_far() {
#ifdef __SSE__
  _mm_sfence();
#endif
}

}  // namespace mpq
