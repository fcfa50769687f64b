#include "far.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace mpq {
namespace {

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

bool goes_far(const float* y, int64_t step, int64_t floats, int64_t least) {
  constexpr int64_t kFloat = sizeof(float);
  return kernels().far && floats * kFloat >= least && step * kFloat % kLine == 0 &&
         reinterpret_cast<uintptr_t>(y) % kLine == 0 && present(y + floats - 1);
}

}  // namespace mpq
