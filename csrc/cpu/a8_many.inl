// Many rows of 8-bit activations against a weight: activations lie across vectors, in panels, and rows of codes are
// broadcast to them, four codes at a time. So only activations are transposed, and once for the whole weight, where
// gemm_a8 has panels of codes for activations that pass by. Both compute the same, to the bit.
namespace {

using mpq::ActPanels8;
using mpq::Codes8;

// A tile's sums: R rows of codes by V = 2 vectors of activations; or by V = 1, whose even and odd quads of k are summed
// apart, because a broadcast from memory for each product would be one too many.
template <int R>
struct Sums {
  typename Isa::Ints v[R][2];
};

// Over k codes, above 0 and a multiple of 8.
template <int BITS, int R, int V>
inline Sums<R> many_steps(const uint8_t* codes, int64_t ld, const int8_t* q, int64_t k) {
  constexpr int kFours = (R + 3) / 4, kStep = V == 1 ? 8 : 4;
  const uint8_t* four[kFours];  // as in a8_steps
  MPQ_UNROLL for (int j = 0; j < kFours; ++j) four[j] = codes + 4 * j * ld;
  Sums<R> sum;
  MPQ_UNROLL for (int r = 0; r < R; ++r) MPQ_UNROLL for (int v = 0; v < 2; ++v) sum.v[r][v] = Isa::no_ints();
  const int8_t* end = q + k * kPanel;
  do {
    const typename Isa::Bytes a = Isa::load_bytes(q), b = Isa::load_bytes(q + 4 * (V == 1 ? kPanel : Isa::kWidth));
    const typename Isa::Bytes x[2] = {V == 1 ? Isa::low_pairs(a, b) : a, V == 1 ? Isa::high_pairs(a, b) : b};
    MPQ_UNROLL for (int r = 0; r < R; ++r) {
      const uint8_t* at = four[r / 4] + r % 4 * ld;
      const typename Isa::Bytes code = V == 1 ? Isa::two_words(at) : Isa::word(at);
      MPQ_UNROLL for (int v = 0; v < 2; ++v) sum.v[r][v] = Isa::template dot<BITS>(sum.v[r][v], code, x[v]);
    }
    MPQ_UNROLL for (int j = 0; j < kFours; ++j) four[j] += kStep;
    q += kStep * kPanel;
  } while (q < end);
  return sum;
}

// The same over a span.
template <int BITS, int R, int V>
inline Sums<R> many_span(const uint8_t* codes, int64_t ld, const int8_t* q, int64_t k) {
  if constexpr (!Isa::template kNarrow<BITS>) {
    return many_steps<BITS, R, V>(codes, ld, q, k);
  } else {
    Sums<R> sum = {};
    for (int64_t i = 0; i < k; i += kBlock) {
      const Sums<R> part = many_steps<BITS, R, V>(codes + i, ld, q + i * kPanel, kBlock);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < 2; ++v) sum.v[r][v] = Isa::widened(sum.v[r][v], part.v[r][v]);
    }
    return sum;
  }
}

// Asks for a span's codes in R packed rows. Spread over tiles and spans, memory is waited for while others multiply.
template <int R>
inline void many_ahead(const uint8_t* next, int64_t ld, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) MPQ_UNROLL for (int r = 0; r < R; ++r) __builtin_prefetch(next + r * ld + i);
}

// Codes, scales and activations from the stretch's first span on.
template <int BITS, int R, int V>
void many_tile(const Packed& w, Codes8 c, ActPanels8 a, const Stretch& part, float* y, bool first) {
  constexpr int kWidth = Isa::kWidth;
  const int64_t row_bytes = mpq::packed_bytes(w.kp, w.bits);
  typename Isa::Vec tile[R][V];
  MPQ_UNROLL for (int r = 0; r < R; ++r) MPQ_UNROLL for (int v = 0; v < V; ++v) tile[r][v] =
      first ? Isa::zero() : Isa::load(y + r * kPanel + v * kWidth);
  int64_t k = part.k0, left = part.left;
  for (int64_t s = part.s0; s < part.s1; ++s) {
    const int64_t length = smaller(part.spans.length, left);
    if (c.next) {
      const int64_t bytes = mpq::packed_bytes(length, w.bits);
      many_ahead<R>(c.next, row_bytes, bytes);
      c.next += bytes;
    }
    const Sums<R> sum = many_span<BITS, R, V>(c.codes, c.ld, a.q, length);
    typename Isa::Vec scale[V], minus[V];
    MPQ_UNROLL for (int v = 0; v < V; ++v) {
      scale[v] = Isa::load(a.scales + v * kWidth);
      minus[v] = Isa::sub(Isa::zero(), Isa::load(a.sums + v * kWidth));
    }
    MPQ_UNROLL for (int r = 0; r < R; ++r) {
      const typename Isa::Vec w_scale = Isa::set1(c.scales[r * w.groups]), w_zero = Isa::set1(c.zeros[r * w.groups]);
      MPQ_UNROLL for (int v = 0; v < V; ++v) {
        const typename Isa::Ints ints = V == 1 ? Isa::joined(sum.v[r][0], sum.v[r][1]) : sum.v[r][v];
        const typename Isa::Vec centred = Isa::fused(w_zero, minus[v], Isa::to_floats(ints));
        tile[r][v] = Isa::fused(Isa::mul(centred, w_scale), scale[v], tile[r][v]);
      }
    }
    c.codes += length, a.q += length * kPanel, a.sums += kPanel, k += length, left -= length;
    if (left > 0) continue;
    ++c.scales, ++c.zeros, a.scales += kPanel;
    left = smaller(part.spans.group, w.kp - k);
  }
  MPQ_UNROLL for (int r = 0; r < R; ++r) MPQ_UNROLL for (int v = 0; v < V; ++v)
      Isa::store(y + r * kPanel + v * kWidth, tile[r][v]);
}

// Over V vectors of a panel.
template <int BITS, int R, int V>
void many_rows(const Packed& w, Codes8 c, int64_t rows, const ActPanels8& a, const Stretch& part, float* y,
               bool first) {
  for (int64_t r = 0; r < rows; r += R, y += R * kPanel) {
    many_tile<BITS, R, V>(w, c, a, part, y, first);
    c.codes += R * c.ld, c.scales += R * w.groups, c.zeros += R * w.groups;
    if (c.next) c.next += R * mpq::packed_bytes(w.kp, BITS);
  }
}

template <int BITS>
void many_columns(const Packed& w, Codes8 c, int64_t rows, const ActPanels8& a, int64_t columns, const Stretch& part,
                  float* y, bool first) {
  constexpr int kRows = Isa::template act_rows<BITS>();
  static_assert(mpq::kCodeRows % kRows == 0);
  for (int64_t j = 0; j < columns; j += 2 * Isa::kWidth, c.next = nullptr) {  // fetched once is enough
    const int64_t p = j / kPanel, lane = j % kPanel;
    const ActPanels8 here{a.q + p * kPanel * w.kp + 4 * lane, a.scales + p * kPanel * w.groups + lane,
                          a.sums + p * kPanel * part.spans.count + lane};
    float* to = y + p * c.room * kPanel + lane;
    if (j + Isa::kWidth < columns)
      many_rows<BITS, kRows, 2>(w, c, rows, here, part, to, first);
    else
      many_rows<BITS, kRows, 1>(w, c, rows, here, part, to, first);
  }
}

void gemm8(const Packed& w, const Codes8& c, int64_t rows, const ActPanels8& a, int64_t columns, int64_t s0, int64_t s1,
           float* y, bool first) {
  const Stretch part(w, s0, s1);
  const Codes8 codes{c.codes, c.ld, c.room, c.scales + part.group, c.zeros + part.group, c.next};
  const ActPanels8 acts{a.q + part.k0 * kPanel, a.scales + part.group * kPanel, a.sums + s0 * kPanel};
  if (w.bits == 2) many_columns<2>(w, codes, rows, acts, columns, part, y, first);
  if (w.bits == 4) many_columns<4>(w, codes, rows, acts, columns, part, y, first);
  if (w.bits == 8) many_columns<8>(w, codes, rows, acts, columns, part, y, first);
}

}  // namespace
