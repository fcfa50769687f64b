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

constexpr int64_t kBlocks = 512;             // that slices make of few tiles: four for each processor of a large GPU
constexpr int kAdders = 256;                 // threads of the smaller kernels
constexpr int64_t kRoom = int64_t(1) << 23;  // numbers of a workspace (64 MiB) that features of one launch may share

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

  __device__ void load(const Samples<T>& s, int row, int k) {
    const int at = k + threadIdx.x % 32;
    const float first = s.shift && at < s.columns ? to_float(s.x[at]) : 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int r = row + threadIdx.x / 32 + i * kWarps;
      v[i] = at < s.columns && r < s.n ? __fsub_rn(to_float(s.x[int64_t(r) * s.stride + at]), first) : 0;
    }
  }
  __device__ void store(float (*to)[kTileRow]) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) to[threadIdx.x / 32 + i * kWarps][threadIdx.x % 32] = v[i];
  }
};

// `only_if`, here and below: [features], nothing is to be done for one where that is 0; null: something always is.
__device__ bool idle(const int* only_if, int64_t feature) { return only_if && !only_if[feature]; }

// partial [slices][tiles][kTile][kTile]
template <class T, int kTile>
__global__ void __launch_bounds__(tile_threads(kTile), kTile == 64 && sizeof(T) == 4 ? 2 : 1)
    products(const __grid_constant__ Features features, double* partial, const int* only_if) {
  constexpr int kSide = kTile / kEach;
  __shared__ __align__(16) float a[kTile][kTileRow], b[kTile][kTileRow];
  const int64_t tasks = features.slices() * features.tiles;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t slice = task / features.tiles;
    const int feature = features.of_slice(slice);
    if (idle(only_if, feature)) continue;
    const Samples<T> s(features, feature, slice);
    int ti, tj;
    tile_at(int(task - slice * features.tiles), &ti, &tj);
    const float(*right)[kTileRow] = ti == tj ? a : b;
    double total[kEach][kEach] = {};
    Chunk<T, kTile> rows, columns;
    auto load = [&](int k) {
      rows.load(s, ti * kTile, k);
      if (ti != tj) columns.load(s, tj * kTile, k);
    };
    load(0);
    for (int k0 = 0; k0 < s.columns; k0 += kSum) {
      float sum[kEach][kEach] = {};
#pragma unroll 1
      for (int k = k0; k < k0 + kSum && k < s.columns; k += kDepth) {
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

// Entries of `out` [features][n][n] from their slices; both halves get the same.
__global__ void __launch_bounds__(kAdders) add_slices(const __grid_constant__ Features features, const double* partial,
                                                      int side, double* out, const int* only_if) {
  const int64_t n = features.n, count = features.tiles * side * side, all = features.count * count;
  for (int64_t e = int64_t(blockIdx.x) * kAdders + threadIdx.x; e < all; e += int64_t(gridDim.x) * kAdders) {
    const int64_t f = e / count;
    int ti, tj;
    tile_at(int(e % count / (side * side)), &ti, &tj);
    const int at = int(e % (side * side));
    const int64_t i = ti * side + at / side, j = tj * side + at % side;
    if (i >= n || j > i || idle(only_if, f)) continue;
    const double* from = partial + features.list[f].first * count + e % count;
    double sum = *from;
    for (int64_t s = 1; s < features.list[f].slices; ++s) sum += from[s * count];
    out[(f * n + i) * n + j] = out[(f * n + j) * n + i] = sum;
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

// Of rows k [rows][n]; cancelled [rows / n] becomes 0.
__global__ void __launch_bounds__(kAdders)
    row_means(const double* k, int64_t rows, int64_t n, double* mean, int* cancelled, const int* only_if) {
  each_row(rows, [&](int64_t row) {
    if (idle(only_if, row / n)) return;
    const double sum = warp_sum(k + row * n, n);
    if (threadIdx.x % 32 == 0) mean[row] = sum / double(n);
    if (cancelled && threadIdx.x % 32 == 0 && row % n == 0) cancelled[row / n] = 0;
  });
}

// A feature's `cancelled` becomes 1 where a sample keeps less than a quarter of its squared norm, or is not finite:
// where it keeps more, |x_i||x_j|, by which errors are bound, is at most 4 times what the centred features have.
__global__ void __launch_bounds__(kAdders)
    subtract_means(double* k, int64_t rows, int64_t n, const double* mean, int* cancelled, const int* only_if) {
  each_row(rows, [&](int64_t row) {
    const int64_t f = row / n, i = row % n;
    if (idle(only_if, f)) return;
    const double *means = mean + f * n, all = warp_sum(means, n) / double(n);
    for (int64_t j = threadIdx.x % 32; j < n; j += 32) {
      const double was = k[row * n + j], is = was - ((means[i] + means[j]) - all);
      k[row * n + j] = is;
      if (cancelled && i == j && !(was <= 4 * is)) cancelled[f] = 1;
    }
  });
}

// The rest of the way from slices to `out`. `means` [features][n] may lie where the slices do.
int finish(const Features& features, const double* partial, double* means, double* out, int* cancelled,
           const int* only_if, void* stream) {
  const int64_t n = features.n, side = side_of(n), entries = features.count * features.tiles * side * side;
  const int64_t rows = features.count * n, blocks = ceil_div(rows, kAdders / 32);
  const double *sums = out, *of_rows = means;
  int error =
      start(add_slices, ceil_div(entries, kAdders), kAdders, stream, features, partial, int(side), out, only_if);
  if (error || !features.shift) return error;
  error = start(row_means, blocks, kAdders, stream, sums, rows, n, means, cancelled, only_if);
  if (error) return error;
  return start(subtract_means, blocks, kAdders, stream, out, rows, n, of_rows, cancelled, only_if);
}

// `cancelled` [features] and the workspace lie apart.
template <class T>
int grams(const Features& features, double* workspace, int* cancelled, double* out, void* stream) {
  const int side = side_of(features.n);
  const int* only_if = nullptr;
  if constexpr (sizeof(T) == 2) {
    int error = half_products<T>(features, side, workspace, stream);
    if (!error) error = finish(features, workspace, workspace, out, cancelled, nullptr, stream);
    if (error || !features.shift) return error;
    only_if = cancelled;
  }
  const auto kernel = side == 32 ? products<T, 32> : products<T, 64>;
  const int64_t tasks = features.slices() * features.tiles;
  const int error = start(kernel, tasks, tile_threads(side), stream, features, workspace, only_if);
  if (error) return error;
  return finish(features, workspace, workspace, out, nullptr, only_if, stream);
}

// How a feature's columns are cut depends on its shape alone, not on what it shares a launch with.
int64_t slices_of(int64_t n, int64_t columns) {
  return std::max<int64_t>(1, std::min(ceil_div(kBlocks, tiles_of(n)), ceil_div(columns, kSum)));
}
int64_t numbers_of(int64_t n) { return tiles_of(n) * side_of(n) * side_of(n); }  // of a slice

// As many of the features as one launch takes, one at least.
Features together(const GramFeature* list, int64_t count, int64_t n, bool shift, int64_t slices) {
  Features group = {};
  group.n = n, group.tiles = tiles_of(n), group.shift = shift;
  int64_t first = 0;
  for (; group.count < std::min<int64_t>(count, kFeatures); ++group.count) {
    const GramFeature& f = list[group.count];
    const int64_t cut = slices ? slices : slices_of(n, f.columns);
    if (group.count && (first + cut) * numbers_of(n) > kRoom) break;
    group.list[group.count] = {f.x, f.columns, f.stride, cut, ceil_div(ceil_div(f.columns, kSum), cut) * kSum, first};
    first += cut;
  }
  return group;
}

}  // namespace

int64_t mpq_gram_workspace(const GramFeature* features, int64_t count, int64_t n, int64_t slices) {
  int64_t most = 0, done = 0;
  while (done < count) {
    const Features group = together(features + done, count - done, n, false, slices);
    most = std::max(most, group.slices() * numbers_of(n));
    done += group.count;
  }
  return most + kFeatures / 2;
}

int mpq_gram(const GramFeature* features, int64_t count, int type, int64_t n, bool center, int64_t slices,
             double* workspace, double* out, void* stream) {
  auto* cancelled = reinterpret_cast<int*>(workspace);
  double* partial = workspace + kFeatures / 2;
  for (int64_t done = 0; done < count;) {
    const Features group = together(features + done, count - done, n, center, slices);
    double* to = out + done * n * n;
    const int error =
        with_type(type, [&](auto t) { return grams<decltype(t)>(group, partial, cancelled, to, stream); });
    if (error) return error;
    done += group.count;
  }
  return cudaSuccess;
}
