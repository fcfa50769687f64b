// 8-bit activations: integer sums over spans of k, exact, joined in fp32. Written over `Isa` like kernels.inl, which
// includes this. Results are the same on every instruction set, to the bit: one order, one rounding for each step.
namespace {

using mpq::Acts8;
using mpq::Panel8;
using mpq::Spans;

// C rows of activations by V vectors of weight rows, all sums in registers. Where these are few, quads of codes
// take turns between several sums, so that none waits for its last product.
template <int C, int V>
struct Sums8 {
  typename Isa::Ints v[C][V];
};

template <int BITS>
constexpr int turns(int sums) {
  constexpr int kMost = kTileVecs * Isa::template act_rows<BITS>();
  return smaller(Isa::kTurns, 4 * sums <= kMost ? 4 : 2 * sums <= kMost ? 2 : 1);
}

// Where in rows of activations products go on: in row 0, and bytes of its piece that are left there.
struct Place {
  const int8_t* q;
  int64_t left;
  const int64_t* jump;
  const Asked asked;
  const int32_t* starts;    // of row 0, where there are any
  const int64_t* start_at;  // of the next block
};

// Over k codes, above 0 and a multiple of 16. Of each 4 rows the first one's address is kept: with one for each row,
// addresses would go through vector registers, and wait there for the products.
template <int BITS, int C, int V>
inline Sums8<C, V> a8_steps(const uint8_t* codes, const Acts8& a, Place& at, int64_t k) {
  constexpr int kFours = (C + 3) / 4, kTurns = turns<BITS>(C * V);
  // A sum whose codes are all of one field can leave that where it is in its byte, and be shifted once in the end:
  // below 2^24 as they are (Spans), sums stay below 2^30.
  constexpr int kPlaces = smaller(smaller(kTurns, kFields<BITS>), Isa::kPlaces);
  // Quads of codes in a step; more of them where all registers are taken is faster.
  constexpr int kLeast = C == Isa::kFullRows || Isa::kTurns == 1 ? 4 : kFields<BITS>;
  constexpr int kQuads = kTurns > kLeast ? kTurns : kLeast;
  constexpr int64_t kBytes = kQuads / kFields<BITS> * 4 * kPanel;  // of packed codes
  const int64_t ld = a.ld;
  const int8_t* four[kFours];
  MPQ_UNROLL for (int j = 0; j < kFours; ++j) four[j] = at.q + 4 * j * ld;
  Sums8<C, V> sums[kTurns];
  MPQ_UNROLL for (int t = 0; t < kTurns; ++t) MPQ_UNROLL for (int c = 0; c < C; ++c)
      MPQ_UNROLL for (int v = 0; v < V; ++v) sums[t]
          .v[c][v] = Isa::no_ints();
  int64_t left = at.left;
  const uint8_t* end = codes + mpq::packed_bytes(k, BITS) * kPanel;
  do {
    at.asked.template fetch<BITS, V, kBytes>(codes);
    MPQ_UNROLL for (int i = 0; i < kQuads; ++i) {
      const uint8_t* word = codes + i / kFields<BITS> * 4 * kPanel;
      Sums8<C, V>& sum = sums[i % kTurns];
      typename Isa::Factors b[V];
      MPQ_UNROLL for (int v = 0; v < V; ++v) b[v] = Isa::template factors<BITS>(
          Isa::template field<BITS>(Isa::load_bytes(word + 4 * Isa::kWidth * v), i % kFields<BITS>, i % kPlaces));
      MPQ_UNROLL for (int c = 0; c < C; ++c) {
        const typename Isa::Bytes x = Isa::word(four[c / 4] + c % 4 * ld + 4 * i);
        MPQ_UNROLL for (int v = 0; v < V; ++v) sum.v[c][v] = Isa::template dot<BITS>(sum.v[c][v], b[v], x);
      }
    }
    MPQ_UNROLL for (int j = 0; j < kFours; ++j) four[j] += 4 * kQuads;
    left -= 4 * kQuads;
    if (__builtin_expect(left == 0, 0)) {
      const int64_t jump = *at.jump++;
      MPQ_UNROLL for (int j = 0; j < kFours; ++j) four[j] += jump;
      left = a.piece;
    }
    codes += kBytes;
  } while (codes < end);
  at.q = four[0], at.left = left;
  MPQ_UNROLL for (int t = 1; t < kTurns; ++t) MPQ_UNROLL for (int c = 0; c < C; ++c)
      MPQ_UNROLL for (int v = 0; v < V; ++v) sums[0]
          .v[c][v] = Isa::template added<BITS>(sums[0].v[c][v], Isa::shifted(sums[t].v[c][v], BITS * (t % kPlaces)));
  return sums[0];
}

// The first and last of some bytes that instructions written out will read, of which AddressSanitizer sees nothing.
inline void read_ends([[maybe_unused]] const void* p, [[maybe_unused]] int64_t count) {
#ifdef __SANITIZE_ADDRESS__
  const volatile uint8_t* bytes = static_cast<const uint8_t*>(p);
  (void)bytes[0], (void)bytes[count - 1];
#endif
}

// The same where `block` does it: sums of so many products as 16 bits are enough for, then of these. k is above 0.
template <int BITS, int C, int V, bool STARTED>
inline Sums8<C, V> a8_blocks(const uint8_t* codes, const Acts8& a, Place& at, int64_t k) {
  constexpr int64_t kMost = STARTED ? mpq::kStartCodes : Isa::template kNarrow<BITS>;
  Sums8<C, V> sum;
  for (bool first = true; k > 0; first = false) {
    const int64_t count = smaller(smaller(kMost, k), at.left);
    const int64_t bytes = mpq::packed_bytes(count, BITS) * kPanel;
    read_ends(codes, bytes - 4 * kPanel + 4 * V * Isa::kWidth);
    for (int c = 0; c < C; ++c) read_ends(at.q + c * a.ld, count);
    const int32_t* start = STARTED ? at.starts + *at.start_at++ : nullptr;
    if (STARTED) read_ends(start, C * sizeof(int32_t));
    Isa::template block<BITS, C, STARTED>(codes, at.asked.template soon<BITS, V>(codes), at.q, a.ld, start, count,
                                          first, &sum);
    codes += bytes, k -= count, at.q += count, at.left -= count;
    if (at.left == 0) at.q += *at.jump++, at.left = a.piece;
  }
  return sum;
}

// Of the codes of one span; where STARTED each less 2^(BITS - 1).
template <int BITS, int C, int V, bool STARTED>
inline Sums8<C, V> a8_span(const uint8_t* codes, const Acts8& a, Place& at, int64_t k) {
  constexpr int64_t kNarrow = Isa::template kNarrow<BITS>;
  if constexpr (kNarrow == 0) {
    return a8_steps<BITS, C, V>(codes, a, at, k);
  } else if constexpr (Isa::template kBlocks<BITS> && V == 2) {
    return a8_blocks<BITS, C, V, STARTED>(codes, a, at, k);
  } else {
    Sums8<C, V> sum = {};
    for (int64_t i = 0; i < k; i += kNarrow) {
      const uint8_t* from = codes + mpq::packed_bytes(i, BITS) * kPanel;
      const Sums8<C, V> part = a8_steps<BITS, C, V>(from, a, at, smaller(kNarrow, k - i));
      for (int c = 0; c < C; ++c)
        for (int v = 0; v < V; ++v) sum.v[c][v] = Isa::widened(sum.v[c][v], part.v[c][v]);
    }
    return sum;
  }
}

// A tile's scales, zeros and sums where products have got to.
struct Grids8 {
  const float *scales, *zeros, *act_scales, *act_sums;
};

// take(c, v, value, x_scale) for each sum of a span: value * x_scale is what it counts. Inlined in any case: a call
// would pass its many arguments through memory.
template <int BITS, int C, int V, bool STARTED, class Take>
[[gnu::always_inline]] inline void a8_scaled(const Sums8<C, V>& sum, const Grids8& grid, int64_t groups, int64_t spans,
                                             const Take& take) {
  typename Isa::Vec scale[V], minus[V];
  for (int v = 0; v < V; ++v) {
    scale[v] = Isa::load(grid.scales + v * Isa::kWidth);
    minus[v] = Isa::sub(Isa::zero(), Isa::load(grid.zeros + v * Isa::kWidth));
  }
  MPQ_UNROLL for (int c = 0; c < C; ++c) {
    const typename Isa::Vec x_sum = Isa::set1(grid.act_sums[c * spans]);
    const typename Isa::Vec x_scale = Isa::set1(grid.act_scales[c * groups]);
    MPQ_UNROLL for (int v = 0; v < V; ++v) {
      typename Isa::Vec codes = Isa::template of_codes<BITS>(sum.v[c][v], x_sum);
      if constexpr (STARTED) codes = Isa::fma(Isa::set1(1 << (BITS - 1)), x_sum, codes);  // exact
      const typename Isa::Vec centred = Isa::fused(minus[v], x_sum, codes);
      take(c, v, Isa::mul(centred, scale[v]), x_scale);
    }
  }
}

// The panel's columns from j on, rows of activations from m on. By reference: a copy is read again by vectors that wait
// until its words have reached the cache, behind all results of the tile before.
template <int BITS, int C, int V, bool STARTED, class To>
bool a8_tile(const Packed& w, const Panel8& panel, int64_t j, const Acts8& a, int64_t m, Asked asked, const To& to) {
  using Vec = typename Isa::Vec;
  const To y = to;
  const Spans& spans = panel.spans;
  typename To::Held held;
  const int64_t zero_step = w.zero_each ? kPanel : 0, end = (w.k + 15) / 16 * 16;
  y.template fetch<C, V>();
  const uint8_t* codes = panel.codes + 4 * j;
  Grids8 grid{panel.scales + j, panel.zeros + j, a.scales + m * w.groups, a.sums + m * spans.count};
  Place at{a.q + m * a.ld, a.piece, a.jumps, asked, STARTED ? a.starts + m : nullptr, STARTED ? a.start_at : nullptr};
  const float* bias = panel.bias + j;
  Vec shift[V];
  MPQ_UNROLL for (int v = 0; v < V; ++v) shift[v] = Isa::load(bias + v * Isa::kWidth);
  if (spans.count == 1) {  // straight from sums to results
    a8_scaled<BITS, C, V, STARTED>(a8_span<BITS, C, V, STARTED>(codes, a, at, end), grid, 1, 1,
                                   [&](int c, int v, Vec value, Vec scale) __attribute__((always_inline)) {
                                     y.template put<C, V>(held, c, v, Isa::add(Isa::mul(value, scale), shift[v]));
                                   });
    return y.done(held);
  }
  // Results fill no registers, but are read and written nowhere else than in their places on the stack.
  Vec tile[C][V];
  MPQ_UNROLL for (int c = 0; c < C; ++c) MPQ_UNROLL for (int v = 0; v < V; ++v) tile[c][v] = Isa::zero();
  int64_t k = 0, left = smaller(spans.group, end);
  for (int64_t s = 0; s < spans.count; ++s) {  // without a division, which would hold up what follows
    const int64_t length = smaller(spans.length, left), bytes = mpq::packed_bytes(length, BITS) * kPanel;
    a8_scaled<BITS, C, V, STARTED>(a8_span<BITS, C, V, STARTED>(codes, a, at, length), grid, w.groups, spans.count,
                                   [&](int c, int v, Vec value, Vec scale) __attribute__((always_inline)) {
                                     tile[c][v] = Isa::fused(value, scale, tile[c][v]);
                                   });
    codes += bytes, ++grid.act_sums, k += length, left -= length;
    if (left > 0) continue;
    grid.scales += kPanel, grid.zeros += zero_step, ++grid.act_scales;
    left = smaller(spans.group, end - k);
  }
  MPQ_UNROLL for (int c = 0; c < C; ++c) MPQ_UNROLL for (int v = 0; v < V; ++v)
      y.template put<C, V>(held, c, v, Isa::add(tile[c][v], shift[v]));
  return y.done(held);
}

template <int C>
struct Constant {
  constexpr operator int() const { return C; }
};

// tile(m, j, C) takes C rows of activations from m on, and the panel's columns from j on.
template <int C, class Tile>
void a8_row(const Panel8& panel, int64_t m, const Tile& tile) {
  for (int64_t j = 0; j < panel.columns; j += kTileVecs * Isa::kWidth) tile(m, j, Constant<C>());
}
template <int C, class Tile>
void a8_rows(const Panel8& panel, int64_t m, int64_t rows, const Tile& tile) {
  if (rows == C) {
    a8_row<C>(panel, m, tile);
  } else if constexpr (C > 1) {
    a8_rows<C - 1>(panel, m, rows, tile);
  }
}

// Products of up to so many codes are done before memory answers: it is asked for results so many rows early.
constexpr int64_t kShallow = 256, kRowsEarly = 24;

template <int BITS, bool STARTED = false>
struct Tiles8 {
  const Packed& w;
  const Panel8& panel;
  const Acts8& acts;

  template <class Tile>
  void each(int64_t rows, const Tile& tile) const {
    constexpr int kMost = Isa::template act_rows<BITS>(), kFull = Isa::kFullRows ? Isa::kFullRows : kMost;
    const int64_t tiles = mpq::ceil_div(rows, kMost);
    if (rows % kFull == 0 && rows < tiles * (kMost - 1)) {  // never where there is no larger tile
      for (int64_t m = 0; m < rows; m += kFull) a8_row<kFull>(panel, m, tile);
      return;
    }
    const int64_t few = rows / tiles;  // as even as can be
    for (int64_t m = 0, wide = rows % tiles, many; m < rows; m += many, --wide) {
      many = few + (wide > 0);
      a8_rows<kMost>(panel, m, many, tile);
    }
  }
  Asked tile_asks(int64_t m, int64_t j) const {
    const uint8_t* const part = panel.codes + mpq::packed_bytes(w.kp, BITS) * j;
    if (m > 0 || (j > 0 && Asked::kParts<BITS, kTileVecs> == 1)) return {0, nullptr, panel.codes, panel.codes};
    return {panel.ahead, panel.until, panel.codes + 4 * j, part};
  }

  // Panels of a vector at the most take tiles of one where others would meet all columns; elsewhere they take fewer.
  bool narrow() const { return kTileVecs * Isa::kWidth == kPanel && panel.columns <= Isa::kWidth; }

  template <int C, class To>
  bool tile(int64_t m, int64_t j, const To& to) const {
    const Asked asked = tile_asks(m, j);
    if constexpr (kTileVecs * Isa::kWidth == kPanel)
      if (narrow()) return a8_tile<BITS, C, 1, false>(w, panel, j, acts, m, asked, to);
    return a8_tile<BITS, C, kTileVecs, STARTED>(w, panel, j, acts, m, asked, to);
  }

  void floats(int64_t rows, float* y, int64_t ld) const {
    const Clamp clamp(panel.range);
    const int64_t early = w.kp <= kShallow ? smaller(rows, kRowsEarly) : 0;
    // A panel's own width apart results are on their way elsewhere, in a cache, or follow each other.
    const bool asks = ld > kPanel && !panel.far;
    each(rows, [&](int64_t m, int64_t j, auto c) {
      const int64_t row = m + early;  // behind the last it is one of the next product's
      const float* const soon = !asks ? nullptr : y + j + (row < rows ? row * ld : panel.next + (row - rows) * ld);
      const ToFloats to{y + m * ld + j, ld, clamp, panel.far, soon};
      if constexpr (c <= Isa::template kWideRows<BITS>)
        if (panel.columns == kPanel) {  // lines of codes one after the other
          if (j == 0) a8_tile<BITS, c, kPanel / Isa::kWidth, false>(w, panel, j, acts, m, tile_asks(m, j), to);
          return;
        }
      tile<c>(m, j, to);
    });
  }
  bool bytes(int64_t rows, const mpq::ByteGrid& grid, int8_t* y, int64_t ld) const {
    const Rounding8 rounding(grid);
    const int64_t wide = narrow() ? Isa::kWidth : kTileVecs * Isa::kWidth;
    bool finite = true;
    each(rows, [&](int64_t m, int64_t j, auto c) {
      constexpr int64_t kMost = kTileVecs * Isa::kWidth;
      const int64_t count = smaller(wide, panel.columns - j);
      const bool whole = count == wide;
      int8_t room[c * kMost], *const out = y + m * ld + j, *const to = whole ? out : room;
      const int64_t step = whole ? ld : kMost;
      if (!tile<c>(m, j, ToBytes{to, step, rounding})) {
        float sums[c * kMost];
        tile<c>(m, j, ToFloats{sums, kMost, Clamp(panel.range)});
        finite &= round_bytes(sums, kMost, c, count, grid.scale, to, step);
      }
      if (whole) return;
      for (int i = 0; i < c; ++i) copy_some(room + i * kMost, count, out + i * ld);
    });
    return finite;
  }
  // Fewer bytes than a tile's columns.
  static void copy_some(const int8_t* from, int64_t count, int8_t* to) {
    MPQ_UNROLL for (int64_t n = Isa::kWidth; n > 0; n /= 2) if (count & n) {
      std::memcpy(to, from, n);
      to += n, from += n;
    }
  }
};

void gemm_a8(const Packed& w, const Panel8& panel, const Acts8& a, int64_t rows, float* y, int64_t ldy) {
  if (w.bits == 2) Tiles8<2>{w, panel, a}.floats(rows, y, ldy);
  if constexpr (Isa::kStarts)
    if (w.bits == 4 && a.starts) return Tiles8<4, true>{w, panel, a}.floats(rows, y, ldy);
  if (w.bits == 4) Tiles8<4>{w, panel, a}.floats(rows, y, ldy);
  if (w.bits == 8) Tiles8<8>{w, panel, a}.floats(rows, y, ldy);
}

bool gemm_a8_bytes(const Packed& w, const Panel8& panel, const Acts8& a, int64_t rows, const mpq::ByteGrid& grid,
                   int8_t* y, int64_t ldy) {
  if (w.bits == 2) return Tiles8<2>{w, panel, a}.bytes(rows, grid, y, ldy);
  if constexpr (Isa::kStarts)
    if (w.bits == 4 && a.starts) return Tiles8<4, true>{w, panel, a}.bytes(rows, grid, y, ldy);
  if (w.bits == 4) return Tiles8<4>{w, panel, a}.bytes(rows, grid, y, ldy);
  return Tiles8<8>{w, panel, a}.bytes(rows, grid, y, ldy);
}

}  // namespace
