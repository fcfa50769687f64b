// Few rows of float activations, where a vector of codes is looked up in a register, or is a shift and a conversion
// away from numbers: a piece of a packed row is loaded as one word a lane, and the fields of all words are taken one
// after the other, so that no code has to change its lane. `words_order` puts activations into that order,
// [piece][field][lane]; k = lane * fields + field within a piece.
namespace {

template <int BITS>
constexpr int kWordFields = 32 / BITS;
template <int BITS>
constexpr int64_t kPiece = Isa::kWidth * kWordFields<BITS>;  // codes

constexpr int kSums = Isa::kWidth;  // in registers: half of them
constexpr int kWordRows = 4;        // of a weight, side by side

// Whether codes are looked up. Else they are `centred`, and a lane's products with a piece summed before they meet its
// scale; zeros have to be small for that, and activations: `words_fit`.
template <int BITS>
constexpr bool kLookedUp = Isa::template kTable<BITS> > kWordFields<BITS>;

constexpr float kMostZero = 255;
// The weight's, NaN where it has several.
inline float one_zero(const Packed& w) {
  float zero = w.zero_each ? NAN : mpq::mid_zero(w.bits);
  if (w.zeros && !w.zero_each) to_float(w.zeros, w.half ? Float::f16 : Float::f32, &zero, 1);
  return zero;
}

// Whether a table serves whole lanes of each piece, and which groups they are does not change from piece to piece.
template <int BITS>
bool in_words(const Packed& w) {
  if constexpr (Isa::template kTable<BITS> == 0) return false;
  if (!kLookedUp<BITS> && !(std::fabs(one_zero(w)) <= kMostZero)) return false;
  const int64_t group = w.groups == 1 ? kPiece<BITS> : w.group;  // one group: the last piece may pass its end
  return group % kPiece<BITS> == 0 || (kPiece<BITS> % group == 0 && group % Isa::template kTable<BITS> == 0);
}

// The group of each lane of a piece, counted from that of the first; in a short piece, the last, lanes past the last
// group count as its own.
template <int BITS>
struct WordLanes {
  typename Isa::Lanes whole, last;

  explicit WordLanes(const Packed& w) {
    const int64_t group = w.groups == 1 ? w.kp : w.group, g = w.kp / kPiece<BITS> * kPiece<BITS> / group;
    int32_t from[Isa::kWidth], to[Isa::kWidth];
    for (int64_t t = 0; t < Isa::kWidth; ++t) {
      from[t] = int32_t(smaller(t * kWordFields<BITS> / group, w.groups - 1));
      to[t] = int32_t(smaller(from[t], w.groups - 1 - smaller(w.groups - 1, g)));
    }
    whole = Isa::load_lanes(from), last = Isa::load_lanes(to);
  }
};

// Bytes that streams together ask for ahead: what memory takes its time for, yet a small part of the cache.
constexpr int64_t kInFlight = 8192;

// row_grid with room behind scales and zeros for `Isa::picked`, which reads a whole vector from any group on: `scratch`
// holds 2 * groups + kWidest floats.
inline RowGrid roomy_grid(const Packed& w, int64_t n, float* scratch) {
  const RowGrid stored = row_grid(w, n, scratch);
  if (w.half) return stored;
  std::memcpy(scratch, stored.scale, w.groups * sizeof(float));
  if (w.zero_each) std::memcpy(scratch + w.groups, stored.zero, w.groups * sizeof(float));
  return {scratch, w.zero_each ? scratch + w.groups : stored.zero, stored.step};
}

// Adds a row's products with a piece where codes are not looked up: a lane has one scale, which its sum is multiplied
// by.
template <int BITS, int C>
inline void words_step(typename Isa::Bytes words, typename Isa::Vec scale, typename Isa::Vec zero, const float* x,
                       int64_t ld, typename Isa::Vec (&acc)[C][1]) {
  constexpr int kChains = C == 1 ? 2 : 1;
  typename Isa::Vec part[C][kChains];
  MPQ_UNROLL for (int f = 0; f < kWordFields<BITS>; ++f) {
    const typename Isa::Vec v = Isa::template centred<BITS>(words, f, zero);
    MPQ_UNROLL for (int c = 0; c < C; ++c) {
      const typename Isa::Vec a = Isa::load(x + c * ld + f * Isa::kWidth);
      part[c][f % kChains] = f < kChains ? Isa::mul(v, a) : Isa::fma(v, a, part[c][f % kChains]);
    }
  }
  MPQ_UNROLL for (int c = 0; c < C; ++c) {
    if constexpr (kChains == 2) part[c][0] = Isa::add(part[c][0], part[c][1]);
    acc[c][0] = Isa::fma(scale, part[c][0], acc[c][0]);
  }
}

// y[m * ldy + r * apart] for R rows and C rows of activations; where there are few sums each is two chains, so that
// none waits for its last product.
template <int BITS, int R, int C>
inline void words_tile(const Packed& w, int64_t n, int64_t apart, const RowGrid* grid, const WordLanes<BITS>& lanes,
                       const float* x, int64_t ld, float* y, int64_t ldy) {
  constexpr int kBytes = 4 * Isa::kWidth, kChains = kLookedUp<BITS> && 2 * R * C <= kSums ? 2 : 1;
  const int64_t row_bytes = mpq::packed_bytes(w.kp, BITS), whole = row_bytes / kBytes;
  const int64_t pieces = mpq::ceil_div(row_bytes, kBytes), group = w.groups == 1 ? w.kp : w.group;
  typename Isa::Vec acc[R][C][kChains];
  for (auto& row : acc)
    for (auto& column : row)
      for (typename Isa::Vec& v : column) v = Isa::zero();
  const uint8_t* row[R];
  uint8_t last[R][kBytes];  // the piece that may be short, filled up
  for (int r = 0; r < R; ++r) {
    row[r] = w.row(n + r * apart);
    if (whole == pieces) continue;
    std::memset(last[r], 0, kBytes);
    std::memcpy(last[r], row[r] + whole * kBytes, row_bytes - whole * kBytes);
  }
  int64_t g = 0, left = group;
  for (int64_t i = 0; i < pieces; ++i, x += kPiece<BITS>) {
    typename Isa::Bytes words[R];
    typename Isa::Vec table[R];
    const typename Isa::Lanes lane = i < whole ? lanes.whole : lanes.last;
    for (int r = 0; r < R; ++r) {
      words[r] = Isa::load_bytes(i < whole ? row[r] + i * kBytes : last[r]);
      __builtin_prefetch(row[r] + i * kBytes + kInFlight / R);
      const typename Isa::Vec zero = w.zero_each ? Isa::picked(grid[r].zero + g, lane) : Isa::set1(*grid[r].zero);
      const typename Isa::Vec scale = Isa::picked(grid[r].scale + g, lane);
      if constexpr (kLookedUp<BITS>)
        table[r] = Isa::template table<BITS>(scale, zero);
      else
        words_step<BITS, C>(words[r], scale, zero, x, ld, acc[r]);
    }
    for (left -= kPiece<BITS>; left <= 0 && g + 1 < w.groups; left += group) ++g;
    if constexpr (kLookedUp<BITS>) MPQ_UNROLL for (int f = 0; f < kWordFields<BITS>; ++f) {
        typename Isa::Vec a[C];
        MPQ_UNROLL for (int c = 0; c < C; ++c) a[c] = Isa::load(x + c * ld + f * Isa::kWidth);
        MPQ_UNROLL for (int r = 0; r < R; ++r) {
          const typename Isa::Vec v = Isa::template looked_up<BITS>(table[r], words[r], f);
          MPQ_UNROLL for (int c = 0; c < C; ++c) acc[r][c][f % kChains] = Isa::fma(v, a[c], acc[r][c][f % kChains]);
        }
      }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      if constexpr (kChains == 2) acc[r][c][0] = Isa::add(acc[r][c][0], acc[r][c][1]);
      y[c * ldy + r * apart] = Isa::sum(acc[r][c][0]);
    }
}

// Rows that lie far apart go side by side, each from the first to the last of a part of all: memory, which sets the
// pace, is read as R streams. Returns where those rows begin that are left.
template <int BITS, int R, int C>
int64_t words_rows(const Packed& w, int64_t n, int64_t n1, const float* x, int64_t ld, float* y, int64_t ldy,
                   float* scratch) {
  const WordLanes<BITS> lanes(w);
  const int64_t apart = (n1 - n) / R;
  for (const int64_t end = n + apart; n < end; ++n, ++y) {
    RowGrid grid[R];
    for (int r = 0; r < R; ++r) grid[r] = roomy_grid(w, n + r * apart, scratch + r * (2 * w.groups + mpq::kWidest));
    words_tile<BITS, R, C>(w, n, apart, grid, lanes, x, ld, y, ldy);
  }
  return n + (R - 1) * apart;
}

template <int BITS, int C>
void words_any(const Packed& w, int64_t n0, int64_t n1, const float* x, int64_t ld, int64_t rows, float* y, int64_t ldy,
               float* scratch) {
  if constexpr (Isa::template kTable<BITS> > 0 && C > 0) {
    for (; rows >= C; rows -= C, x += C * ld, y += C * ldy) {
      const int64_t n = words_rows<BITS, kWordRows, C>(w, n0, n1, x, ld, y, ldy, scratch);
      words_rows<BITS, 1, C>(w, n, n1, x, ld, y + n - n0, ldy, scratch);
    }
    words_any<BITS, C - 1>(w, n0, n1, x, ld, rows, y, ldy, scratch);
  }
}

int64_t words_length(const Packed& w) {
  if (w.bits == 2 && in_words<2>(w)) return mpq::ceil_div(w.kp, kPiece<2>) * kPiece<2>;
  if (w.bits == 4 && in_words<4>(w)) return mpq::ceil_div(w.kp, kPiece<4>) * kPiece<4>;
  return 0;
}

// Sums of eight products with codes less zero, these below 2^9, must not pass the range of floats.
bool words_fit(const Packed& w, const float* x, int64_t count) {
  return (w.bits == 2 ? kLookedUp<2> : kLookedUp<4>) || largest(x, count) < 0x1p114f;
}

void words_order(const Packed& w, const float* x, float* out) {
  const int64_t fields = 32 / w.bits, piece = Isa::kWidth * fields;
  for (int64_t k = 0; k < w.kp; k += piece, out += piece) {
    const int64_t lanes = smaller(Isa::kWidth, (w.kp - k) / fields);  // a block of 32 codes is whole words
    if (lanes < Isa::kWidth) std::memset(out, 0, piece * sizeof(float));
    transpose(x + k, fields, lanes, fields, out, Isa::kWidth);
  }
}

void gemv_words(const Packed& w, int64_t n0, int64_t n1, const float* x, int64_t rows, float* y, int64_t ldy,
                float* scratch) {
  const int64_t ld = words_length(w);
  if (w.bits == 2) words_any<2, kSums / kWordRows>(w, n0, n1, x, ld, rows, y, ldy, scratch);
  constexpr int kMost = kLookedUp<4> ? kSums / kWordRows : 4;
  if (w.bits == 4) words_any<4, kMost>(w, n0, n1, x, ld, rows, y, ldy, scratch);
}

}  // namespace
