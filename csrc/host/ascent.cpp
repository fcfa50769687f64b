#include "ascent.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "rows.h"

namespace mpq::host {
namespace {

// Bounds see this much more of every budget (as a share of its cap), so that a use that equals the cap up to rounding
// does not send a multiplier to infinity. Relaxing a budget keeps bounds valid; leaves are checked exactly.
constexpr double kRelax = 1e-9;
constexpr double kFits = 1e-11;  // rounding of sums of uses, as a share of the cap
// No multiplier goes beyond this (costs are at most 1): any smaller one is as valid, and a product of 1e3 and a use
// still has 13 digits behind the point.
constexpr double kSteepest = 1e3;
constexpr int kStarSteps = 8;     // secant steps for a product multiplier: more cost time and gain nothing
constexpr int kBudgetSteps = 20;  // for lambda, once a sweep

std::vector<double>& scratch_doubles(size_t count) {
  thread_local std::vector<double> room;
  if (room.size() < count) room.resize(count);
  return room;
}

// Maximises the concave, piecewise linear g(d) = sum_l min_b (row + d w + dead) - d rest over d >= -least by secant
// steps between supporting lines; returns the best d met, where g is at least g(0). `least`: the multiplier so far.
double best_multiplier(const double* row, const double* w, const double* dead, double rest, double least, int L, int B,
                       int steps) {
  struct Point {
    double d, value, slope;
  };
  double* scratch = scratch_doubles(2 * static_cast<size_t>(L)).data();
  const auto at = [&](double d) {
    const rows::Minima m = rows::minima_at(row, w, dead, L, B, d, scratch);
    return Point{d, m.sum - d * rest, m.use - rest};
  };
  Point best = at(0);
  const auto look = [&](double d) {
    const Point p = at(d);
    if (p.value > best.value) best = p;
    return p;
  };
  Point low = best, high = best;  // slopes: low's is positive, high's is not
  if (best.slope == 0) return 0;
  if (best.slope > 0) {
    double d = std::max(least / 4, 1e-3 * std::fabs(best.value) / std::max(rest, 1e-300) + 1e-12);
    const double most = kSteepest - least;
    if (most <= 0) return 0;
    for (;; d *= 4) {
      high = look(std::min(d, most));
      if (high.slope <= 0) break;
      if (d >= most) return best.d;
      low = high;
    }
  } else {
    if (least <= 0) return 0;
    for (double d = std::max(least / 4, 1e-15);; d *= 4) {
      low = look(-std::min(d, least));
      if (low.slope >= 0) break;
      if (d >= least) return best.d;
      high = low;
    }
  }
  for (int step = 0; step < steps && low.slope > 0 && high.slope < 0; ++step) {
    const double d = (high.value - low.value + low.slope * low.d - high.slope * high.d) / (low.slope - high.slope);
    if (!(d > low.d && d < high.d)) break;
    const double above = low.value + low.slope * (d - low.d);  // no multiplier does better than this
    if (above - best.value <= 1e-12 * std::fabs(best.value) + 1e-300) break;
    const Point p = look(d);
    (p.slope > 0 ? low : high) = p;
  }
  return best.d;
}

}  // namespace

Node Node::root(const Problem& p) {
  Node node;
  const int L = p.L, B = p.B, K = p.K, n = p.n();
  node.L = L, node.B = B, node.K = K, node.n = n;
  node.layer.resize(L);
  node.u.resize(n);
  node.S.resize(static_cast<size_t>(n) * n);
  node.w.resize(static_cast<size_t>(K) * n);
  node.dead.resize(n);
  node.mu.assign(static_cast<size_t>(K) * n, 0);
  node.lambda.assign(K, 0);
  node.rest.assign(K, 1 + kRelax);
  for (int l = 0; l < L; ++l) node.layer[l] = l;
  for (int i = 0; i < n; ++i) {
    const int64_t from = i % L * B + i / L;
    node.u[i] = p.unary[from];
    node.dead[i] = p.allowed[from] ? 0 : kForbidden;
    for (int k = 0; k < K; ++k) node.w[static_cast<size_t>(k) * n + i] = p.use[k * n + from] / p.cap[k];
    for (int j = 0; j < n; ++j) node.S[static_cast<size_t>(i) * n + j] = p.pairwise[from * n + j % L * B + j / L] / 2;
  }
  return node;
}

void Node::share_convex(const double* form, double share) {
  Q.resize(S.size());
  z.assign(n, 0);
  std::vector<double> start(n);
  for (int i = 0; i < n; ++i) {
    const int64_t from = i % L * B + i / L;
    for (int j = 0; j < n; ++j) {
      const size_t at = static_cast<size_t>(i) * n + j;
      Q[at] = share * form[from * n + j % L * B + j / L];
      if (i == j) u[i] -= Q[at];  // x_i^2 = x_i
      if (i % L != j % L) S[at] -= Q[at];
    }
  }
  for (int l = 0; l < L; ++l) {  // z starts in the middle: (x-z)'Q(x-z) = x'Qx - 2z'Qx + z'Qz
    int open = 0;
    for (int b = 0; b < B; ++b) open += dead[b * L + l] == 0;
    for (int b = 0; b < B; ++b) z[b * L + l] = dead[b * L + l] == 0 ? 1.0 / std::max(open, 1) : 0;
  }
  for (int i = 0; i < n; ++i) {
    const double Qz = rows::dot(&Q[static_cast<size_t>(i) * n], z.data(), n);
    u[i] += 2 * Qz;
    bound -= z[i] * Qz;
  }
}

bool Node::take_minima() {
  for (int k = 0; k < K; ++k) {
    const double* wk = &w[static_cast<size_t>(k) * n];
    const double d = best_multiplier(u.data(), wk, dead.data(), rest[k], lambda[k], L, B, kBudgetSteps);
    if (d == 0) continue;
    rows::add(u.data(), wk, d, n);
    bound -= d * rest[k];
    lambda[k] += d;
  }
  for (int l = 0; l < L; ++l) {
    double least = kForbidden;
    for (int b = 0; b < B; ++b)
      if (dead[b * L + l] == 0) least = std::min(least, u[b * L + l]);
    if (least >= kForbidden) return false;
    bound += least;
    for (int b = 0; b < B; ++b) u[b * L + l] -= least;
  }
  return true;
}

// x_i times everything else: takes the partner's half of every pair, then multiplies the budgets and the one-hot rows
// of the other layers by x_i (mu_i and the minima), and books what that yields under u_i.
void Node::star(int i) {
  const int l = i % L;
  double* row = &S[static_cast<size_t>(i) * n];
  double* column = &S[i];
  for (int j = 0; j < n; ++j, column += n) {
    row[j] += *column;
    *column = 0;
  }
  for (int b = 0; b < B; ++b) row[b * L + l] = kForbidden;
  row[i] = 0;
  for (int k = 0; k < K; ++k) {
    double& multiplier = mu[static_cast<size_t>(k) * n + i];
    const double* wk = &w[static_cast<size_t>(k) * n];
    const double d = best_multiplier(row, wk, dead.data(), rest[k], multiplier, L, B, kStarSteps);
    if (d == 0) continue;
    rows::add(row, wk, d, n);
    u[i] -= d * rest[k];
    multiplier += d;
  }
  u[i] += rows::take_minima(row, dead.data(), L, B, scratch_doubles(L).data());
}

bool Node::sweep() {
  if (L > 1)
    for (int step = 0; step < L; ++step) {
      const int l = backwards ? L - 1 - step : step;
      for (int i = l; i < n; i += L)
        if (dead[i] == 0) star(i);
    }
  backwards = !backwards;
  return take_minima();
}

void Node::spread() {
  if (L < 2) return;
  for (int i = 0; i < n; ++i) {
    if (dead[i] != 0 || u[i] <= 0) continue;
    const double share = u[i] / (L - 1);  // x_i (L - 1) = x_i sum of all x_j of the other layers
    double* row = &S[static_cast<size_t>(i) * n];
    for (int j = 0; j < n; ++j) row[j] += share;
    u[i] = 0;
  }
}

void Node::move_z(int passes) {
  if (Q.empty() || L == 0) return;
  std::vector<double> x = z, gradient(n, 0.0);  // gradient: Q (x - z)
  double step[kMostChoices];
  for (int pass = 0; pass < passes; ++pass)
    for (int l = 0; l < L; ++l) {
      int to = -1;
      for (int i = l; i < n; i += L)
        if (dead[i] == 0 && (to < 0 || u[i] + 2 * gradient[i] < u[to] + 2 * gradient[to])) to = i;
      if (to < 0) return;
      double slope = 0, curvature = 0;
      for (int b = 0; b < B; ++b) {
        const int i = b * L + l;
        step[b] = (i == to) - x[i];
        slope += step[b] * (u[i] + 2 * gradient[i]);
      }
      if (slope >= 0) continue;
      for (int b = 0; b < B; ++b)
        for (int c = 0; c < B; ++c) curvature += step[b] * step[c] * Q[static_cast<size_t>(b * L + l) * n + c * L + l];
      const double length = curvature > 0 ? std::min(1.0, -slope / (2 * curvature)) : 1.0;
      if (length <= 1e-9) continue;
      for (int b = 0; b < B; ++b) {
        const int i = b * L + l;
        if (step[b] == 0) continue;
        x[i] += length * step[b];
        rows::add(gradient.data(), &Q[static_cast<size_t>(i) * n], length * step[b], n);
      }
    }
  // (x-z)'Q(x-z) with z + d for z: linear terms grow by 2Qd, the constant falls by 2d'Qz + d'Qd = (Qd)'(z + z + d).
  for (int i = 0; i < n; ++i) {
    bound -= gradient[i] * (z[i] + x[i]);
    u[i] += 2 * gradient[i];
  }
  z.swap(x);
}

bool Node::drop_unfitting() {
  std::vector<double> least(L);
  for (bool changed = true; changed;) {
    changed = false;
    for (int k = 0; k < K; ++k) {
      const double* wk = &w[static_cast<size_t>(k) * n];
      double sum = 0;
      for (int l = 0; l < L; ++l) {
        least[l] = kInf;
        for (int i = l; i < n; i += L)
          if (dead[i] == 0) least[l] = std::min(least[l], wk[i]);
        sum += least[l];
      }
      if (sum > rest[k] + kFits) return false;
      for (int i = 0; i < n; ++i)
        if (dead[i] == 0 && sum - least[i % L] + wk[i] > rest[k] + kFits) {
          dead[i] = kForbidden;
          changed = true;
        }
    }
  }
  return true;
}

void Node::look_ahead(double enough, std::vector<double>& after, std::vector<double>& scratch) const {
  constexpr int kTile = 32;  // of the transposition: two tiles fit the first-level cache
  after.assign(n, kInf);
  scratch.resize(static_cast<size_t>(n) * n + 4 * static_cast<size_t>(n));
  double* pairs = scratch.data();  // [n][n] S + S'
  double *cost = pairs + static_cast<size_t>(n) * n, *Qz = cost + n, *mean = Qz + n, *room = mean + n;
  for (int i0 = 0; i0 < n; i0 += kTile)
    for (int j0 = 0; j0 < n; j0 += kTile)
      for (int i = i0; i < std::min(n, i0 + kTile); ++i)
        for (int j = j0; j < std::min(n, j0 + kTile); ++j)
          pairs[static_cast<size_t>(i) * n + j] = S[static_cast<size_t>(i) * n + j] + S[static_cast<size_t>(j) * n + i];
  for (int j = 0; j < n; ++j) cost[j] = u[j] + dead[j];
  if (!Q.empty())
    for (int j = 0; j < n; ++j) Qz[j] = rows::dot(&Q[static_cast<size_t>(j) * n], z.data(), n);
  for (int l = 0; l < L; ++l) {
    bool averaged = false;
    double along = 0;  // sum_c z_c (Qz)_c over the layer
    for (int i = l; i < n; i += L) {
      if (dead[i] != 0) continue;
      double* row = pairs + static_cast<size_t>(i) * n;
      after[i] = bound + u[i] + rows::sum_minima(row, cost, L, B, l, room);
      if (Q.empty() || after[i] >= enough) continue;
      if (!averaged) {
        std::fill(mean, mean + n, 0.0);
        for (int j = l; j < n; j += L) {
          if (z[j] != 0) rows::add(mean, &Q[static_cast<size_t>(j) * n], z[j], n);
          along += z[j] * Qz[j];
        }
        averaged = true;
      }
      // z moves by d = e_i - z_l: linear terms grow by 2Qd, the bound falls by 2d'Qz + d'Qd.
      const double* Qi = &Q[static_cast<size_t>(i) * n];
      double quadratic = Qi[i] - mean[i];
      for (int j = l; j < n; j += L) quadratic -= z[j] * (Qi[j] - mean[j]);
      rows::add(row, Qi, 2, n);
      rows::add(row, mean, -2, n);
      const double moved = bound - 2 * (Qz[i] - along) - quadratic + u[i] + 2 * (Qi[i] - mean[i]) +
                           rows::sum_minima(row, cost, L, B, l, room);
      after[i] = std::max(after[i], moved);
    }
  }
}

Node Node::fixed(int i) const {
  const int gone = i % L;
  Node node;
  node.L = L - 1, node.B = B, node.K = K, node.n = node.L * B;
  node.backwards = backwards;
  node.bound = bound + u[i];
  std::vector<double> shift(n, 0.0);  // 2Qd for the move of z to x_i = 1
  if (!Q.empty()) {
    for (int j = gone; j < n; j += L) {
      const double d = (j == i) - z[j];
      if (d != 0) rows::add(shift.data(), &Q[static_cast<size_t>(j) * n], d, n);
    }
    double fall = 2 * rows::dot(shift.data(), z.data(), n);
    for (int j = gone; j < n; j += L) fall += shift[j] * ((j == i) - z[j]);
    for (double& s : shift) s *= 2;
    node.bound += shift[i] - fall;
  }
  node.lambda = lambda;
  node.rest = rest;
  for (int k = 0; k < K; ++k) {
    node.lambda[k] += mu[static_cast<size_t>(k) * n + i];
    node.rest[k] -= w[static_cast<size_t>(k) * n + i];
  }
  std::vector<int> kept;  // the pairs that stay, in their new order
  kept.reserve(node.n);
  for (int j = 0; j < n; ++j)
    if (j % L != gone) kept.push_back(j);
  node.layer = layer;
  node.layer.erase(node.layer.begin() + gone);
  const auto shorten = [&](const double* from, double* to) {  // a row without the layer: 2 B runs
    for (int b = 0; b < B; ++b, from += L, to += L - 1) {
      std::copy(from, from + gone, to);
      std::copy(from + gone + 1, from + L, to + gone);
    }
  };
  const auto select = [&](const std::vector<double>& from, std::vector<double>& to) {
    to.reserve(static_cast<size_t>(node.n) * node.n);
    to.resize(static_cast<size_t>(node.n) * node.n);
    for (int j = 0; j < node.n; ++j)
      shorten(&from[static_cast<size_t>(kept[j]) * n], to.data() + static_cast<size_t>(j) * node.n);
  };
  node.u.resize(node.n);
  node.dead.resize(node.n);
  node.mu.resize(static_cast<size_t>(K) * node.n);
  node.w.resize(static_cast<size_t>(K) * node.n);
  shorten(dead.data(), node.dead.data());
  for (int k = 0; k < K; ++k) {
    shorten(&mu[static_cast<size_t>(k) * n], node.mu.data() + static_cast<size_t>(k) * node.n);
    shorten(&w[static_cast<size_t>(k) * n], node.w.data() + static_cast<size_t>(k) * node.n);
  }
  for (int j = 0; j < node.n; ++j)
    node.u[j] =
        u[kept[j]] + shift[kept[j]] + S[static_cast<size_t>(i) * n + kept[j]] + S[static_cast<size_t>(kept[j]) * n + i];
  select(S, node.S);
  if (!Q.empty()) {
    select(Q, node.Q);
    node.z.resize(node.n);
    shorten(z.data(), node.z.data());
  }
  return node;
}

double Node::value(const std::vector<int>& choice) const {
  std::vector<int> on(L);
  for (int l = 0; l < L; ++l) on[l] = choice[layer[l]] * L + l;
  double total = bound;
  std::vector<double> off(n);
  for (int i = 0; i < n && !Q.empty(); ++i) off[i] = -z[i];
  for (int i : on) {
    total += u[i];
    off[i] += 1;
    for (int j : on)
      if (i != j) total += S[static_cast<size_t>(i) * n + j];
  }
  for (int i = 0; i < n && !Q.empty(); ++i) total += off[i] * rows::dot(&Q[static_cast<size_t>(i) * n], off.data(), n);
  for (int k = 0; k < K; ++k) {
    double price = lambda[k], left = rest[k];
    for (int i : on) {
      price += mu[static_cast<size_t>(k) * n + i];
      left -= w[static_cast<size_t>(k) * n + i];
    }
    total += price * left;
  }
  return total;
}

}  // namespace mpq::host
