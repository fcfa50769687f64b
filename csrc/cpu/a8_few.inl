// Few rows of 8-bit activations: codes go from memory to registers to products, a chunk of 16 packed words of a row
// at a time. Lanes are words, so a lane lies in one group, and a row is summed across lanes only once, at its end.
namespace {

using mpq::Chunks;
using mpq::Few8;

constexpr int kParts = mpq::kWidest / Isa::kWidth;  // vectors of a chunk

template <int BITS>
void spread(const Chunks& chunks, int8_t* q, const float* scales, int8_t* out, float* lanes) {
  constexpr int kWords = mpq::kWidest;
  put_in_order<BITS>(q, chunks.kp);
  const int64_t words = chunks.kp / chunks.word;
  std::memset(out + (chunks.count - 1) * chunks.codes, 0, chunks.codes);
  for (int64_t t = 0; t < words; ++t)
    for (int i = 0; i < kFields<BITS>; ++i)
      std::memcpy(out + t / kWords * chunks.codes + (i * kWords + t % kWords) * 4, q + (t * kFields<BITS> + i) * 4, 4);
  uint8_t ones[4 * kWords];
  std::memset(ones, 1, sizeof ones);
  for (int64_t s = 0; s < chunks.stretches; ++s, lanes += 2 * kWords) {
    for (int64_t t = 0; t < kWords; ++t) lanes[t] = scales[chunks.group_of(s, t)];
    for (int p = 0; p < kParts; ++p) {
      typename Isa::Ints sum = Isa::no_ints();
      for (int64_t b = chunks.begin(s) * kFields<BITS>; b < chunks.end(s) * kFields<BITS>; ++b)
        sum =
            Isa::template dot<8>(sum, Isa::load_bytes(ones), Isa::load_bytes(out + (b * kParts + p) * 4 * Isa::kWidth));
      Isa::store(lanes + kWords + p * Isa::kWidth, Isa::to_floats(sum));
    }
  }
}

void spread_a8(const Packed& w, int8_t* q, const float* scales, int8_t* out, float* lanes) {
  const Chunks chunks(w);
  if (w.bits == 2) spread<2>(chunks, q, scales, out, lanes);
  if (w.bits == 4) spread<4>(chunks, q, scales, out, lanes);
  if (w.bits == 8) spread<8>(chunks, q, scales, out, lanes);
}

// sum + the products of a vector of packed words
template <int BITS>
inline typename Isa::Ints few_dots(typename Isa::Ints sum, const typename Isa::Bytes* codes,
                                   const typename Isa::Bytes* x) {
  typename Isa::Ints part = Isa::template kNarrow<BITS> ? Isa::no_ints() : sum;
  for (int f = 0; f < kFields<BITS>; ++f) part = Isa::template dot<BITS>(part, codes[f], x[f]);
  if constexpr (Isa::template kNarrow<BITS>) return Isa::widened(sum, part);
  return part;
}

// R weight rows, `apart` from each other, by C rows of activations.
template <int BITS, int R, int C>
inline void few_tile(const Packed& w, const Chunks& chunks, int64_t n, int64_t apart, const RowGrid* grid,
                     const Few8& a, float* y, int64_t ldy) {
  constexpr int kBytes = 4 * Isa::kWidth, kChunk = kBytes * kParts;
  const int64_t row_bytes = mpq::packed_bytes(w.kp, BITS), whole = row_bytes / kChunk;
  typename Isa::Vec result[R][C][kParts];
  for (auto& row : result)
    for (auto& column : row)
      for (typename Isa::Vec& v : column) v = Isa::zero();
  const uint8_t* row[R];
  uint8_t last[R][kChunk];  // the chunk that may be short, filled up
  for (int r = 0; r < R; ++r) {
    row[r] = w.row(n + r * apart);
    if (whole < chunks.count) {
      std::memset(last[r], 0, kChunk);
      std::memcpy(last[r], row[r] + whole * kChunk, row_bytes - whole * kChunk);
    }
  }
  for (int64_t s = 0; s < chunks.stretches; ++s) {
    for (int p = 0; p < kParts; ++p) {
      typename Isa::Ints sum[R][C];
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sum[r][c] = Isa::no_ints();
      for (int64_t i = chunks.begin(s); i < chunks.end(s); ++i) {
        typename Isa::Bytes x[C][kFields<BITS>];
        for (int c = 0; c < C; ++c)
          for (int f = 0; f < kFields<BITS>; ++f)
            x[c][f] = Isa::load_bytes(a.q + c * a.ld + ((i * kFields<BITS> + f) * kParts + p) * kBytes);
        for (int r = 0; r < R; ++r) {
          const uint8_t* from = i < whole ? row[r] + i * kChunk : last[r];
          __builtin_prefetch(row[r] + i * kChunk + kInFlight / R);
          typename Isa::Bytes codes[kFields<BITS>];
          for (int f = 0; f < kFields<BITS>; ++f)
            codes[f] = Isa::template field<BITS>(Isa::load_bytes(from + p * kBytes), f);
          for (int c = 0; c < C; ++c) sum[r][c] = few_dots<BITS>(sum[r][c], codes, x[c]);
        }
      }
      const typename Isa::Lanes lane = Isa::load_lanes(a.group + s * mpq::kWidest + p * Isa::kWidth);
      const int64_t g = chunks.group_of(s, 0);
      for (int r = 0; r < R; ++r) {
        const typename Isa::Vec scale = Isa::picked(grid[r].scale + g, lane);
        const typename Isa::Vec zero = w.zero_each ? Isa::picked(grid[r].zero + g, lane) : Isa::set1(*grid[r].zero);
        const typename Isa::Vec minus = Isa::sub(Isa::zero(), zero);
        for (int c = 0; c < C; ++c) {
          const float* lanes = a.lanes + (c * chunks.stretches + s) * 2 * mpq::kWidest + p * Isa::kWidth;
          const typename Isa::Vec centred =
              Isa::fused(minus, Isa::load(lanes + mpq::kWidest), Isa::to_floats(sum[r][c]));
          result[r][c][p] = Isa::fused(Isa::mul(centred, scale), Isa::load(lanes), result[r][c][p]);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      for (int p = 1; p < kParts; ++p) result[r][c][0] = Isa::add(result[r][c][0], result[r][c][p]);
      y[c * ldy + r * apart] = Isa::sum(result[r][c][0]);
    }
}

template <int BITS, int R, int C>
int64_t few_rows(const Packed& w, int64_t n, int64_t n1, const Few8& a, float* y, int64_t ldy, float* scratch) {
  const Chunks chunks(w);
  return in_streams<R>(w, n, n1, y, scratch, [&](int64_t row, int64_t apart, const RowGrid* grid, float* to) {
    few_tile<BITS, R, C>(w, chunks, row, apart, grid, a, to, ldy);
  });
}

template <int BITS, int C>
void few_bits(const Packed& w, int64_t n0, int64_t n1, const Few8& a, float* y, int64_t ldy, float* scratch) {
  constexpr int kRows = smaller(Isa::kStreams, BITS == 8 ? 2 : 4);  // streams: as many as hide the work on codes
  const int64_t n = few_rows<BITS, kRows, C>(w, n0, n1, a, y, ldy, scratch);
  if constexpr (kRows > 1) few_rows<BITS, 1, C>(w, n, n1, a, y + n - n0, ldy, scratch);
}

template <int BITS>
void few_any(const Packed& w, int64_t n0, int64_t n1, const Few8& a, int64_t rows, float* y, int64_t ldy,
             float* scratch) {
  if (rows == 1) few_bits<BITS, 1>(w, n0, n1, a, y, ldy, scratch);
  if (rows == 2) few_bits<BITS, 2>(w, n0, n1, a, y, ldy, scratch);
}

void gemv_a8(const Packed& w, int64_t n0, int64_t n1, const Few8& a, int64_t rows, float* y, int64_t ldy,
             float* scratch) {
  if (w.bits == 2) few_any<2>(w, n0, n1, a, rows, y, ldy, scratch);
  if (w.bits == 4) few_any<4>(w, n0, n1, a, rows, y, ldy, scratch);
  if (w.bits == 8) few_any<8>(w, n0, n1, a, rows, y, ldy, scratch);
}

}  // namespace
