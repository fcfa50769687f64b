#include "far.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace mpq {
namespace {

// Fewer bytes stay in a cache until someone reads them. More do not, and ordinary stores read each line before they
// write to it: past the caches, layers that write much take half the time, and a fourth less together with who reads
// their results. With as many products for each result as kFarProducts, memory has time enough and the caches are of
// more use to the products. Measured, both, with 1 MiB of a level 2 cache and 32 of a level 3.
constexpr int64_t kFarBytes = 4 * 1024 * 1024, kFarBytesOfMany = 256 * 1024;
constexpr int64_t kFarProducts = 512;

// Whether memory is there already. The system brings a page that is not into the caches, by filling it with zeros: then
// a detour around these takes an eighth more. An allocator may ask for fresh pages each time, as glibc from 32 MiB on.
bool present(const void* p) {
#ifdef __linux__
  static const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  unsigned char in_core = 1;
  mincore(reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(p) / page * page), 1, &in_core);
  return in_core & 1;
#else
  return p != nullptr;
#endif
}

}  // namespace

bool goes_far(const float* y, int64_t step, int64_t floats, int64_t products) {
  constexpr int64_t kFloat = sizeof(float);
#ifndef __SSE__
  return false;
#endif
  return floats * kFloat >= (products < kFarProducts ? kFarBytes : kFarBytesOfMany) && step * kFloat % kLine == 0 &&
         reinterpret_cast<uintptr_t>(y) % kLine == 0 && present(y + floats - 1);
}

}  // namespace mpq
