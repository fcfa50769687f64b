// gram and orthogonality: features are read once, in chunks that stay in the level 2 cache.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "buffer.h"
#include "drivers.h"
#include "parallel.h"

namespace mpq {
namespace {

constexpr int64_t kChunk = 512;                   // words; longer fp32 sums would lose accuracy, shorter ones time
constexpr int64_t kRow = kChunk + 16;             // their distance: no two rows a multiple of 4 KiB apart
constexpr int64_t kSlices = 16;                   // parts of a layer that threads share out ...
constexpr int64_t kSliceSums = int64_t(1) << 22;  // ... and the sums that all of them hold, at most (fp64)
constexpr int64_t kGrain = 1 << 14;               // products below which a second thread costs more than it saves

Rows from_column(const Rows& x, int64_t column) { return {x.row(0) + column * x.size(), x.type, x.count, x.stride}; }

// What the tiles multiply: features as fp32, those less the first sample's, or bf16 as it is, two in a word.
enum class Words { plain, shifted, pairs };

constexpr int64_t chunk_columns(Words words) { return words == Words::pairs ? 2 * kChunk : kChunk; }

void copy_rows(const Rows& x, int64_t columns, float* out) {
  for (int64_t i = 0; i < x.count; ++i, out += kRow) {
    std::memcpy(out, x.row(i), columns * x.size());
    std::memset(reinterpret_cast<char*>(out) + columns * x.size(), 0, (-columns & (2 * kWidest - 1)) * x.size());
  }
}

// The sums of columns k0..k1, in tiles as kernels().gram has them.
void add_slice(const Rows& x, int64_t k0, int64_t k1, Words words, int64_t n, double* sums) {
  const int64_t chunk = chunk_columns(words), per_word = chunk / kChunk;
  const auto multiply = words == Words::pairs ? kernels().gram_pairs : kernels().gram;
  Buffer<float> rows(n * kRow), first(kChunk);
  std::memset(rows + x.count * kRow, 0, (n - x.count) * kRow * sizeof(float));
  for (int64_t k = k0; k < k1; k += chunk) {
    const int64_t columns = std::min(chunk, k1 - k), depth = ceil_div(columns, kWidest * per_word) * kWidest;
    if (words == Words::pairs)
      copy_rows(from_column(x, k), columns, rows);
    else
      kernels().load_rows(from_column(x, k), columns, words == Words::shifted, rows, kRow, first);
    multiply(rows, n, kRow, depth, sums, from_column(x, k + chunk < k1 ? k + chunk : k));
  }
}

// Takes the mean of each row and column away: exact for the shift by the first sample that load_rows made.
void double_centre(double* k, int64_t n) {
  Buffer<double> mean(n);
  double all = 0;
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += k[i * n + j];
    mean[i] = sum / double(n);
    all += mean[i];
  }
  all /= double(n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) k[i * n + j] -= (mean[i] + mean[j]) - all;
}

// Zero diagonal and zero row sums: inner products of such matrices are unbiased (Song et al. 2012). What is left
// below fp32's rounding of the diagonal is noise, and becomes 0.
void u_centre(double* k, int64_t n) {
  Buffer<double> part(n);
  double all = 0, noise = 0, left = 0;
  bool all_finite = true;
  for (int64_t i = 0; i < n; ++i) noise = std::max(noise, k[i * n + i] * 0x1p-24);
  for (int64_t i = 0; i < n; ++i) {
    k[i * n + i] = 0;
    double sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += k[i * n + j];
    part[i] = sum / double(n - 2);
    all += sum;
  }
  all /= double((n - 1) * (n - 2));
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j)
      if (i != j) {
        const double v = k[i * n + j] -= (part[i] + part[j]) - all;
        left = std::max(left, std::abs(v));
        all_finite &= std::isfinite(v);  // NaN is above nothing, and has to show
      }
  if (left <= noise && all_finite) std::fill(k, k + n * n, 0.0);
}

double dot(const double* a, const double* b, int64_t count) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int j = 0; j < 8; ++j) sums[j] += a[i + j] * b[i + j];
  for (; i < count; ++i) sums[0] += a[i] * b[i];
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

// The columns are cut into slices whose number depends on shapes alone, and their sums are added in order: the
// result never depends on the number of threads.
void sum_products(const Rows& x, int64_t columns, Words words, double* out) {
  const int64_t tile = kernels().gram_tile, n = ceil_div(x.count, tile) * tile, chunk = chunk_columns(words),
                chunks = ceil_div(columns, chunk), size = gram_tile_index(n / tile, 0) * kernels().gram_sums;
  const int64_t slices = std::min({chunks, kSlices, std::max<int64_t>(1, kSliceSums / size)});
  Buffer<double> sums(slices * size);
  std::memset(sums, 0, slices * size * sizeof(double));
  parallel_for(slices, ceil_div(kGrain, size * ceil_div(columns, slices)), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s)
      add_slice(x, s * chunks / slices * chunk, std::min(columns, (s + 1) * chunks / slices * chunk), words, n,
                sums + s * size);
  });
  for (int64_t s = 1; s < slices; ++s)
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[s * size + i];
  for (int64_t i = 0; i < x.count; ++i)
    for (int64_t j = 0; j <= i; ++j)
      out[i * x.count + j] = out[j * x.count + i] =
          sums[gram_tile_index(i / tile, j / tile) * kernels().gram_sums + i % tile * tile + j % tile];
}

// Products of bf16 as it is, centred in fp64. True where centring left every sample a quarter of its squared norm or
// more: |x_i||x_j|, which bounds the error of their product, is then at most 4 times what the centred features have.
// (Shifted by a sample of as much spread, it is 2 times.) NaN and infinity are false.
bool centred_pairs(const Rows& x, int64_t columns, double* out) {
  Buffer<double> norm(x.count);
  sum_products(x, columns, Words::pairs, out);
  for (int64_t i = 0; i < x.count; ++i) norm[i] = out[i * x.count + i];
  double_centre(out, x.count);
  for (int64_t i = 0; i < x.count; ++i)
    if (!(norm[i] <= 4 * out[i * x.count + i])) return false;
  return true;
}

}  // namespace

void gram(const Rows& x, int64_t columns, bool center, double* out) {
  if (columns == 0) return std::fill(out, out + x.count * x.count, 0.0);
  const bool pairs = x.type == Float::bf16 && kernels().gram_pairs && multiplies_bf16();
  if (!center) return sum_products(x, columns, pairs ? Words::pairs : Words::plain, out);
  // A chunk tells in most cases whether all columns are worth trying.
  if (pairs && centred_pairs(x, std::min(columns, 2 * kChunk), out) && centred_pairs(x, columns, out)) return;
  sum_products(x, columns, Words::shifted, out);
  double_centre(out, x.count);
}

void orthogonality(double* grams, int64_t count, int64_t n, bool debiased, double* out) {
  const int64_t size = n * n;
  if (debiased)
    for (int64_t i = 0; i < count; ++i) u_centre(grams + i * size, n);
  parallel_for(count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j <= i; ++j) out[i * count + j] = dot(grams + i * size, grams + j * size, size);
  });
  Buffer<double> norm(count);
  for (int64_t i = 0; i < count; ++i) norm[i] = std::sqrt(out[i * count + i]);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      const double both = norm[i] * norm[j];
      out[i * count + j] = out[j * count + i] = both == 0 ? 0 : out[i * count + j] / both;
    }
    out[i * count + i] = std::isfinite(norm[i]) ? 1 : std::nan("");
  }
}

}  // namespace mpq
