// One choice a unit at least cost under several budgets: what is left of the problem once some choices are ruled out.
//
//   minimise    paid + sum_u cost[x_u]
//   subject to  sum_u use[x_u][k] <= rest[k]  for every k
#pragma once

#include <cstdint>
#include <vector>

namespace mpq::host {

constexpr int64_t kFar = int64_t{1} << 61;  // more than any sum of costs or of uses

// Units that are still open, each with two options or more: those of the i-th at first[i] .. first[i + 1] of the arrays
// that follow. `choice` holds what has been decided; its cost is in `paid`, its use no longer in `rest`.
struct Part {
  int K;
  std::vector<int> unit, first;
  std::vector<int> option, at;     // the caller's choice, and which of the open units it is of
  std::vector<int64_t> cost, use;  // use: [options][K]
  std::vector<int64_t> rest;       // [K]
  int64_t paid = 0;
  std::vector<int> choice;  // of all the caller's units

  int units() const { return static_cast<int>(unit.size()); }
  int options() const { return static_cast<int>(option.size()); }

  // Also rules out what leaves too little of some budget for the other units. False: nothing fits.
  bool tighten(std::vector<uint8_t>& dead) const;
  // Drops dead options and closes units with a single one; every unit must have one. Returns where options went, -1
  // for those that are not options any more.
  std::vector<int> drop(const std::vector<uint8_t>& dead);
};

// What Lagrangian prices p >= 0 say: an option's reduced cost rc >= 0 is what it costs beyond its unit's best option
// when the budgets are bought at these prices, and for every x that fits
//     cost(x) = bound + sum_u rc(x_u) + sum_k p_k * slack_k(x),    all terms >= 0.
// So whatever costs at most c has sum rc + p * slack <= gap(c) = c - bound.
struct Priced {
  Priced(const Part& part, const std::vector<uint8_t>& dead, const std::vector<double>& price, int64_t top);

  // A bound on sum rc + p * slack of what costs `cost` (at most `top`) whatever rounding does to either side; below 0
  // there is no such choice.
  double gap(int64_t cost) const { return static_cast<double>(cost - base) + bought + slop; }

  std::vector<double> rc;     // [options], infinite for dead ones
  std::vector<int> best;      // [units]: the option of reduced cost 0
  int64_t base;               // paid and the cost of all best options
  std::vector<int64_t> room;  // [K]: what they leave of the rest; may be negative
  double bought;              // p * room
  double slop;                // more than rounding makes of any sum rc + p * slack
};

}  // namespace mpq::host
