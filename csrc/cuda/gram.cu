// gram: a block sums a tile of x x^T over a slice of the columns, in a workspace; the slices of an entry are then added
// in order. How columns are cut depends on shapes alone, and nothing is added in an order of chance, so results never
// vary. Sums are fp32 over 512 columns, fp64 from there on.
//
// fp16 and bf16 are multiplied as they are, by tensor cores, and centred in fp64 (gram_halves.cu). Where that leaves a
// sample less than a quarter of its squared norm, too much of what it had has cancelled, and the matrix is made again
// of features less the first sample, as fp32 always is. The GPU decides that by itself: the kernels that do it are
// started anyway, and end at once where they are not needed.
#include "convert.cuh"
#include "gram.cuh"
#include "launch.h"
#include "start.cuh"
#include "tile.cuh"

namespace {

using namespace mpq;

constexpr int64_t kBlocks = 512;  // that slices make of few tiles: four for each processor of a large GPU
constexpr int kAdders = 256;      // threads of the smaller kernels

int side_of(int64_t n) { return n <= 32 ? 32 : 64; }  // entries of a tile's side
int64_t tiles_of(int64_t n) {                         // on and below the diagonal
  const int64_t across = ceil_div(n, side_of(n));
  return across * (across + 1) / 2;
}

// Chunks of a tile's rows: from memory to registers, and on to shared memory when that is free.
template <class T, int kTile>
struct Chunk {
  static constexpr int kWarps = tile_threads(kTile) / 32, kRows = kTile / kWarps;
  float v[kRows];

  __device__ void load(const Samples<T>& s, int64_t row, int64_t k, int64_t end) {
    const int64_t at = k + threadIdx.x % 32;
    const float first = s.shift && at < end ? to_float(s.x[at]) : 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t r = row + threadIdx.x / 32 + i * kWarps;
      v[i] = at < end && r < s.n ? __fsub_rn(to_float(s.x[r * s.stride + at]), first) : 0;
    }
  }
  __device__ void store(float (*to)[kTileRow]) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) to[threadIdx.x / 32 + i * kWarps][threadIdx.x % 32] = v[i];
  }
};

// `only_if`, here and below: nothing is to be done where that is 0; null: something always is.
__device__ bool idle(const int* only_if) { return only_if && !*only_if; }

// partial [slices][tiles][kTile][kTile]
template <class T, int kTile>
__global__ void __launch_bounds__(tile_threads(kTile))
    products(const Samples<T> s, const GramCut cut, double* partial, const int* only_if) {
  if (idle(only_if)) return;
  constexpr int kSide = kTile / kEach;
  __shared__ __align__(16) float a[kTile][kTileRow], b[kTile][kTileRow];
  for (int64_t task = blockIdx.x; task < cut.tiles * cut.slices; task += gridDim.x) {
    const int64_t slice = task / cut.tiles, begin = slice * cut.per_slice;
    const int64_t end = begin + cut.per_slice < s.columns ? begin + cut.per_slice : s.columns;
    int64_t ti, tj;
    tile_at(task - slice * cut.tiles, &ti, &tj);
    const float(*right)[kTileRow] = ti == tj ? a : b;
    double total[kEach][kEach] = {};
    Chunk<T, kTile> rows, columns;
    auto load = [&](int64_t k) {
      rows.load(s, ti * kTile, k, end);
      if (ti != tj) columns.load(s, tj * kTile, k, end);
    };
    load(begin);
    for (int64_t k0 = begin; k0 < end; k0 += kSum) {
      float sum[kEach][kEach] = {};
#pragma unroll 1
      for (int64_t k = k0; k < k0 + kSum && k < end; k += kDepth) {
        __syncthreads();  // the chunk before has been read
        rows.store(a);
        if (ti != tj) columns.store(b);
        __syncthreads();
        load(k + kDepth);  // in flight meanwhile
        multiply<kTile>(a, right, sum);
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i)
#pragma unroll
        for (int j = 0; j < kEach; ++j) total[i][j] += double(sum[i][j]);
    }
    double* out = partial + task * kTile * kTile;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
#pragma unroll
      for (int j = 0; j < kEach; ++j)
        out[(threadIdx.x / kSide + i * kSide) * kTile + threadIdx.x % kSide + j * kSide] = total[i][j];
  }
}

// Entries of `out` [n][n] from their slices; both halves get the same.
__global__ void __launch_bounds__(kAdders)
    add_slices(const double* partial, int64_t n, int side, const GramCut cut, double* out, const int* only_if) {
  if (idle(only_if)) return;
  const int64_t count = cut.tiles * side * side;
  for (int64_t e = int64_t(blockIdx.x) * kAdders + threadIdx.x; e < count; e += int64_t(gridDim.x) * kAdders) {
    int64_t ti, tj;
    tile_at(e / (side * side), &ti, &tj);
    const int at = int(e % (side * side));
    const int64_t i = ti * side + at / side, j = tj * side + at % side;
    if (i >= n || j > i) continue;
    double sum = partial[e];
    for (int64_t s = 1; s < cut.slices; ++s) sum += partial[s * count + e];
    out[i * n + j] = out[j * n + i] = sum;
  }
}

// ---- centring: exact for a shift by the first sample that came before --------------------------------

__device__ double across(double v) {  // the same for all lanes
#pragma unroll
  for (int by = 16; by > 0; by /= 2) v += __shfl_xor_sync(0xffffffff, v, by);
  return v;
}

// The sum of values v[0..n) of a warp, in an order of its own.
__device__ double warp_sum(const double* v, int64_t n) {
  double sum = 0;
  for (int64_t i = threadIdx.x % 32; i < n; i += 32) sum += v[i];
  return across(sum);
}

// body(row) for all rows, a warp each
template <class Body>
__device__ void each_row(int64_t n, const Body& body) {
  const int64_t step = int64_t(gridDim.x) * (kAdders / 32);
  for (int64_t row = int64_t(blockIdx.x) * (kAdders / 32) + threadIdx.x / 32; row < n; row += step) body(row);
}

// *cancelled becomes 0.
__global__ void __launch_bounds__(kAdders)
    row_means(const double* k, int64_t n, double* mean, int* cancelled, const int* only_if) {
  if (idle(only_if)) return;
  if (cancelled && blockIdx.x == 0 && threadIdx.x == 0) *cancelled = 0;
  each_row(n, [&](int64_t row) {
    const double sum = warp_sum(k + row * n, n);
    if (threadIdx.x % 32 == 0) mean[row] = sum / double(n);
  });
}

// *cancelled becomes 1 where a sample keeps less than a quarter of its squared norm, or is not finite: where it keeps
// more, |x_i||x_j|, by which errors are bound, is at most 4 times what the centred features have.
__global__ void __launch_bounds__(kAdders)
    subtract_means(double* k, int64_t n, const double* mean, int* cancelled, const int* only_if) {
  if (idle(only_if)) return;
  const double all = warp_sum(mean, n) / double(n);
  each_row(n, [&](int64_t row) {
    for (int64_t j = threadIdx.x % 32; j < n; j += 32) {
      const double was = k[row * n + j], is = was - ((mean[row] + mean[j]) - all);
      k[row * n + j] = is;
      if (cancelled && j == row && !(was <= 4 * is)) *cancelled = 1;
    }
  });
}

// The rest of the way from slices to `out`. `means` [n] may lie where the slices do.
int finish(const double* partial, int64_t n, const GramCut& cut, bool center, double* means, double* out,
           int* cancelled, const int* only_if, void* stream) {
  const int64_t side = side_of(n), warps = kAdders / 32;
  const double *sums = out, *of_rows = means;
  int error = start(add_slices, ceil_div(cut.tiles * side * side, kAdders), kAdders, stream, partial, n, int(side), cut,
                    out, only_if);
  if (error || !center) return error;
  error = start(row_means, ceil_div(n, warps), kAdders, stream, sums, n, means, cancelled, only_if);
  if (error) return error;
  return start(subtract_means, ceil_div(n, warps), kAdders, stream, out, n, of_rows, cancelled, only_if);
}

template <class T>
int grams(const Samples<T>& s, int64_t slices, double* workspace, double* out, void* stream) {
  constexpr bool kHalves = sizeof(T) == 2;
  const int side = side_of(s.n);
  const GramCut cut = {tiles_of(s.n), slices, ceil_div(ceil_div(s.columns, kSum), slices) * kSum};
  int* cancelled = nullptr;
  if constexpr (kHalves) {
    if (s.shift) cancelled = reinterpret_cast<int*>(workspace + mpq_gram_workspace(s.n, slices) - 1);
    int error = half_products(s, side, cut, workspace, stream);
    if (!error) error = finish(workspace, s.n, cut, s.shift, workspace, out, cancelled, nullptr, stream);
    if (error || !s.shift) return error;
  }
  const int* only_if = cancelled;
  const auto kernel = side == 32 ? products<T, 32> : products<T, 64>;
  const int error = start(kernel, cut.tiles * slices, tile_threads(side), stream, s, cut, workspace, only_if);
  if (error) return error;
  return finish(workspace, s.n, cut, s.shift, workspace, out, nullptr, only_if, stream);
}

}  // namespace

int64_t mpq_gram_slices(int64_t n, int64_t columns) {
  return std::max<int64_t>(1, std::min(ceil_div(kBlocks, tiles_of(n)), ceil_div(columns, kSum)));
}

int64_t mpq_gram_workspace(int64_t n, int64_t slices) { return slices * tiles_of(n) * side_of(n) * side_of(n) + 1; }

int mpq_gram(const void* x, int type, int64_t n, int64_t columns, int64_t stride, bool center, int64_t slices,
             double* workspace, double* out, void* stream) {
  return with_type(type, [&](auto t) {
    using T = decltype(t);
    return grams<T>({static_cast<const T*>(x), n, columns, stride, center}, slices, workspace, out, stream);
  });
}
