// The exact end of the search, where few combinations of options are left within the gap.
#pragma once

#include <optional>

#include "part.h"

namespace mpq::host {

struct HalvesLimits {
  int64_t states;  // partial choices of one half of the units
  int64_t pairs;   // pairs of them looked at
};

struct HalvesResult {
  std::vector<int> choice;  // of all the caller's units; empty: there is none
  int64_t cost = 0;
  int64_t work = 0;  // partial choices and pairs of them
};

// The cheapest choice that fits and costs at most `top`, of equals the first in order of units and choices; or, with
// `any`, the first met. None: beyond the limits.
std::optional<HalvesResult> search_halves(const Part& part, const Priced& priced, const std::vector<double>& price,
                                          int64_t top, bool any, const HalvesLimits& limits);

}  // namespace mpq::host
