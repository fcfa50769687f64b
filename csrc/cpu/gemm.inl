// Products of floats: a dequantized block of weights against columns of activations, or rows of activations against
// strips of decoded weights. Included by kernels.inl.

namespace {

// Where the k-th row of columns lies: in a panel, or in a plane. from: a later column. kWide: vectors of columns that a
// tile takes at the most. Compilers load those of a plane once, never as operands from memory: four would leave no
// register for one of the sums with AVX2.
struct PanelRows {
  static constexpr int kWide = kPanel / Isa::kWidth;
  const float* panel;
  const float* operator[](int64_t k) const { return panel + k * kPanel; }
  PanelRows from(int64_t j) const { return {panel + j}; }
};
struct PlaneRows {
  static constexpr int kWide = 2;
  const float* x;
  int64_t ld;
  const float* operator[](int64_t k) const { return x + k * ld; }
  PlaneRows from(int64_t j) const { return {x + j, ld}; }
};

// R weight rows by WIDE vectors of columns, all sums in registers.
template <int R, int WIDE, class Columns>
inline void gemm_tile(const float* a, int64_t lda, const Columns columns, int64_t depth, float* c, int64_t ldc,
                      bool first) {
  typename Isa::Vec acc[R][WIDE];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < WIDE; ++j) acc[r][j] = first ? Isa::zero() : Isa::load(c + r * ldc + j * Isa::kWidth);
  for (int64_t k = 0; k < depth; ++k) {
    const float* row = columns[k];
    typename Isa::Vec b[WIDE];
    for (int j = 0; j < WIDE; ++j) b[j] = Isa::load(row + j * Isa::kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename Isa::Vec s = Isa::set1(a[r * lda + k]);
      for (int j = 0; j < WIDE; ++j) acc[r][j] = Isa::fma(s, b[j], acc[r][j]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < WIDE; ++j) Isa::store(c + r * ldc + j * Isa::kWidth, acc[r][j]);
}

template <int R, int WIDE, class Columns>
void gemm_high(const float* a, int64_t lda, int64_t rows, const Columns& columns, int64_t depth, float* c, int64_t ldc,
               bool first) {
  if (rows == R)
    gemm_tile<R, WIDE>(a, lda, columns, depth, c, ldc, first);
  else if constexpr (R > 1)
    gemm_high<R - 1, WIDE>(a, lda, rows, columns, depth, c, ldc, first);
}

template <int WIDE, class Columns>
void gemm_wide(const float* a, int64_t lda, int64_t rows, const Columns& columns, int64_t wide, int64_t depth, float* c,
               int64_t ldc, bool first) {
  if constexpr (WIDE > 1)
    if (wide < WIDE) return gemm_wide<WIDE - 1>(a, lda, rows, columns, wide, depth, c, ldc, first);
  constexpr int kTile = Isa::tile_rows(WIDE);
  const int64_t tiles = mpq::ceil_div(rows, kTile);  // as even as can be: a tile of few rows is slow
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t n = rows * t / tiles, n1 = rows * (t + 1) / tiles;
    gemm_high<kTile, WIDE>(a + n * lda, lda, n1 - n, columns, depth, c + n * ldc, ldc, first);
  }
}

template <class Columns>
void gemm_columns(const float* a, int64_t lda, int64_t rows, const Columns& columns, int64_t count, int64_t depth,
                  float* c, int64_t ldc, bool first) {
  const int64_t vecs = mpq::ceil_div(smaller(count, kPanel), Isa::kWidth);
  for (int64_t v = 0; v < vecs; v += Columns::kWide) {
    const int64_t j = v * Isa::kWidth;
    gemm_wide<Columns::kWide>(a, lda, rows, columns.from(j), vecs - v, depth, c + j, ldc, first);
  }
}

void gemm(const float* a, int64_t lda, int64_t rows, const float* panel, int64_t columns, int64_t depth, float* c,
          int64_t ldc, bool first) {
  gemm_columns(a, lda, rows, PanelRows{panel}, columns, depth, c, ldc, first);
}

void gemm_at(const float* a, int64_t lda, int64_t rows, const float* x, int64_t ld, int64_t columns, int64_t depth,
             float* c, int64_t ldc, bool first) {
  gemm_columns(a, lda, rows, PlaneRows{x, ld}, columns, depth, c, ldc, first);
}

// R rows of activations by a strip's V vectors of columns, all sums in registers.
template <int R, int V>
void strip_tile(const float* const* x, int64_t from, const float* strip, int64_t depth, float* c, int64_t ldc,
                bool first) {
  typename Isa::Vec acc[R][V];
  MPQ_UNROLL for (int r = 0; r < R; ++r) MPQ_UNROLL for (int v = 0; v < V; ++v) acc[r][v] =
      first ? Isa::zero() : Isa::load(c + r * ldc + v * Isa::kWidth);
  const float* row[R];
  MPQ_UNROLL for (int r = 0; r < R; ++r) row[r] = x[r] + from;
  for (int64_t k = 0; k < depth; ++k, strip += kStrip) {
    typename Isa::Vec b[V];
    MPQ_UNROLL for (int v = 0; v < V; ++v) b[v] = Isa::load(strip + v * Isa::kWidth);
    MPQ_UNROLL for (int r = 0; r < R; ++r) {
      const typename Isa::Vec s = Isa::set1(row[r][k]);
      MPQ_UNROLL for (int v = 0; v < V; ++v) Isa::fma_to(acc[r][v], s, b[v]);
    }
  }
  MPQ_UNROLL for (int r = 0; r < R; ++r) MPQ_UNROLL for (int v = 0; v < V; ++v)
      Isa::store(c + r * ldc + v * Isa::kWidth, acc[r][v]);
}

template <int R, int V>
void strip_high(const float* const* x, int64_t from, int64_t rows, const float* strip, int64_t depth, float* c,
                int64_t ldc, bool first) {
  if (rows == R)
    strip_tile<R, V>(x, from, strip, depth, c, ldc, first);
  else if constexpr (R > 1)
    strip_high<R - 1, V>(x, from, rows, strip, depth, c, ldc, first);
}

template <int V>
void strip_tiles(const float* const* x, int64_t from, int64_t rows, const float* strip, int64_t depth, float* c,
                 int64_t ldc, bool first) {
  constexpr int kTile = Isa::tile_rows(V);
  const int64_t tiles = mpq::ceil_div(rows, kTile);  // as even as can be: a tile of few rows is slow
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t m = rows * t / tiles, m1 = rows * (t + 1) / tiles;
    strip_high<kTile, V>(x + m, from, m1 - m, strip, depth, c + m * ldc, ldc, first);
  }
}

void gemm_rows(const float* const* x, int64_t from, int64_t rows, const float* strip, int64_t columns, int64_t depth,
               float* c, int64_t ldc, bool first) {
  if (columns > Isa::kWidth)
    strip_tiles<2>(x, from, rows, strip, depth, c, ldc, first);
  else
    strip_tiles<1>(x, from, rows, strip, depth, c, ldc, first);
}

}  // namespace
