#include "rows.h"

#include <algorithm>

// Twice as wide where the processor can. Without FMA, so that every clone rounds alike.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define MPQ_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define MPQ_CLONES
#endif
#define MPQ_INLINE inline __attribute__((always_inline))

namespace mpq::host::rows {
namespace {

// Four running sums hide the latency of an addition and fill a vector.
MPQ_INLINE double sum(const double* x, int n) {
  double part[4] = {0, 0, 0, 0};
  int i = 0;
  for (; i + 4 <= n; i += 4)
    for (int j = 0; j < 4; ++j) part[j] += x[i + j];
  for (; i < n; ++i) part[0] += x[i];
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// `width` is B where the compiler should know it (fewer passes over the row), else 0.
template <int width>
MPQ_INLINE Minima minima(const double* row, const double* w, const double* dead, int L, int B, double d,
                         double* __restrict least, double* __restrict use) {
  if constexpr (width > 0) {
    for (int l = 0; l < L; ++l) {
      double a = row[l] + d * w[l] + dead[l], wa = w[l];
      for (int b = 1; b < width; ++b) {
        const double v = row[b * L + l] + d * w[b * L + l] + dead[b * L + l], wv = w[b * L + l];
        wa = v < a ? wv : wa;
        a = v < a ? v : a;
      }
      least[l] = a;
      use[l] = wa;
    }
  } else {
    for (int l = 0; l < L; ++l) least[l] = row[l] + d * w[l] + dead[l];
    for (int l = 0; l < L; ++l) use[l] = w[l];
    for (int b = 1; b < B; ++b)
      for (int l = 0; l < L; ++l) {
        const double v = row[b * L + l] + d * w[b * L + l] + dead[b * L + l], wv = w[b * L + l];
        use[l] = v < least[l] ? wv : use[l];
        least[l] = v < least[l] ? v : least[l];
      }
  }
  return {sum(least, L), sum(use, L)};
}

template <int width>
MPQ_INLINE void least_of(const double* a, const double* b, int L, int B, double* __restrict least) {
  const int count = width > 0 ? width : B;
  for (int l = 0; l < L; ++l) least[l] = a[l] + b[l];
  for (int c = 1; c < count; ++c)
    for (int l = 0; l < L; ++l) least[l] = std::min(least[l], a[c * L + l] + b[c * L + l]);
}

}  // namespace

MPQ_CLONES Minima minima_at(const double* row, const double* w, const double* dead, int L, int B, double d,
                            double* scratch) {
  double *least = scratch, *use = scratch + L;
  switch (B) {
    case 2:
      return minima<2>(row, w, dead, L, B, d, least, use);
    case 3:
      return minima<3>(row, w, dead, L, B, d, least, use);
    case 4:
      return minima<4>(row, w, dead, L, B, d, least, use);
    default:
      return minima<0>(row, w, dead, L, B, d, least, use);
  }
}

MPQ_CLONES double take_minima(double* row, const double* dead, int L, int B, double* scratch) {
  least_of<0>(row, dead, L, B, scratch);
  for (int b = 0; b < B; ++b)
    for (int l = 0; l < L; ++l) row[b * L + l] -= scratch[l];
  return sum(scratch, L);
}

MPQ_CLONES double sum_minima(const double* a, const double* b, int L, int B, int skip, double* scratch) {
  least_of<0>(a, b, L, B, scratch);
  scratch[skip] = 0;
  return sum(scratch, L);
}

MPQ_CLONES void add(double* to, const double* from, double factor, int n) {
  for (int i = 0; i < n; ++i) to[i] += factor * from[i];
}

MPQ_CLONES double dot(const double* a, const double* b, int n) {
  double part[4] = {0, 0, 0, 0};
  int i = 0;
  for (; i + 4 <= n; i += 4)
    for (int j = 0; j < 4; ++j) part[j] += a[i + j] * b[i + j];
  for (; i < n; ++i) part[0] += a[i] * b[i];
  return (part[0] + part[1]) + (part[2] + part[3]);
}

}  // namespace mpq::host::rows
