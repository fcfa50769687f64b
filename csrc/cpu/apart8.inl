// One or two rows of 8-bit activations, one scale for each row of the weight: products wait for memory, and memory
// gives more where several pages are read by turns. So panels that lie far apart go side by side, some of each one's
// codes at a time. Results are those of `gemm_a8`. Included by kernels.inl.
namespace {

using mpq::kApart;

// A turn's codes, in bytes; meanwhile memory is asked for those of the panel's next turn. Measured.
constexpr int64_t kTurnBytes = 1024;

template <int BITS, int C>
void panels_apart(const Packed& w, const Panel8* panels, const Acts8& a, float* const* y, int64_t ld) {
  constexpr int V = kPanel / Isa::kWidth;
  constexpr int64_t kTurn = kTurnBytes * 8 / BITS / kPanel;  // codes, a multiple of 16
  using Vec = typename Isa::Vec;
  Sums8<C, V> sums[kApart];  // of a span
  Vec results[kApart][C][V];
  for (auto& panel : results) MPQ_UNROLL for (auto& row : panel) MPQ_UNROLL for (Vec& v : row) v = Isa::zero();
  const int64_t end = (w.k + 15) / 16 * 16, length = panels->spans.length, spans = panels->spans.count;
  for (int64_t s = 0; s < spans; ++s) {
    const int64_t k0 = s * length, k1 = smaller(end, k0 + length);
    for (int64_t k = k0, some; k < k1; k += some) {
      some = smaller(kTurn, k1 - k);
      const int64_t read = mpq::packed_bytes(k, BITS) * kPanel;
#pragma GCC unroll 1
      for (int p = 0; p < kApart; ++p) {
        const uint8_t* const codes = panels[p].codes + read;
        Place at{a.q + k, end - k, a.jumps, {kTurnBytes, nullptr, codes, codes}, nullptr, nullptr};
        const Sums8<C, V> sum = a8_span<BITS, C, V, false>(codes, a, at, some);
        MPQ_UNROLL for (int c = 0; c < C; ++c) MPQ_UNROLL for (int v = 0; v < V; ++v) sums[p].v[c][v] =
            k > k0 ? sums[p].v[c][v] + sum.v[c][v] : sum.v[c][v];
      }
    }
#pragma GCC unroll 1
    for (int p = 0; p < kApart; ++p) {
      const Grids8 grid{panels[p].scales, panels[p].zeros, a.scales, a.sums + s};
      a8_scaled<BITS, C, V, false>(sums[p], grid, 1, spans,
                                   [&](int c, int v, Vec value, Vec scale) __attribute__((always_inline)) {
                                     results[p][c][v] = Isa::fused(value, scale, results[p][c][v]);
                                   });
    }
  }
  const Clamp clamp(panels->range);
  for (int p = 0; p < kApart; ++p) MPQ_UNROLL for (int c = 0; c < C; ++c) MPQ_UNROLL for (int v = 0; v < V; ++v) {
      const int64_t j = v * Isa::kWidth;
      Isa::store(y[p] + c * ld + j, clamp(Isa::add(results[p][c][v], Isa::load(panels[p].bias + j))));
    }
}

template <int C>
void rows_apart(const Packed& w, const Panel8* panels, const Acts8& a, float* const* y, int64_t ld) {
  if (w.bits == 2) panels_apart<2, C>(w, panels, a, y, ld);
  if (w.bits == 4) panels_apart<4, C>(w, panels, a, y, ld);
  if (w.bits == 8) panels_apart<8, C>(w, panels, a, y, ld);
}

template <bool APART>
void gemm_a8_apart(const Packed& w, const Panel8* panels, const Acts8& a, int64_t rows, float* const* y, int64_t ld) {
  if (rows == 1) rows_apart<1>(w, panels, a, y, ld);
  if (rows == 2) rows_apart<2>(w, panels, a, y, ld);
}

constexpr decltype(&gemm_a8_apart<false>) gemm_a8_apart() {
  if constexpr (Isa::kApart)
    return gemm_a8_apart<true>;
  else
    return nullptr;
}

}  // namespace
