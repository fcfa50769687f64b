// What the kernels of `gram` share: how an entry's columns are cut up, and which tile is whose.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../packed.h"

namespace mpq {

constexpr int kSum = 512;  // columns that are summed in fp32

// Samples of a feature: rows of `columns` values, `stride` apart. shift: less the first sample.
template <class T>
struct Samples {
  const T* x;
  int64_t n, columns, stride;
  bool shift;
};

// The work: tiles of entries on and below the diagonal, times slices of the columns, whole sums long.
struct GramCut {
  int64_t tiles, slices, per_slice;
};

// Which tile of those on and below the diagonal, row by row.
__device__ inline void tile_at(int64_t index, int64_t* i, int64_t* j) {
  *i = 0;
  while ((*i + 1) * (*i + 2) / 2 <= index) ++*i;
  *j = index - *i * (*i + 1) / 2;
}

// Sums of products of 16-bit features as they are, by tensor cores: partial [slices][tiles][side][side], side 32 or 64.
template <class T>
int half_products(const Samples<T>& s, int side, const GramCut& cut, double* partial, void* stream);

}  // namespace mpq
