// Iterated local search: a good incumbent early is what lets the tree prune.
#include <algorithm>
#include <cmath>

#include "quadratic.h"

namespace mpq::host {
namespace {

struct Random {  // xorshift: the same numbers everywhere
  uint64_t state;
  uint64_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
  }
  int below(int n) { return static_cast<int>(next() % n); }
  double unit() { return (next() >> 11) * 0x1p-53; }
};

class Search {
 public:
  Search(const Problem& problem, uint64_t seed)
      : p_(problem), at_(problem), random_{seed * 2654435761ULL + 88172645463325252ULL}, options_(problem.L) {
    for (int i = 0; i < p_.n(); ++i)
      if (p_.allowed[i]) options_[i / p_.B].push_back(i % p_.B);
    moved_.resize(p_.n());
  }

  double run(std::vector<int>& choice, int64_t kicks, Watch& watch) {
    at_.set(choice);
    if (!repair()) return kInf;
    descend();
    std::vector<int> best = at_.choice(), current = best;
    double best_value = at_.value(), current_value = best_value;
    for (int64_t kick = 0; kick < kicks; ++kick) {
      if (kick % 8 == 0 && watch.stopped(best_value, -kInf, 0)) break;
      at_.set(current);
      for (int change = 2 + random_.below(4); change > 0; --change) {
        const int l = random_.below(p_.L);
        at_.move(l, options_[l][random_.below(static_cast<int>(options_[l].size()))]);
      }
      if (!repair()) continue;
      descend();
      const double worse = random_.unit() < 0.2 ? 1e-4 * std::fabs(best_value) : 0;
      if (at_.value() < current_value + worse) {
        current_value = at_.value();
        current = at_.choice();
      }
      if (at_.value() < best_value - 1e-13 * std::fabs(best_value)) {
        best_value = at_.value();
        best = at_.choice();
      }
      if (kick % 64 == 63) {  // no wandering off for good
        current = best;
        current_value = best_value;
      }
    }
    choice = best;
    at_.set(best);  // without the drift of thousands of moves
    return at_.value();
  }

 private:
  // Cheapest moves per unit of violation removed, until every budget holds. With several budgets it can fail where a
  // feasible choice exists.
  bool repair() {
    for (int guard = p_.n() + 5; guard > 0 && !at_.feasible(); --guard) {
      double least = kInf;
      int layer = -1, choice = 0;
      for (int l = 0; l < p_.L; ++l)
        for (int c : options_[l]) {
          if (c == at_.choice()[l]) continue;
          double relief = 0;
          for (int k = 0; k < p_.K; ++k) {
            const double over = at_.used()[k] - p_.cap[k];
            if (over <= 0) continue;
            const double* use = p_.use + static_cast<int64_t>(k) * p_.n() + l * p_.B;
            relief += std::min(use[at_.choice()[l]] - use[c], over) / p_.cap[k];
          }
          const double price = at_.change(l, c) / relief;
          if (relief > 0 && price < least) {
            least = price;
            layer = l;
            choice = c;
          }
        }
      if (layer < 0) return false;
      at_.move(layer, choice);
    }
    return at_.feasible();
  }

  // Steepest descent over changes of one layer; of two where no single change helps.
  void descend() {
    const double least_gain = 1e-12 * (std::fabs(at_.value()) + 1e-300);
    while (single(least_gain) || pair(least_gain)) {
    }
  }

  bool single(double least_gain) {
    double best = -least_gain;
    int layer = -1, choice = 0;
    for (int l = 0; l < p_.L; ++l)
      for (int c : options_[l])
        if (at_.change(l, c) < best && at_.fits(l, c)) {
          best = at_.change(l, c);
          layer = l;
          choice = c;
        }
    if (layer >= 0) at_.move(layer, choice);
    return layer >= 0;
  }

  bool pair(double least_gain) {
    const int B = p_.B, n = p_.n();
    double best = -least_gain;
    int first = -1, first_choice = 0, second = -1, second_choice = 0;
    for (int l = 0; l < p_.L; ++l)  // change of every single move, so that pairs need one more look-up each
      for (int c = 0; c < B; ++c) moved_[l * B + c] = at_.change(l, c);
    for (int l = 0; l < p_.L; ++l)
      for (int c : options_[l]) {
        if (c == at_.choice()[l]) continue;
        const double* come = p_.pairwise + static_cast<int64_t>(l * B + c) * n;
        const double* gone = p_.pairwise + static_cast<int64_t>(l * B + at_.choice()[l]) * n;
        for (int m = l + 1; m < p_.L; ++m) {
          const int now = m * B + at_.choice()[m];
          const double base = moved_[l * B + c] - (come[now] - gone[now]);
          for (int i = m * B; i < (m + 1) * B; ++i)
            if (base + moved_[i] + (come[i] - gone[i]) < best && i != now && pair_fits(l * B + c, i)) {
              best = base + moved_[i] + (come[i] - gone[i]);
              first = l;
              first_choice = c;
              second = m;
              second_choice = i % B;
            }
        }
      }
    if (first < 0) return false;
    at_.move(first, first_choice);
    at_.move(second, second_choice);
    return true;
  }

  bool pair_fits(int i, int j) const {
    const int l = i / p_.B, m = j / p_.B;
    for (int k = 0; k < p_.K; ++k) {
      const double* use = p_.use + static_cast<int64_t>(k) * p_.n();
      const double change = use[i] - use[l * p_.B + at_.choice()[l]] + use[j] - use[m * p_.B + at_.choice()[m]];
      if (at_.used()[k] + change > p_.cap[k]) return false;
    }
    return true;
  }

  const Problem& p_;
  Assignment at_;
  Random random_;
  std::vector<std::vector<int>> options_;
  std::vector<double> moved_;
};

}  // namespace

double local_search(const Problem& problem, std::vector<int>& choice, int64_t kicks, uint64_t seed, Watch& watch) {
  if (problem.L == 0) return 0;
  return Search(problem, seed).run(choice, kicks, watch);
}

}  // namespace mpq::host
