#include "part.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace mpq::host {
namespace {

struct Sum {
  double value, terms;  // and the sum of the terms' magnitudes
};

}  // namespace

bool Part::tighten(std::vector<uint8_t>& dead) const {
  const int n = units();
  std::vector<int64_t> least(static_cast<size_t>(n) * K);
  for (bool changed = true; changed;) {
    std::vector<int64_t> room = rest;
    for (int u = 0; u < n; ++u)
      for (int k = 0; k < K; ++k) {
        int64_t low = kFar;
        for (int i = first[u]; i < first[u + 1]; ++i)
          if (!dead[i]) low = std::min(low, use[static_cast<size_t>(i) * K + k]);
        if (low == kFar) return false;
        least[u * K + k] = low;
        room[k] -= low;
      }
    for (int k = 0; k < K; ++k)
      if (room[k] < 0) return false;
    changed = false;
    for (int i = 0; i < options(); ++i)
      for (int k = 0; k < K; ++k)
        if (!dead[i] && use[static_cast<size_t>(i) * K + k] - least[at[i] * K + k] > room[k]) dead[i] = changed = true;
  }
  return true;
}

std::vector<int> Part::drop(const std::vector<uint8_t>& dead) {
  std::vector<int> went(options(), -1);
  int kept_units = 0, kept = 0;
  for (int u = 0; u < units(); ++u) {
    const int begin = first[u], end = first[u + 1];
    const auto alive = std::count(dead.begin() + begin, dead.begin() + end, 0);
    const int start = kept;
    for (int i = begin; i < end; ++i) {
      if (dead[i]) continue;
      if (alive == 1) {
        paid += cost[i];
        for (int k = 0; k < K; ++k) rest[k] -= use[static_cast<size_t>(i) * K + k];
        choice[unit[u]] = option[i];
        continue;
      }
      went[i] = kept;
      option[kept] = option[i];
      at[kept] = kept_units;
      cost[kept] = cost[i];
      std::copy_n(&use[static_cast<size_t>(i) * K], K, &use[static_cast<size_t>(kept) * K]);
      ++kept;
    }
    if (alive == 1) continue;
    unit[kept_units] = unit[u];
    first[kept_units++] = start;
  }
  first[kept_units] = kept;
  first.resize(kept_units + 1);
  unit.resize(kept_units);
  option.resize(kept);
  at.resize(kept);
  cost.resize(kept);
  use.resize(static_cast<size_t>(kept) * K);
  return went;
}

Priced::Priced(const Part& part, const std::vector<uint8_t>& dead, const std::vector<double>& price, int64_t top)
    : rc(part.options(), std::numeric_limits<double>::infinity()),
      best(part.units()),
      base(part.paid),
      room(part.rest),
      bought(0),
      slop(0) {
  const int K = part.K;
  double size = 0;
  for (int u = 0; u < part.units(); ++u) {
    // Only differences within a unit are rounded: common parts, however large, are not.
    const auto beyond = [&](int i, int from) {
      Sum sum{static_cast<double>(part.cost[i] - part.cost[from]), 0};
      sum.terms = std::fabs(sum.value);
      for (int k = 0; k < K; ++k) {
        const int64_t more = part.use[static_cast<size_t>(i) * K + k] - part.use[static_cast<size_t>(from) * K + k];
        const double paid = price[k] * static_cast<double>(more);
        sum.value += paid;
        sum.terms += std::fabs(paid);
      }
      return sum;
    };
    int start = part.first[u];
    while (dead[start] != 0) ++start;
    best[u] = start;
    double least = 0;
    for (int i = start + 1; i < part.first[u + 1]; ++i) {
      if (dead[i] != 0) continue;
      const double value = beyond(i, start).value;
      if (value < least) least = value, best[u] = i;
    }
    const int64_t* own = &part.use[static_cast<size_t>(best[u]) * K];
    base += part.cost[best[u]];
    for (int k = 0; k < K; ++k) room[k] -= own[k];
    double largest = 0;
    for (int i = start; i < part.first[u + 1]; ++i) {
      if (dead[i] != 0) continue;
      const Sum sum = beyond(i, best[u]);
      rc[i] = std::max(sum.value, 0.0);
      largest = std::max(largest, sum.terms);
    }
    size += largest;
  }
  for (int k = 0; k < K; ++k) {
    const double paid = price[k] * static_cast<double>(room[k]);
    bought += paid;
    size += std::fabs(paid);
  }
  size += std::fabs(static_cast<double>(top)) + std::fabs(static_cast<double>(base));
  // Every term is off by a few of its last bits, and every addition of fewer than U + 2 K + 4 by one of the sum's.
  slop = 1 + std::ldexp((part.units() + 2.0 * K + 8.0) * size, -52);
}

}  // namespace mpq::host
