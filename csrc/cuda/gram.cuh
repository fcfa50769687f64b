// What the kernels of `gram` share: which tile of which feature is whose work.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../packed.h"

namespace mpq {

constexpr int kSum = 512;      // columns that are summed in fp32
constexpr int kFeatures = 32;  // that a launch takes: they are arguments of kernels

// Features of n samples each, rows of `columns` values, `stride` apart. The work is tiles of entries on and below the
// diagonal, times slices of the columns, whole sums long; a feature's slices follow each other, `first` is its first.
struct Features {
  struct Feature {
    const void* x;
    int64_t columns, stride, slices, per_slice, first;
  } list[kFeatures];
  int64_t n, tiles;
  int count;
  bool shift;  // the values are less the first sample's

  __host__ __device__ int64_t slices() const { return list[count - 1].first + list[count - 1].slices; }
  __device__ int of_slice(int64_t slice) const {
    int f = 0;
    while (f + 1 < count && list[f + 1].first <= slice) ++f;
    return f;
  }
};

// Which tile of those on and below the diagonal, row by row.
__device__ inline void tile_at(int index, int* i, int* j) {
  *i = 0;
  while ((*i + 1) * (*i + 2) / 2 <= index) ++*i;
  *j = index - *i * (*i + 1) / 2;
}

// A slice of a feature: 32 bits hold its columns.
template <class T>
struct Samples {
  const T* x;
  int64_t stride;
  int n, columns;
  bool shift;

  __device__ Samples(const Features& g, int f, int64_t slice) : stride(g.list[f].stride), n(int(g.n)), shift(g.shift) {
    const int64_t begin = (slice - g.list[f].first) * g.list[f].per_slice, rest = g.list[f].columns - begin;
    x = static_cast<const T*>(g.list[f].x) + begin;
    columns = int(rest < g.list[f].per_slice ? rest : g.list[f].per_slice);
  }
};

// Sums of products of 16-bit features as they are, by tensor cores: partial [slices][tiles][side][side], side 32 or 64.
template <class T>
int half_products(const Features& features, int side, double* partial, void* stream);

}  // namespace mpq
