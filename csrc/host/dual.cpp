#include "dual.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace mpq::host {
namespace {

constexpr double kShare = 1e-12;  // shares below minus this are negative: budgets can clash by one part in 1e11
constexpr double kPivot = 1e-9;   // entries smaller than this are no pivots

class Simplex {
 public:
  Simplex(const Part& part, const std::vector<uint8_t>& dead, const Scale& scale, Basis& basis)
      : part_(part), dead_(dead), scale_(scale), basis_(basis), K_(part.K), price_(K_), share_(K_), inverse_(K_ * K_) {}

  Relaxed run(double beyond, double most) {
    Relaxed out;
    most = std::min(most, 100 + 4.0 * part_.units());  // far more than it takes, unless rounding makes it circle
    for (; factor(); ++out.pivots) {
      out.price = price_;
      const int row = leaving();
      if (row < 0 || out.pivots >= most) break;
      const double sign = share_[row] < 0 ? -1 : 1;
      int column = entering(row, sign);
      if (column == kNone && std::fabs(share_[row]) <= kShare) column = entering(row, -sign);
      if (column == kNone) {
        // No mix of options brings this share to 0, and along this ray of prices the bound rises without end.
        const double far = 4 * (beyond * scale_.cost + 1) / std::fabs(share_[row]);
        for (int k = 0; k < K_; ++k) out.price[k] -= sign * far * inverse_[row * K_ + k];
        break;
      }
      basis_.rows[row] = column;
    }
    if (out.price.empty()) out.price.assign(K_, 0.0);
    for (int k = 0; k < K_; ++k) out.price[k] = std::max(out.price[k], 0.0) * scale_.rest[k] / scale_.cost;
    return out;
  }

 private:
  static constexpr int kNone = std::numeric_limits<int>::min();

  double cost(int i) const { return scale_.cost * static_cast<double>(part_.cost[i]); }
  double use(int i, int k) const {
    return scale_.rest[k] * static_cast<double>(part_.use[static_cast<size_t>(i) * K_ + k]);
  }
  double priced(int i) const {
    double sum = cost(i);
    for (int k = 0; k < K_; ++k) sum += price_[k] * use(i, k);
    return sum;
  }

  // Column of the basis: an option less its unit's key, or a slack.
  double entry(int row, int k) const {
    const int i = basis_.rows[row];
    return i < 0 ? (~i == k ? 1.0 : 0.0) : use(i, k) - use(basis_.key[part_.at[i]], k);
  }

  // Inverse of the basis, shares and prices. False where it is singular.
  bool factor() {
    const int width = 2 * K_;
    table_.assign(static_cast<size_t>(K_) * width, 0.0);
    for (int k = 0; k < K_; ++k) {
      for (int row = 0; row < K_; ++row) table_[k * width + row] = entry(row, k);
      table_[k * width + K_ + k] = 1;
    }
    for (int c = 0; c < K_; ++c) {
      int pivot = c;
      for (int r = c; r < K_; ++r)
        if (std::fabs(table_[r * width + c]) > std::fabs(table_[pivot * width + c])) pivot = r;
      const double value = table_[pivot * width + c];
      if (!(std::fabs(value) > 1e-14)) return false;
      std::swap_ranges(&table_[c * width], &table_[c * width] + width, &table_[pivot * width]);
      for (int j = 0; j < width; ++j) table_[c * width + j] /= value;
      for (int r = 0; r < K_; ++r) {
        const double factor = r == c ? 0 : table_[r * width + c];
        if (factor != 0)
          for (int j = 0; j < width; ++j) table_[r * width + j] -= factor * table_[c * width + j];
      }
    }
    std::vector<double> room(K_);
    for (int k = 0; k < K_; ++k) {
      int64_t left = part_.rest[k];
      for (int key : basis_.key) left -= part_.use[static_cast<size_t>(key) * K_ + k];
      room[k] = scale_.rest[k] * static_cast<double>(left);
    }
    std::fill(price_.begin(), price_.end(), 0.0);
    for (int row = 0; row < K_; ++row) {
      const int i = basis_.rows[row];
      const double own = i < 0 ? 0 : cost(i) - cost(basis_.key[part_.at[i]]);
      share_[row] = 0;
      for (int k = 0; k < K_; ++k) {
        inverse_[row * K_ + k] = table_[row * width + K_ + k];
        share_[row] += inverse_[row * K_ + k] * room[k];
        price_[k] -= own * inverse_[row * K_ + k];
      }
    }
    return true;
  }

  // The row to leave the basis: a dead option, else what has the most negative share. -1: optimal.
  int leaving() {
    for (int row = 0; row < K_; ++row)
      if (basis_.rows[row] >= 0 && dead_[basis_.rows[row]]) return row;
    bool moved = false;
    for (int u = 0; u < part_.units(); ++u) {
      int& key = basis_.key[u];
      if (!dead_[key]) continue;
      const int row = fullest(u);
      if (row >= 0) return leave(u, row);
      int best = -1;
      for (int i = part_.first[u]; i < part_.first[u + 1]; ++i)
        if (!dead_[i] && (best < 0 || priced(i) < priced(best))) best = i;
      key = best;
      moved = true;
    }
    if (moved && !factor()) return -1;
    int worst = -1, unit = -1;
    double low = -kShare;
    for (int row = 0; row < K_; ++row) {
      if (share_[row] < low) low = share_[row], worst = row;
    }
    for (int row = 0; row < K_; ++row) {
      if (basis_.rows[row] < 0) continue;
      const int u = part_.at[basis_.rows[row]];
      double left = 1;
      for (int other = 0; other < K_; ++other) left -= of_unit(other, u) ? share_[other] : 0;
      if (left < low) low = left, unit = u;
    }
    return unit < 0 ? worst : leave(unit, fullest(unit));
  }

  bool of_unit(int row, int u) const { return basis_.rows[row] >= 0 && part_.at[basis_.rows[row]] == u; }

  int fullest(int u) const {
    int best = -1;
    for (int row = 0; row < K_; ++row)
      if (of_unit(row, u) && (best < 0 || share_[row] > share_[best])) best = row;
    return best;
  }

  // A key leaves by way of a row of its unit, which takes its place.
  int leave(int u, int row) {
    std::swap(basis_.rows[row], basis_.key[u]);
    return factor() ? row : -1;
  }

  // The option or slack whose reduced cost is the first to reach 0 as the share of `row` goes to 0.
  int entering(int row, double sign) const {
    const double* line = &inverse_[row * K_];
    int best = kNone;
    double ratio = std::numeric_limits<double>::infinity(), steep = 0;
    const auto offer = [&](int column, double rc, double slope) {
      if (sign * slope <= kPivot) return;
      const double r = std::max(rc, 0.0) / (sign * slope);
      if (r < ratio || (r == ratio && sign * slope > steep)) best = column, ratio = r, steep = sign * slope;
    };
    for (int k = 0; k < K_; ++k)
      if (std::find(basis_.rows.begin(), basis_.rows.end(), ~k) == basis_.rows.end()) offer(~k, price_[k], line[k]);
    for (int u = 0; u < part_.units(); ++u) {
      const int key = basis_.key[u];
      const double own = priced(key);
      double from = 0;
      for (int k = 0; k < K_; ++k) from += line[k] * use(key, k);
      for (int i = part_.first[u]; i < part_.first[u + 1]; ++i) {
        if (dead_[i] || i == key) continue;
        double to = 0;
        for (int k = 0; k < K_; ++k) to += line[k] * use(i, k);
        if (sign * (to - from) <= kPivot) continue;
        if (std::find(basis_.rows.begin(), basis_.rows.end(), i) != basis_.rows.end()) continue;
        offer(i, priced(i) - own, to - from);
      }
    }
    return best;
  }

  const Part& part_;
  const std::vector<uint8_t>& dead_;
  const Scale& scale_;
  Basis& basis_;
  const int K_;
  std::vector<double> price_, share_;  // of the scaled problem
  std::vector<double> inverse_;        // [row][K]
  std::vector<double> table_;
};

}  // namespace

Basis slack_basis(const Part& part) {
  Basis basis;
  for (int u = 0; u < part.units(); ++u)
    basis.key.push_back(
        static_cast<int>(std::min_element(part.cost.begin() + part.first[u], part.cost.begin() + part.first[u + 1]) -
                         part.cost.begin()));
  for (int k = 0; k < part.K; ++k) basis.rows.push_back(~k);
  return basis;
}

Relaxed relax(const Part& part, const std::vector<uint8_t>& dead, const Scale& scale, double beyond, double most,
              Basis& basis) {
  return Simplex(part, dead, scale, basis).run(beyond, most);
}

}  // namespace mpq::host
