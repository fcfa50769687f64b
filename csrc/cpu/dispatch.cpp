// Chooses the instruction set, once, from what the processor and the environment say.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace mpq {
namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avxvnni() {
#ifdef MPQ_SIMDE
  return true;  // emulated
#else
  return __builtin_cpu_supports("avxvnni");
#endif
}

bool has_avx512() {
#ifdef MPQ_SIMDE
  return true;  // emulated
#else
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
#endif
}
#endif

const Kernels* const* available() {  // best first, ends with null
  static const Kernels* list[5] = {};
  static const bool filled = [] {
    int i = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();  // asks the operating system too: registers it does not save are not used
    if (has_avx2() && has_avx512()) list[i++] = &avx512_kernels;
    if (has_avx2() && has_avxvnni()) list[i++] = &avxvnni_kernels;
    if (has_avx2()) list[i++] = &avx2_kernels;
#endif
    list[i] = &scalar_kernels;
    return true;
  }();
  (void)filled;
  return list;
}

const Kernels* find(const char* name) {
  const Kernels* const* list = available();
  if (!name || !*name) return list[0];
  for (int i = 0; list[i]; ++i)
    if (!std::strcmp(list[i]->name, name)) return list[i];
  return nullptr;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> table = [] {
    const Kernels* k = find(std::getenv("MPQKERN_ISA"));
    return k ? k : available()[0];
  }();
  return table;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

bool multiplies_bf16() {
#ifdef MPQ_SIMDE
  return true;  // emulated
#elif defined(__x86_64__)
  static const bool has = (__builtin_cpu_init(), __builtin_cpu_supports("avx512bf16"));
  return has;
#else
  return false;
#endif
}

bool use_isa(const char* name) {
  const Kernels* k = find(name);
  if (k) chosen().store(k, std::memory_order_relaxed);
  return k != nullptr;
}

}  // namespace mpq
