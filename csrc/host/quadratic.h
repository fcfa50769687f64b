// The cross-layer problem: every layer picks one of its choices, choices of different layers interact, budgets hold.
//
//   minimise    f(x) = sum_l unary[l, x_l] + sum_{l<m} pairwise[l, x_l, m, x_m]
//   subject to  sum_l use[k, l, x_l] <= cap[k]  for every k,   x_l allowed
//
// Letters used throughout csrc/host: L layers, B choices of a layer, K budgets, n = L * B pairs (layer, choice).
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

namespace mpq::host {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr int kMostChoices = 64;

// Pair (l, b) is at l * B + b in everything the caller owns. Costs are expected to be scaled to a largest magnitude
// of 1, uses to be nonnegative; sums of use must be exact (integers) or cap must hold the tolerance already.
struct Problem {
  int L, B, K;
  const double* unary;     // [n]
  const double* pairwise;  // [n][n], symmetric, zero within a layer
  const double* use;       // [K][n]
  const double* cap;       // [K], positive
  const uint8_t* allowed;  // [n], at least one of every layer
  int n() const { return L * B; }
};

// A choice for every layer, with what a change of one layer would cost kept up to date: a move is O(n).
class Assignment {
 public:
  explicit Assignment(const Problem& problem);
  void set(const std::vector<int>& choice);
  void move(int layer, int choice);

  double value() const { return value_; }
  const std::vector<int>& choice() const { return choice_; }
  // f after moving `layer` to `choice`, less f now; infinite where that is not allowed.
  double change(int layer, int choice) const {
    const double* at = marginal_.data() + layer * p_.B;
    return at[choice] - at[choice_[layer]];
  }
  const double* marginal() const { return marginal_.data(); }
  const std::vector<double>& used() const { return used_; }
  bool feasible() const;
  bool fits(int layer, int choice) const;

 private:
  const Problem& p_;
  std::vector<int> choice_;
  std::vector<double> marginal_;  // [n] unary plus the pairs with the present choice of every other layer
  std::vector<double> used_;      // [K]
  double value_ = 0;
};

// Looks at the clock, and at once and then every 50 ms lets the caller look at the search. Search results never depend
// on it unless it stops the search.
class Watch {
 public:
  using Report = std::function<bool(double incumbent, double bound, double seconds, int64_t nodes)>;  // false: stop

  Watch(double seconds, Report report);
  bool stopped(double incumbent, double bound, int64_t nodes);
  double seconds() const;

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point start_, next_;
  double limit_;
  Report report_;
  bool stopped_ = false;
};

// Local search from `choice` (over budget or not): `kicks` times, shake a few layers and descend over all changes of
// one or two layers. Leaves the best feasible choice met; returns its value, infinite when there was none.
double local_search(const Problem& problem, std::vector<int>& choice, int64_t kicks, uint64_t seed, Watch& watch);

}  // namespace mpq::host
