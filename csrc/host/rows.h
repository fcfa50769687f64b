// Inner loops over rows of n = L * B reduced costs, choice b of position l at b * L + l. Sums run in a fixed order, so
// results do not depend on which instruction set is there.
#pragma once

namespace mpq::host::rows {

// Value and slope terms of the concave g(d) = sum_l min_b (row + d w + dead): returns g and the use of its minimisers.
struct Minima {
  double sum, use;
};
Minima minima_at(const double* row, const double* w, const double* dead, int L, int B, double d, double* scratch);

// Subtracts the least row + dead of every position from the row; returns the sum of these minima. `scratch`: [L].
double take_minima(double* row, const double* dead, int L, int B, double* scratch);

// Sum of the least a + b over every position but `skip`. `scratch`: [L].
double sum_minima(const double* a, const double* b, int L, int B, int skip, double* scratch);

void add(double* to, const double* from, double factor, int n);  // to += factor * from
double dot(const double* a, const double* b, int n);

}  // namespace mpq::host::rows
