// Branch and bound over linear relaxations. What keeps a relaxation from being met is the units with large steps of
// use; once a few of them are decided the gap is small, and combining the options within it ends the branch (see
// halves.h).
//
// Exactness: a branch is left only when whole numbers show that nothing in it fits, or when its Lagrangian bound
// exceeds the best known cost by more than rounding can explain (see Priced), whatever the relaxation's accuracy.
#include "knapsack.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <new>
#include <numeric>
#include <stdexcept>

#include "dual.h"
#include "halves.h"

namespace mpq::host {
namespace {

constexpr int64_t kStates = 1 << 14;   // partial choices that one attempt to combine options may take; one is worth it
constexpr double kExpected = 1 << 10;  // before any branching, and wherever no more than these are expected
constexpr int kRoundings = 64;         // of one relaxation
constexpr int kBins = 32;              // see `expected`
constexpr double kPerState = 64;       // work of a partial choice that led nowhere
constexpr double kPerStep = 16;        // work of a partial choice or a pair of them
constexpr int64_t kMostHeld = 2'000'000;  // options of the branches that are open at a time: about 100 MB

struct Spent {};

class Tree {
 public:
  Tree(const Knapsack& problem, const std::vector<int>& known, bool any)
      : any_(any), best_(0), step_(0), choice_(known), twin_(problem.U) {
    const int U = problem.U, B = problem.B;
    part_.K = problem.K;
    part_.rest.assign(problem.rest, problem.rest + problem.K);
    part_.choice.assign(U, -1);
    part_.first.push_back(0);
    std::map<std::vector<int64_t>, int> seen;
    for (int u = 0; u < U; ++u) {
      std::vector<int64_t> own;
      int64_t most = 0;
      for (int b = 0; b < B; ++b) {
        const int i = u * B + b;
        if (problem.allowed[i] == 0) continue;
        part_.option.push_back(b);
        part_.at.push_back(u);
        part_.cost.push_back(problem.cost[i]);
        own.insert(own.end(), {b, problem.cost[i]});
        for (int k = 0; k < part_.K; ++k) {
          part_.use.push_back(problem.use[(static_cast<size_t>(k) * U + u) * B + b]);
          own.push_back(part_.use.back());
        }
        most = std::max(most, problem.cost[i]);
        step_ = std::gcd(step_, problem.cost[i] - part_.cost[part_.first[u]]);
      }
      part_.unit.push_back(u);
      part_.first.push_back(part_.options());
      twin_[u] = seen.emplace(own, u).first->second;
      best_ += known.empty() ? most : problem.cost[u * B + known[u]];
    }
    if (step_ == 0) step_ = kFar / 2;  // all choices cost the same
    count_in_divisors(part_);
    scale_.cost = 1.0 / static_cast<double>(std::max<int64_t>(best_, 1));
    for (int64_t rest : part_.rest) scale_.rest.push_back(1.0 / static_cast<double>(std::max<int64_t>(rest, 1)));
  }

  // First with all that costs as much as the best, in search of the first of equals. Where these are too many, once
  // more with only what costs less, which may be far fewer when costs are multiples of a step.
  KnapsackResult run(double work) {
    KnapsackResult out;
    for (strict_ = false;; strict_ = true) {
      work_ = strict_ ? 0.75 * work : 0.25 * work;
      held_ = 0;
      try {
        Part part = part_;
        std::vector<uint8_t> dead(part.options(), 0);
        if (part.tighten(dead)) {
          part.drop(dead);
          Basis basis = slack_basis(part);
          dead.assign(part.options(), 0);
          visit(std::move(part), std::move(dead), std::move(basis), true);
        }
        out.done = true;
        out.first = !strict_;
      } catch (const Spent&) {
      }
      if (out.done || strict_) break;
    }
    out.choice = choice_;
    return out;
  }

 private:
  // Each budget in units of the common divisor of its uses; what is left over of the rest nobody can spend.
  static void count_in_divisors(Part& part) {
    for (int k = 0; k < part.K; ++k) {
      int64_t unit = 0;
      for (int i = 0; i < part.options(); ++i) unit = std::gcd(unit, part.use[static_cast<size_t>(i) * part.K + k]);
      if (unit <= 1 || part.rest[k] < 0) continue;
      for (int i = 0; i < part.options(); ++i) part.use[static_cast<size_t>(i) * part.K + k] /= unit;
      part.rest[k] /= unit;
    }
  }

  // Only choices that cost at most this are of interest.
  int64_t aim() const { return strict_ && !choice_.empty() ? best_ - step_ : best_; }

  void visit(Part part, std::vector<uint8_t> dead, Basis basis, bool root) {
    if (stop_ || !part.tighten(dead)) return;
    const Relaxed relaxed = relaxation(part, dead, basis);
    Priced priced(part, dead, relaxed.price, aim());
    if (priced.gap(aim()) < 0) return;
    round(part, basis);
    const double gap = priced.gap(aim());
    if (stop_ || gap < 0) return;
    for (int i = 0; i < part.options(); ++i) dead[i] = priced.rc[i] > gap;
    follow(basis, part.drop(dead), part);
    dead.assign(part.options(), 0);
    priced = Priced(part, dead, relaxed.price, aim());
    if (root || expected(part, priced) <= kExpected) {
      const auto found = search_halves(part, priced, relaxed.price, aim(), any_, {kStates, 64 * kStates});
      pay(found ? kPerStep * static_cast<double>(found->work) : kPerState * static_cast<double>(kStates));
      if (found && !found->choice.empty()) offer(found->cost, found->choice);
      if (found) return;
    }
    held_ += part.options();
    if (held_ > kMostHeld) throw Spent{};
    for (Child& child : branch(part, basis)) {
      only(part, child.option, dead);
      visit(part, dead, std::move(child.basis), false);
    }
    held_ -= part.options();
  }

  Relaxed relaxation(const Part& part, const std::vector<uint8_t>& dead, Basis& basis) {
    const double pass = static_cast<double>(part.options()) * (part.K + 1);
    const Relaxed relaxed = relax(part, dead, scale_, static_cast<double>(best_), work_ / pass, basis);
    pay((relaxed.pivots + 3.0) * pass);
    return relaxed;
  }

  void pay(double work) {
    work_ -= work;
    if (work_ < 0) throw Spent{};
  }

  struct Child {
    int option;
    double gap;
    Basis basis;
  };

  // The options of one unit, the most promising first: of the units that the relaxation splits, the one whose options
  // leave the smallest gaps.
  std::vector<Child> branch(const Part& part, const Basis& basis) {
    std::vector<int> units;
    for (int i : basis.rows)
      if (i >= 0 && std::find(units.begin(), units.end(), part.at[i]) == units.end()) units.push_back(part.at[i]);
    if (units.empty()) units.push_back(0);
    std::vector<Child> best;
    std::vector<uint8_t> dead;
    double least = std::numeric_limits<double>::infinity();
    for (int u : units) {
      std::vector<Child> children;
      double sum = 0;
      for (int i = part.first[u]; i < part.first[u + 1]; ++i) {
        if (!only(part, i, dead)) continue;
        Basis own = basis;
        const Relaxed relaxed = relaxation(part, dead, own);
        const double gap = Priced(part, dead, relaxed.price, aim()).gap(aim());
        if (gap < 0) continue;
        children.push_back({i, gap, std::move(own)});
        sum += gap * gap;
      }
      if (sum < least) {
        least = sum;
        best = std::move(children);
      }
      if (best.empty()) break;
    }
    std::stable_sort(best.begin(), best.end(), [](const Child& a, const Child& b) { return a.gap > b.gap; });
    return best;
  }

  // All options but one of a unit are dead, and of its twins, units alike in everything, those that only swap choices
  // with it: of equals the earlier units get the earlier choices. False: some twin has none left.
  bool only(const Part& part, int option, std::vector<uint8_t>& dead) const {
    const int u = part.at[option];
    dead.assign(part.options(), 0);
    for (int i = part.first[u]; i < part.first[u + 1]; ++i) dead[i] = i != option;
    for (int v = 0; v < part.units(); ++v) {
      if (v == u || twin_[part.unit[v]] != twin_[part.unit[u]]) continue;
      bool any = false;
      for (int i = part.first[v]; i < part.first[v + 1]; ++i) {
        dead[i] = v > u ? part.option[i] < part.option[option] : part.option[i] > part.option[option];
        any |= dead[i] == 0;
      }
      if (!any) return false;
    }
    return true;
  }

  // Each split unit at each of the options that it is split between.
  void round(const Part& part, const Basis& basis) {
    std::vector<std::vector<int>> split;
    for (int i : basis.rows) {
      if (i < 0) continue;
      const auto same = [&](const std::vector<int>& options) { return part.at[options[0]] == part.at[i]; };
      const auto at = std::find_if(split.begin(), split.end(), same);
      if (at == split.end())
        split.push_back({basis.key[part.at[i]], i});
      else
        at->push_back(i);
    }
    std::vector<int> pick = basis.key;
    for (int trial = 0; trial < kRoundings; ++trial) {
      int rest = trial;
      for (const auto& options : split) {
        pick[part.at[options[0]]] = options[rest % options.size()];
        rest /= static_cast<int>(options.size());
      }
      if (rest > 0) break;
      take(part, pick);
    }
  }

  void take(const Part& part, const std::vector<int>& pick) {
    int64_t cost = part.paid;
    for (int i : pick) cost += part.cost[i];
    if (cost > aim()) return;
    for (int k = 0; k < part.K; ++k) {
      int64_t left = part.rest[k];
      for (int i : pick) left -= part.use[static_cast<size_t>(i) * part.K + k];
      if (left < 0) return;
    }
    std::vector<int> choice = part.choice;
    for (int u = 0; u < part.units(); ++u) choice[part.unit[u]] = part.option[pick[u]];
    offer(cost, choice);
  }

  void offer(int64_t cost, const std::vector<int>& choice) {
    if (cost > best_ || (cost == best_ && !choice_.empty() && choice_ <= choice)) return;
    best_ = cost;
    choice_ = choice;
    stop_ = any_;
  }

  // The basis after options went. Without rounding, and unless the relaxation had no answer, none of it is lost.
  static void follow(Basis& basis, const std::vector<int>& went, const Part& part) {
    std::vector<int> keys;
    for (int key : basis.key)
      if (went[key] >= 0) keys.push_back(went[key]);
    bool whole = static_cast<int>(keys.size()) == part.units();
    for (int& row : basis.rows) {
      whole &= row < 0 || went[row] >= 0;
      if (row >= 0) row = went[row];
    }
    basis.key = std::move(keys);
    if (!whole) basis = slack_basis(part);
  }

  // About how many partial choices of half of the units are within the gap: all choices, counted by reduced costs
  // rounded down to parts of the gap, to the power that is left of exp(sqrt(units)) for half of the units.
  double expected(const Part& part, const Priced& priced) const {
    const double gap = std::max(priced.gap(aim()), 1.0);
    std::vector<double> count(kBins + 1, 0.0), next;
    count[0] = 1;
    for (int u = 0; u < part.units(); ++u) {
      next = count;
      for (int i = part.first[u]; i < part.first[u + 1]; ++i) {
        if (i == priced.best[u] || priced.rc[i] > gap) continue;
        const int bin = static_cast<int>(priced.rc[i] / gap * kBins);
        for (int b = bin; b <= kBins; ++b) next[b] += count[b - bin];
      }
      count.swap(next);
    }
    return std::pow(std::accumulate(count.begin(), count.end(), 0.0), std::sqrt(0.5));
  }

  const bool any_;
  int64_t best_;  // cost of the best known choice, or more than any
  int64_t step_;  // any two costs differ by a multiple of it
  std::vector<int> choice_;
  std::vector<int> twin_;  // [U]: the first unit that is alike
  Part part_;
  Scale scale_;
  bool strict_ = false, stop_ = false;
  double work_ = 0;
  int64_t held_ = 0;
};

}  // namespace

KnapsackResult cheapest(const Knapsack& problem, const std::vector<int>& known, bool any, double work) {
  try {
    return Tree(problem, known, any).run(work);
  } catch (const std::bad_alloc&) {
    return {known};
  } catch (const std::length_error&) {
    return {known};
  }
}

}  // namespace mpq::host
