// Deepening over the gap, and two halves that meet in the middle.
//
// All x that cost at most bound + gap have sum rc <= gap and p * slack <= gap (see Priced). Few partial choices of half
// of the units have so small a sum; two of them that leave so little slack are found by looking it up. The gap grows
// until an x is found: nothing cheaper can be beyond it, so the first gap with an x proves the best x within.
//
// Exactness: cost, use and slack are compared as int64. Doubles (rc, and the gap) only leave things out, and only
// beyond what rounding can do to them.
#include "halves.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace mpq::host {
namespace {

constexpr int kFirst = 16;       // alternatives within the first gap
constexpr double kGrowth = 3.0;  // of the number of partial choices from one gap to the next, about

struct TooMany {};

using Trails = std::array<int, 2>;  // one of either half; -1: no alternative

// Partial choices: all units of one half, each at its best choice but for those along a trail of alternatives. Costs
// and uses count from the best choices.
struct Half {
  std::vector<double> rc;
  std::vector<int64_t> cost, use;  // use: [states][K]
  std::vector<int> trail;

  size_t size() const { return rc.size(); }
  void clear() {
    rc.clear();
    cost.clear();
    use.clear();
    trail.clear();
  }
  void push(double r, int64_t c, const int64_t* from, const int64_t* more, int K, int node) {
    rc.push_back(r);
    cost.push_back(c);
    for (int k = 0; k < K; ++k) use.push_back(from[k] + more[k]);
    trail.push_back(node);
  }
  void copy(size_t to, size_t from, int K) {
    rc[to] = rc[from];
    cost[to] = cost[from];
    std::copy_n(&use[from * K], K, &use[to * K]);
    trail[to] = trail[from];
  }
  void cut(size_t size, int K) {
    rc.resize(size);
    cost.resize(size);
    use.resize(size * K);
    trail.resize(size);
  }
};

class Search {
 public:
  Search(const Part& part, const Priced& priced, const std::vector<double>& price, int64_t top, bool any,
         const HalvesLimits& limits)
      : part_(part), priced_(priced), price_(price), top_(top), any_(any), limits_(limits), K_(part.K) {
    for (int best : priced.best) best_of_.push_back(part.option[best]);
    x_ = y_ = best_of_;
  }

  HalvesResult run() {
    if (priced_.gap(top_) < 0) return {};
    double gap = std::min(first_gap(), priced_.gap(top_));
    for (;;) {
      // Of what costs at most `best_` this round sees everything.
      const bool last = gap >= priced_.gap(top_);
      const double within = std::floor(gap - priced_.slop - priced_.bought);
      best_ = last ? top_ : std::min(top_, priced_.base + static_cast<int64_t>(std::max(within, -1.0 * kFar)));
      gap_ = priced_.gap(best_);
      round();
      work_ += nodes_.size() + pairs_;
      if (found_ || last) return result();
      // The number n of partial choices grows like exp(sqrt(gap)), up to a factor in the exponent that n tells.
      const double n = static_cast<double>(std::max(halves_[0].size(), halves_[1].size()));
      const double step = 1 + std::log(kGrowth) / std::log(std::max(n, 8.0));
      gap = std::max(gap * step * step, gap + 1);
    }
  }

 private:
  double first_gap() const {
    std::vector<double> rcs;
    for (int i = 0; i < part_.options(); ++i)
      if (priced_.best[part_.at[i]] != i) rcs.push_back(priced_.rc[i]);
    const size_t at = std::min<size_t>(kFirst, rcs.size());
    if (at == 0) return priced_.slop;
    std::nth_element(rcs.begin(), rcs.begin() + (at - 1), rcs.end());
    return rcs[at - 1] + priced_.slop;
  }

  void round() {
    // Units with the least alternatives come last: the lists grow late, and by little work. Neighbours in this order go
    // to different halves, which so grow alike.
    std::vector<std::pair<double, int>> open;
    for (int u = 0; u < part_.units(); ++u) {
      double least = std::numeric_limits<double>::infinity();
      for (int i = part_.first[u]; i < part_.first[u + 1]; ++i)
        if (i != priced_.best[u]) least = std::min(least, priced_.rc[i]);
      if (least <= gap_) open.push_back({-least, u});
    }
    std::sort(open.begin(), open.end());
    nodes_.clear();
    pairs_ = 0;
    const std::vector<int64_t> none(K_, 0);
    for (int side = 0; side < 2; ++side) {
      Half& half = halves_[side];
      half.clear();
      half.push(0, 0, none.data(), none.data(), K_, -1);
      size_t merged = 512;
      const size_t before = nodes_.size();
      for (size_t i = side; i < open.size(); i += 2) {
        extend(half, open[i].second, before);
        if (half.size() >= 2 * merged) {
          merge(half);
          merged = std::max(merged, half.size());
        }
      }
    }
    // One of two reduced costs that add up to the gap is at most half of it: only such are looked up.
    match(halves_[0], halves_[1], 0);
    match(halves_[1], halves_[0], 0.5 * gap_);
  }

  // Every partial choice also with each of a unit's alternatives.
  void extend(Half& half, int unit, size_t before) {
    const size_t size = half.size();
    const int best = priced_.best[unit];
    std::vector<int64_t> from(K_), more(K_);
    for (int other = part_.first[unit]; other < part_.first[unit + 1]; ++other) {
      const double own = priced_.rc[other];
      if (other == best || own > gap_) continue;
      const int64_t cost = part_.cost[other] - part_.cost[best];
      for (int k = 0; k < K_; ++k) more[k] = part_.use[other * K_ + k] - part_.use[best * K_ + k];
      for (size_t i = 0; i < size; ++i) {
        const double rc = half.rc[i] + own;
        if (rc > gap_) continue;
        if (static_cast<int64_t>(nodes_.size() - before) >= limits_.states) throw TooMany{};
        nodes_.push_back({half.trail[i], other});
        std::copy_n(&half.use[i * K_], K_, from.data());  // the vector below may move
        half.push(rc, half.cost[i] + cost, from.data(), more.data(), K_, static_cast<int>(nodes_.size()) - 1);
      }
    }
  }

  // Of partial choices that use the same of every budget one is enough: the cheapest, of equals the first in order.
  // Without this, units that are alike would multiply.
  void merge(Half& half) {
    size_t slots = 1;
    while (slots < 2 * half.size()) slots *= 2;
    table_.assign(slots, -1);
    size_t kept = 0;
    for (size_t i = 0; i < half.size(); ++i) {
      const int64_t* use = &half.use[i * K_];
      uint64_t hash = 0;
      for (int k = 0; k < K_; ++k) {
        hash = (hash ^ static_cast<uint64_t>(use[k])) * 0x9E3779B97F4A7C15u;
        hash ^= hash >> 32;
      }
      size_t at = hash & (slots - 1);
      while (table_[at] >= 0 && !std::equal(use, use + K_, &half.use[static_cast<size_t>(table_[at]) * K_]))
        at = (at + 1) & (slots - 1);
      const int twin = table_[at];
      if (twin < 0) {
        table_[at] = static_cast<int>(kept);
        half.copy(kept++, i, K_);
      } else if (half.cost[i] < half.cost[twin] ||
                 (half.cost[i] == half.cost[twin] && earlier({half.trail[i], -1}, {half.trail[twin], -1}))) {
        half.copy(twin, i, K_);
      }
    }
    half.cut(kept, K_);
  }

  // All pairs of a partial choice of `half` with rc >= `above` and one of `other` with rc up to half of the gap that
  // fit and leave as little slack as the gap asks for.
  void match(const Half& half, const Half& other, double above) {
    const Shelf shelf = shelve(other, 0.5 * gap_);
    const auto keys = shelf.keys.begin();
    std::vector<int64_t> left(K_);
    for (size_t i = 0; i < half.size() && !stop_; ++i) {
      const double open = gap_ - half.rc[i];  // for the other rc and all slack
      if (open < 0 || half.rc[i] < above) continue;
      for (int k = 0; k < K_; ++k) left[k] = priced_.room[k] - half.use[i * K_ + k];
      const int64_t most = left[shelf.budget];
      size_t j = std::lower_bound(keys, shelf.keys.end(), most - reach(shelf.budget, open)) - keys;
      for (++pairs_; j < shelf.keys.size() && keys[j] <= most; ++j) {
        ++pairs_;
        const int64_t cost = priced_.base + half.cost[i] + shelf.half.cost[j];
        if (shelf.half.rc[j] > open || cost > best_) continue;
        const int64_t* use = &shelf.half.use[j * K_];
        bool fits = true;
        for (int k = 0; k < K_; ++k) fits &= use[k] <= left[k];
        if (fits) offer(cost, {half.trail[i], shelf.half.trail[j]});
      }
      if (pairs_ > limits_.pairs) throw TooMany{};
    }
  }

  // Partial choices of small rc, sorted by the use of the budget whose slack differs most.
  struct Shelf {
    int budget = 0;
    std::vector<int64_t> keys;  // use of it
    Half half;
  };

  Shelf shelve(const Half& from, double most) const {
    Shelf shelf;
    std::vector<size_t> kept;
    for (size_t i = 0; i < from.size(); ++i)
      if (from.rc[i] <= most) kept.push_back(i);
    if (kept.empty()) return shelf;
    double widest = 0;
    for (int k = 0; k < K_; ++k) {
      const auto less = [&](size_t a, size_t b) { return from.use[a * K_ + k] < from.use[b * K_ + k]; };
      const auto [low, high] = std::minmax_element(kept.begin(), kept.end(), less);
      const double spread = price_[k] * static_cast<double>(from.use[*high * K_ + k] - from.use[*low * K_ + k]);
      if (spread > widest) widest = spread, shelf.budget = k;
    }
    const auto key = [&](size_t i) { return from.use[i * K_ + shelf.budget]; };
    std::sort(kept.begin(), kept.end(), [&](size_t a, size_t b) { return key(a) < key(b); });
    const std::vector<int64_t> zero(K_, 0);
    for (const size_t i : kept) {
      shelf.keys.push_back(key(i));
      shelf.half.push(from.rc[i], from.cost[i], &from.use[i * K_], zero.data(), K_, from.trail[i]);
    }
    return shelf;
  }

  // The most that may be left of a budget when its slack may cost `open`; rounded up.
  int64_t reach(int k, double open) const {
    const double far = static_cast<double>(kFar);
    const double most = price_[k] * far > open ? open / price_[k] * (1 + 1e-15) : far;
    return static_cast<int64_t>(std::min(most + 1, far));
  }

  void offer(int64_t cost, Trails trails) {
    if (found_ && cost == best_) {
      pairs_ += 8;  // what the comparison is worth
      if (!earlier(trails, best_trails_)) return;
    }
    if (cost < best_) {
      best_ = cost;
      gap_ = priced_.gap(cost);
    }
    found_ = true;
    stop_ = any_;
    best_trails_ = trails;
  }

  // Whether of two choices of the same units the first comes before in order of units and choices.
  bool earlier(const Trails& a, const Trails& b) {
    mark(a, x_);
    mark(b, y_);
    int first = part_.units();
    for (const Trails& trails : {a, b})
      for (int node : trails)
        for (; node >= 0; node = nodes_[node].before) {
          const int u = part_.at[nodes_[node].option];
          if (x_[u] != y_[u]) first = std::min(first, u);
        }
    const bool before = first < part_.units() && x_[first] < y_[first];
    unmark(a, x_);
    unmark(b, y_);
    return before;
  }

  void mark(const Trails& trails, std::vector<int>& choice) const {
    for (int node : trails)
      for (; node >= 0; node = nodes_[node].before) {
        const int i = nodes_[node].option;
        choice[part_.at[i]] = part_.option[i];
      }
  }

  void unmark(const Trails& trails, std::vector<int>& choice) const {
    for (int node : trails)
      for (; node >= 0; node = nodes_[node].before) {
        const int u = part_.at[nodes_[node].option];
        choice[u] = best_of_[u];
      }
  }

  HalvesResult result() const {
    if (!found_) return {{}, 0, work_};
    HalvesResult out{part_.choice, best_, work_};
    std::vector<int> open = best_of_;
    mark(best_trails_, open);
    for (int u = 0; u < part_.units(); ++u) out.choice[part_.unit[u]] = open[u];
    return out;
  }

  struct Node {
    int before, option;  // -1: the trail's end
  };

  const Part& part_;
  const Priced& priced_;
  const std::vector<double>& price_;
  const int64_t top_;
  const bool any_;
  const HalvesLimits limits_;
  const int K_;
  std::vector<int> best_of_;  // the caller's choice of every open unit at reduced cost 0

  // The round of one gap.
  double gap_ = 0;
  int64_t best_ = 0;  // only choices that cost at most this are of interest
  bool found_ = false, stop_ = false;
  Trails best_trails_{-1, -1};
  Half halves_[2];
  std::vector<Node> nodes_;
  std::vector<int> table_;
  int64_t pairs_ = 0, work_ = 0;

  std::vector<int> x_, y_;  // best_of_, but within `earlier`
};

}  // namespace

std::optional<HalvesResult> search_halves(const Part& part, const Priced& priced, const std::vector<double>& price,
                                          int64_t top, bool any, const HalvesLimits& limits) {
  try {
    return Search(part, priced, price, top, any, limits).run();
  } catch (const TooMany&) {
    return std::nullopt;
  }
}

}  // namespace mpq::host
