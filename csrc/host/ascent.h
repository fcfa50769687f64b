// A node of the search tree: what is still open of the problem, rewritten so that a lower bound can be read off.
//
// For every one-hot x over the open layers and choices, within rounding,
//
//   f(x) = bound + sum_i u_i x_i + sum_{i,j} S_ij x_i x_j + (x - z)' Q (x - z)
//                + sum_k (lambda_k + sum_i mu_ki x_i) (rest_k - sum_i w_ki x_i)                                   (*)
//
// After a sweep every u, S, mu and lambda is nonnegative, Q is positive semidefinite on differences of one-hot vectors,
// and feasible x have rest - w.x >= 0: no term is negative, so `bound` is a lower bound and u_i, S_ij are reduced
// costs. Every operation here keeps (*) and moves value from the terms into `bound`. This is Gilmore-Lawler dual ascent
// on the level-1 RLT relaxation with knapsack products (mu), plus a convex share (Q, z).
#pragma once

#include <vector>

#include "quadratic.h"

namespace mpq::host {

// Stands for infinity where infinity would breed NaNs: costs are at most 1, so no sum of them comes near.
constexpr double kForbidden = 1e15;

// Within a node the pair (layer at position l, choice b) is at b * L + l: minima over the choices of a layer then run
// along rows of L, which is what the compiler vectorizes.
struct Node {
  int L = 0, B = 0, K = 0, n = 0;
  double bound = 0;
  std::vector<int> layer;      // [L] the problem's layer at each position
  std::vector<double> u;       // [n]
  std::vector<double> S;       // [n][n]; entries within a layer mean nothing
  std::vector<double> mu;      // [K][n]
  std::vector<double> w;       // [K][n] use as a share of the cap
  std::vector<double> lambda;  // [K]
  std::vector<double> rest;    // [K] what the open layers may use
  std::vector<double> dead;    // [n] 0 or kForbidden: choices that no better solution contains
  std::vector<double> Q;       // [n][n], or empty: no convex share
  std::vector<double> z;       // [n], sums to 1 over every layer
  bool backwards = false;      // direction of the next sweep

  static Node root(const Problem& problem);
  // Takes share * `form` (x' form x over one-hot x; [n][n] in the problem's order) out of u and S and into Q.
  void share_convex(const double* form, double share);

  // Maximises over lambda and takes the least u of every layer. False: a layer has no choice left.
  bool take_minima();
  // One star for every choice, then take_minima. All S and mu are nonnegative afterwards.
  bool sweep();
  // Hands what is left of u_i back to row i of S evenly, to be distributed anew by the next sweep.
  void spread();
  // Moves z towards the minimiser of u'x + (x-z)'Q(x-z), a bound that a fixed z cannot see.
  void move_z(int passes);

  // Choices that do not fit the budgets become dead. False: nothing fits.
  bool drop_unfitting();
  // after[i] = a lower bound for x_i = 1 (infinite for dead choices), from one look at row i of S, and, where that
  // stays below `enough`, from one with z moved to x_i = 1 as well.
  void look_ahead(double enough, std::vector<double>& after, std::vector<double>& scratch) const;
  // The node for x_i = 1: its layer is gone, and multipliers and reduced costs carry over.
  Node fixed(int i) const;

  // Right side of (*), for tests.
  double value(const std::vector<int>& choice) const;
  size_t bytes() const { return sizeof(double) * (S.size() + Q.size() + (5 + 2 * static_cast<size_t>(K)) * n); }

 private:
  void star(int i);
};

}  // namespace mpq::host
