// One row of 8-bit activations, one scale for each row of the weight: products wait for memory, and memory gives more
// where several pages are read by turns. So panels that lie far apart go side by side, some of each one's codes at a
// time. Results are those of `gemm_a8`. Included by kernels.inl.
namespace {

// A turn's codes, in bytes; meanwhile memory is asked for those of the panel's next turn. Measured.
constexpr int64_t kTurnBytes = 1024;

template <int PANELS, int BITS>
void panels_apart(const Packed& w, const Panel8* panels, const Acts8& a, float* const* y) {
  constexpr int V = kPanel / Isa::kWidth;
  constexpr int64_t kTurn = kTurnBytes * 8 / BITS / kPanel;  // codes, a multiple of 16
  using Vec = typename Isa::Vec;
  Sums8<1, V> sums[PANELS];  // of a span
  Vec results[PANELS][V];
  for (auto& panel : results) MPQ_UNROLL for (Vec& v : panel) v = Isa::zero();
  const int64_t end = (w.k + 15) / 16 * 16, length = panels->spans.length, spans = panels->spans.count;
  for (int64_t s = 0; s < spans; ++s) {
    const int64_t k0 = s * length, k1 = smaller(end, k0 + length);
    for (int64_t k = k0, some; k < k1; k += some) {
      some = smaller(kTurn, k1 - k);
      const int64_t read = mpq::packed_bytes(k, BITS) * kPanel;
#pragma GCC unroll 1
      for (int p = 0; p < PANELS; ++p) {
        const uint8_t* const codes = panels[p].codes + read;
        Place at{a.q + k, end - k, a.jumps, {kTurnBytes, nullptr, codes, codes}, nullptr, nullptr};
        const Sums8<1, V> sum = a8_span<BITS, 1, V, false>(codes, a, at, some);
        MPQ_UNROLL for (int v = 0; v < V; ++v) sums[p].v[0][v] = k > k0 ? sums[p].v[0][v] + sum.v[0][v] : sum.v[0][v];
      }
    }
#pragma GCC unroll 1
    for (int p = 0; p < PANELS; ++p) {
      const Grids8 grid{panels[p].scales, panels[p].zeros, a.scales, a.sums + s};
      a8_scaled<BITS, 1, V, false>(sums[p], grid, 1, spans,
                                   [&](int, int v, Vec value, Vec scale) __attribute__((always_inline)) {
                                     results[p][v] = Isa::fused(value, scale, results[p][v]);
                                   });
    }
  }
  const Clamp clamp(panels->range);
  for (int p = 0; p < PANELS; ++p) MPQ_UNROLL for (int v = 0; v < V; ++v) {
      const int64_t j = v * Isa::kWidth;
      Isa::store(y[p] + j, clamp(Isa::add(results[p][v], Isa::load(panels[p].bias + j))));
    }
}

template <int PANELS>
void some_apart(const Packed& w, const Panel8* panels, const Acts8& a, float* const* y) {
  if constexpr (PANELS > 0) {
    if (w.bits == 2) panels_apart<PANELS, 2>(w, panels, a, y);
    if (w.bits == 4) panels_apart<PANELS, 4>(w, panels, a, y);
    if (w.bits == 8) panels_apart<PANELS, 8>(w, panels, a, y);
  }
}

void gemv_a8_apart(const Packed& w, const Panel8* panels, const Acts8& a, float* const* y) {
  some_apart<Isa::kApart>(w, panels, a, y);
}

}  // namespace
