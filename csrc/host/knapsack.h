// One choice a unit at least cost under several budgets, in whole numbers: proven, or given up for another solver.
//
//   minimise    sum_u cost[u, x_u]
//   subject to  sum_u use[k, u, x_u] <= rest[k]  for every k,   x_u allowed
//
// Letters: U units, B choices of a unit, K budgets.
#pragma once

#include <cstdint>
#include <vector>

namespace mpq::host {

// Costs and uses are >= 0, and their sums stay below 2**61.
struct Knapsack {
  int U, B, K;
  const int64_t* cost;     // [U][B]
  const int64_t* use;      // [K][U][B]
  const int64_t* rest;     // [K]
  const uint8_t* allowed;  // [U][B], at least one of every unit
};

struct KnapsackResult {
  std::vector<int> choice;  // [U]: the best that is known; empty when there is none
  bool done = false;        // no choice that fits costs less than it or, when there is none, none fits
  bool first = false;       // of those that cost as much it is the first in order of units and choices
};

// The cheapest choice that fits; with `any`, whichever is met first. `known` fits, or is empty. `work` bounds the
// numbers touched, counted, so that answers do not depend on the machine's speed: 1e9 take about a second.
KnapsackResult cheapest(const Knapsack& problem, const std::vector<int>& known, bool any, double work);

}  // namespace mpq::host
