// Threads for the drivers: torch's own pool (so that torch.set_num_threads holds), bound in ops.cpp.
#pragma once
#include <cstdint>

#include "far.h"

namespace mpq {

void run_parallel(int64_t count, int64_t grain, void (*body)(void* context, int64_t begin, int64_t end), void* context);
int64_t thread_count();

// body(begin, end) over 0..count, at least `grain` a thread; grain >= count stays on this thread.
template <class F>
void parallel_for(int64_t count, int64_t grain, const F& body) {
  const auto part = [](void* f, int64_t begin, int64_t end) {
    (*static_cast<const F*>(f))(begin, end);
    fence_far();
  };
  F* const context = const_cast<F*>(&body);
  if (count > grain && thread_count() > 1)
    run_parallel(count, grain, part, context);
  else if (count > 0)
    part(context, 0, count);
}

}  // namespace mpq
