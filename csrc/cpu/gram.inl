// Gram matrices, written over `Isa` like kernels.inl, which includes this.
namespace {

// Rows meet four columns at a time; a group of rows and the columns stay in the level 1 cache.
constexpr int kGramColumns = 4;
constexpr int64_t kGramGroup = 8;

// R rows against 4: vectors run along the depth, so features need no transposition, and each vector loaded
// serves 4 (or R) products. A row of the next chunk is fetched from memory meanwhile.
template <int R>
inline void gram_tile(const float* rows, const float* columns, int64_t ld, int64_t depth, double* sums, int64_t n,
                      const char* next, int size) {
  typename Isa::Vec acc[R][kGramColumns];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < kGramColumns; ++c) acc[r][c] = Isa::zero();
  for (int64_t k = 0; k < depth; k += Isa::kWidth) {
    __builtin_prefetch(next + k * size, 0, 2);
    typename Isa::Vec a[R];
    for (int r = 0; r < R; ++r) a[r] = Isa::load(rows + r * ld + k);
    for (int c = 0; c < kGramColumns; ++c) {
      const typename Isa::Vec b = Isa::load(columns + c * ld + k);
      for (int r = 0; r < R; ++r) acc[r][c] = Isa::fma(a[r], b, acc[r][c]);
    }
  }
  for (int r = 0; r < R; ++r) {
    float four[kGramColumns];
    Isa::sum4(acc[r], four);
    for (int c = 0; c < kGramColumns; ++c) sums[r * n + c] += four[c];
  }
}

void gram(const float* x, int64_t n, int64_t ld, int64_t depth, double* sums, const mpq::Rows& next) {
  constexpr int kRows = Isa::kGramRows;
  int64_t fetched = 0;
  for (int64_t g = 0; g < n; g += kGramGroup)
    for (int64_t j = 0; j < smaller(n, g + kGramGroup); j += kGramColumns)
      for (int64_t i = g > j ? g : j; i < smaller(n, g + kGramGroup); i += kRows) {
        const char* row = next.row(fetched < next.count ? fetched++ : 0);
        gram_tile<kRows>(x + i * ld, x + j * ld, ld, depth, sums + i * n + j, n, row, next.size());
      }
}

void load_rows(const mpq::Rows& x, int64_t columns, bool shift, float* out, int64_t ld, float* first) {
  const int64_t width = mpq::ceil_div(columns, mpq::kWidest) * mpq::kWidest;
  to_float(x.row(0), x.type, first, columns);
  for (int64_t i = 0; i < x.count; ++i, out += ld) {
    const char* ahead = x.row(i + 1 < x.count ? i + 1 : i);
    for (int64_t b = 0; b < columns * x.size(); b += 64) __builtin_prefetch(ahead + b);
    to_float(x.row(i), x.type, out, columns);
    if (shift)
      for (int64_t k = 0; k < columns; ++k) out[k] -= first[k];
    for (int64_t k = columns; k < width; ++k) out[k] = 0;
  }
}

}  // namespace
