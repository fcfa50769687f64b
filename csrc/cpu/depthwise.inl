// Depthwise convolutions: each channel on its own, pixels or channels along vectors. Included by kernels.inl.

namespace {

constexpr int64_t kSpreadAhead = 2048;  // floats that `spread` asks memory for ahead: measured

void every(const float* in, int64_t gap, int64_t count, float* out) {
  if (gap == 1) {
    std::memcpy(out, in, count * sizeof(float));
  } else if (gap == 2 && count >= 8) {
    for (int64_t i = 0; i < count; i += 8) {
      const int64_t at = smaller(i, count - 8);  // the last eight may overlap those before
      Isa::evens8(in + 2 * at, out + at);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = in[gap * i];
  }
}

// ---- pixels along vectors ---------------------------------------------------------------------------

template <int VECS>
inline void plane_tile(const float* x, const int64_t* offsets, const float* weights, int64_t taps, float scale,
                       float bias, const Clamp& clamp, float* y) {
  typename Isa::Vec acc[VECS];
  for (int j = 0; j < VECS; ++j) acc[j] = Isa::zero();
  for (int64_t t = 0; t < taps; ++t) {
    const typename Isa::Vec w = Isa::set1(weights[t]);
    for (int j = 0; j < VECS; ++j) acc[j] = Isa::fma(w, Isa::load(x + offsets[t] + j * Isa::kWidth), acc[j]);
  }
  for (int j = 0; j < VECS; ++j)
    Isa::store(y + j * Isa::kWidth, clamp(Isa::fused(Isa::set1(scale), acc[j], Isa::set1(bias))));
}

void filter_plane(const float* x, const int64_t* offsets, const float* weights, int64_t taps, float scale, float bias,
                  const mpq::Range& range, float* y, int64_t count) {
  const Clamp clamp(range);
  constexpr int kOnce = mpq::kWidest / Isa::kWidth, kMany = 8 * Isa::kWidth;
  int64_t i = 0;
  for (; i + kMany <= count; i += kMany) plane_tile<8>(x + i, offsets, weights, taps, scale, bias, clamp, y + i);
  for (; i < count; i += mpq::kWidest) plane_tile<kOnce>(x + i, offsets, weights, taps, scale, bias, clamp, y + i);
}

// ---- channels along vectors -------------------------------------------------------------------------

// PIXELS pixels' vector of channels, as they are or rounded.
template <int PIXELS>
inline void spread_pixels(const float* x, int64_t pixel, const Rounder* round, float* out, typename Isa::Vec& strange) {
  for (int v = 0; v < mpq::kWidest; v += Isa::kWidth)
    if (round)
      round->run<PIXELS>(x + v, pixel, out + v, mpq::kWidest, strange);
    else
      for (int i = 0; i < PIXELS; ++i) Isa::store(out + i * mpq::kWidest + v, Isa::load(x + i * pixel + v));
}

bool spread_by(const float* x, int64_t pixel, int64_t pixels, int64_t channels, const Rounder* round, float* out,
               int64_t block) {
  constexpr int64_t kLanes = mpq::kWidest;
  const int64_t whole = channels / kLanes * kLanes;
  typename Isa::Vec strange = Isa::zero();
  int64_t i = 0;
  for (; i + 4 <= pixels; i += 4)
    for (int64_t c = 0; c < whole; c += kLanes) {
      for (int64_t j = 0; j < 4; ++j)  // a line after the other, as if pixels had no more channels
        __builtin_prefetch(x + i * pixel + 4 * c + j * kLanes + kSpreadAhead);
      spread_pixels<4>(x + i * pixel + c, pixel, round, out + c / kLanes * block + i * kLanes, strange);
    }
  for (; i < pixels; ++i)
    for (int64_t c = 0; c < whole; c += kLanes)
      spread_pixels<1>(x + i * pixel + c, pixel, round, out + c / kLanes * block + i * kLanes, strange);
  for (int64_t c = whole; c < channels; c += kLanes)
    for (i = 0; i < pixels; ++i) {
      float rest[kLanes] = {};
      std::memcpy(rest, x + i * pixel + c, (channels - c) * sizeof(float));
      spread_pixels<1>(rest, 0, round, out + c / kLanes * block + i * kLanes, strange);
    }
  return Isa::sum(strange) == 0;
}

bool spread(const float* x, int64_t pixel, int64_t pixels, int64_t channels, const float* scale, float* out,
            int64_t block) {
  if (!scale) return spread_by(x, pixel, pixels, channels, nullptr, out, block);
  const Rounder round = rounder(*scale);
  return spread_by(x, pixel, pixels, channels, &round, out, block);
}

// PIXELS results from x0 on, whose taps k0..k1 lie inside the row. COLUMNS: how many these are, STEP: the step between
// pixels and taps that lie close together, or 0.
template <int PIXELS, int COLUMNS, int STEP>
inline void row_tile(const mpq::FilterRow& r, int64_t x0, int64_t k0, int64_t k1) {
  const int64_t step = STEP ? STEP * mpq::kWidest : r.step * r.x_pixel;
  const int64_t gap = STEP ? mpq::kWidest : r.dilation * r.x_pixel, columns = COLUMNS ? COLUMNS : k1 - k0;
  const float* first = r.x + (x0 * r.step - r.padding) * r.x_pixel + k0 * gap;
  float* y = r.y + x0 * r.y_pixel;
  const Clamp clamp(r.range);
  for (int64_t c = 0; c < r.channels; c += Isa::kWidth) {
    const int64_t block = c / mpq::kWidest, lane = c % mpq::kWidest;
    const float* weights = r.weights + block * r.w_block + k0 * mpq::kWidest + lane;
    typename Isa::Vec acc[PIXELS];
    for (int j = 0; j < PIXELS; ++j) acc[j] = Isa::zero();
    for (int64_t i = 0; i < r.rows; ++i) {
      const float* x = first + i * r.x_row + block * r.x_block + lane;
      const float* w = weights + i * r.columns * mpq::kWidest;
      for (int64_t k = 0; k < columns; ++k, x += gap, w += mpq::kWidest) {
        const typename Isa::Vec weight = Isa::load(w);
        for (int j = 0; j < PIXELS; ++j) acc[j] = Isa::fma(weight, Isa::load(x + j * step), acc[j]);
      }
    }
    for (int j = 0; r.soon && lane == 0 && j < PIXELS; ++j) __builtin_prefetch(y + r.soon + j * r.y_pixel + c, 1);
    const typename Isa::Vec scale = Isa::load(r.scale + c), bias = Isa::load(r.bias + c);
    for (int j = 0; j < PIXELS; ++j) store_result(y + j * r.y_pixel + c, clamp(Isa::fused(scale, acc[j], bias)), r.far);
  }
}

template <int PIXELS, int COLUMNS, int STEP>
void row_tiles(const mpq::FilterRow& r, int64_t x, int64_t to) {
  for (; x + PIXELS <= to; x += PIXELS) row_tile<PIXELS, COLUMNS, STEP>(r, x, 0, r.columns);
  if constexpr (PIXELS > 1)
    if (x < to) row_tiles<PIXELS - 1, COLUMNS, STEP>(r, x, to);
}

template <int COLUMNS>
void row_middle(const mpq::FilterRow& r, int64_t x, int64_t to) {
  const bool close = r.dilation == 1 && r.x_pixel == mpq::kWidest;
  if (close && r.step == 1) return row_tiles<8, COLUMNS, 1>(r, x, to);
  if (close && r.step == 2) return row_tiles<8, COLUMNS, 2>(r, x, to);
  row_tiles<8, COLUMNS, 0>(r, x, to);
}

void filter_row(const mpq::FilterRow& r) {
  // Results from..to meet the input with every tap of the row.
  const int64_t room = r.width - 1 + r.padding - (r.columns - 1) * r.dilation;
  const int64_t from = smaller(r.out_width, mpq::ceil_div(r.padding, r.step));
  const int64_t to = room < 0 ? 0 : smaller(r.out_width, room / r.step + 1);
  auto border = [&](int64_t x) {
    const int64_t at = x * r.step - r.padding;  // of the first tap
    const int64_t k0 = at < 0 ? smaller(r.columns, mpq::ceil_div(-at, r.dilation)) : 0;
    const int64_t k1 = at >= r.width ? k0 : smaller(r.columns, (r.width - 1 - at) / r.dilation + 1);
    row_tile<1, 0, 0>(r, x, k0, k1);
  };
  for (int64_t x = 0; x < from; ++x) border(x);
  if (r.columns == 3)
    row_middle<3>(r, from, to);
  else if (r.columns == 5)
    row_middle<5>(r, from, to);
  else
    row_tiles<8, 0, 0>(r, from, to);
  for (int64_t x = from > to ? from : to; x < r.out_width; ++x) border(x);
}

}  // namespace
