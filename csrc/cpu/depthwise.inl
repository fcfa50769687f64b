// Depthwise convolutions: each channel on its own, pixels or channels along vectors. Included by kernels.inl.

namespace {

void every(const float* in, int64_t gap, int64_t count, float* out) {
  if (gap == 1)
    std::memcpy(out, in, count * sizeof(float));
  else if (gap == 2)  // a loop of its own, which the compiler vectorises
    for (int64_t i = 0; i < count; ++i) out[i] = in[2 * i];
  else
    for (int64_t i = 0; i < count; ++i) out[i] = in[gap * i];
}

// ---- pixels along vectors ---------------------------------------------------------------------------

template <int VECS>
inline void plane_tile(const float* x, const int64_t* offsets, const float* weights, int64_t taps, float scale,
                       float bias, float* y) {
  typename Isa::Vec acc[VECS];
  for (int j = 0; j < VECS; ++j) acc[j] = Isa::zero();
  for (int64_t t = 0; t < taps; ++t) {
    const typename Isa::Vec w = Isa::set1(weights[t]);
    for (int j = 0; j < VECS; ++j) acc[j] = Isa::fma(w, Isa::load(x + offsets[t] + j * Isa::kWidth), acc[j]);
  }
  for (int j = 0; j < VECS; ++j)
    Isa::store(y + j * Isa::kWidth, Isa::multiply_add(Isa::set1(scale), acc[j], Isa::set1(bias)));
}

void filter_plane(const float* x, const int64_t* offsets, const float* weights, int64_t taps, float scale, float bias,
                  float* y, int64_t count) {
  constexpr int kOnce = mpq::kWidest / Isa::kWidth, kMany = 8 * Isa::kWidth;
  int64_t i = 0;
  for (; i + kMany <= count; i += kMany) plane_tile<8>(x + i, offsets, weights, taps, scale, bias, y + i);
  for (; i < count; i += mpq::kWidest) plane_tile<kOnce>(x + i, offsets, weights, taps, scale, bias, y + i);
}

// ---- channels along vectors -------------------------------------------------------------------------

void spread(const float* x, int64_t pixel, int64_t pixels, int64_t channels, const float* scale, float* out,
            int64_t block) {
  const Rounder round(scale && *scale > 0 ? *scale : 1);
  const bool zero = scale && !(*scale > 0);
  for (int64_t i = 0; i < pixels; ++i, x += pixel, out += mpq::kWidest) {
    float* to = out;
    for (int64_t c = 0; c < channels; c += mpq::kWidest, to += block) {
      float rest[mpq::kWidest] = {};
      const float* from = x + c;
      if (c + mpq::kWidest > channels) {
        std::memcpy(rest, from, (channels - c) * sizeof(float));
        from = rest;
      }
      for (int v = 0; v < mpq::kWidest; v += Isa::kWidth) {
        const typename Isa::Vec in = Isa::load(from + v);
        Isa::store(to + v, zero ? Isa::zero() : scale ? round(in) : in);
      }
    }
  }
}

// PIXELS results from the pixel that x points to on. COLUMNS and STEP: what the row says, or 0.
template <int PIXELS, int COLUMNS, int STEP>
inline void row_tile(const mpq::FilterRow& r, const float* first, float* y) {
  const int64_t step = (STEP ? STEP : r.step) * mpq::kWidest, gap = (STEP ? 1 : r.dilation) * mpq::kWidest;
  const int64_t columns = COLUMNS ? COLUMNS : r.columns;
  for (int v = 0; v < mpq::kWidest; v += Isa::kWidth) {
    typename Isa::Vec acc[PIXELS];
    for (int j = 0; j < PIXELS; ++j) acc[j] = Isa::zero();
    const float* w = r.weights + v;
    for (int64_t i = 0; i < r.rows; ++i) {
      const float* x = first + i * r.x_row + v;
      for (int64_t k = 0; k < columns; ++k, x += gap, w += mpq::kWidest) {
        const typename Isa::Vec weight = Isa::load(w);
        for (int j = 0; j < PIXELS; ++j) acc[j] = Isa::fma(weight, Isa::load(x + j * step), acc[j]);
      }
    }
    const typename Isa::Vec scale = Isa::load(r.scale + v), bias = Isa::load(r.bias + v);
    for (int j = 0; j < PIXELS; ++j) Isa::store(y + j * r.y_pixel + v, Isa::multiply_add(scale, acc[j], bias));
  }
}

template <int PIXELS, int COLUMNS, int STEP>
void row_tiles(const mpq::FilterRow& r, int64_t x) {
  for (; x + PIXELS <= r.out_width; x += PIXELS)
    row_tile<PIXELS, COLUMNS, STEP>(r, r.x + x * r.step * mpq::kWidest, r.y + x * r.y_pixel);
  if constexpr (PIXELS > 1)
    if (x < r.out_width) row_tiles<PIXELS - 1, COLUMNS, STEP>(r, x);
}

void filter_row(const mpq::FilterRow& r) {
  const bool close = r.dilation == 1;
  if (close && r.columns == 3 && r.step == 1) return row_tiles<8, 3, 1>(r, 0);
  if (close && r.columns == 3 && r.step == 2) return row_tiles<8, 3, 2>(r, 0);
  if (close && r.columns == 5 && r.step == 1) return row_tiles<8, 5, 1>(r, 0);
  if (close && r.columns == 5 && r.step == 2) return row_tiles<8, 5, 2>(r, 0);
  row_tiles<8, 0, 0>(r, 0);
}

}  // namespace
