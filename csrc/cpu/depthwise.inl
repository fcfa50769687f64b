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

// PIXELS results from x0 on, all of whose taps at columns k0..k1 lie inside the row; COLUMNS, where it is not 0, is how
// many these are.
template <int PIXELS, int COLUMNS>
inline void row_tile(const mpq::FilterRow& r, int64_t x0, int64_t k0, int64_t k1) {
  const int64_t step = r.step * r.x_pixel, gap = r.dilation * r.x_pixel, columns = COLUMNS ? COLUMNS : k1 - k0;
  const float* first = r.x + (x0 * r.step - r.padding) * r.x_pixel + k0 * gap;
  float* y = r.y + x0 * r.y_pixel;
  for (int64_t next = 0; next < r.channels; next += Isa::kWidth) {
    const int64_t c = smaller(next, r.channels - Isa::kWidth);  // the last vector may overlap the one before
    typename Isa::Vec acc[PIXELS];
    for (int j = 0; j < PIXELS; ++j) acc[j] = Isa::zero();
    for (int64_t i = 0; i < r.rows; ++i) {
      const float *x = first + i * r.x_row + c, *w = r.weights + (i * r.columns + k0) * r.weights_tap + c;
      for (int64_t k = 0; k < columns; ++k, x += gap, w += r.weights_tap) {
        const typename Isa::Vec weight = Isa::load(w);
        for (int j = 0; j < PIXELS; ++j) acc[j] = Isa::fma(weight, Isa::load(x + j * step), acc[j]);
      }
    }
    const typename Isa::Vec scale = Isa::load(r.scale + c), bias = Isa::load(r.bias + c);
    for (int j = 0; j < PIXELS; ++j) Isa::store(y + j * r.y_pixel + c, Isa::multiply_add(scale, acc[j], bias));
  }
}

template <int COLUMNS>
void inner_columns(const mpq::FilterRow& r, int64_t x, int64_t to) {
  for (; x + 8 <= to; x += 8) row_tile<8, COLUMNS>(r, x, 0, r.columns);
  for (; x + 4 <= to; x += 4) row_tile<4, COLUMNS>(r, x, 0, r.columns);
  for (; x + 2 <= to; x += 2) row_tile<2, COLUMNS>(r, x, 0, r.columns);
  if (x < to) row_tile<1, COLUMNS>(r, x, 0, r.columns);
}

void filter_row(const mpq::FilterRow& r) {
  const int64_t reach = (r.columns - 1) * r.dilation;
  // Columns from..to meet the input with every tap.
  const int64_t from = smaller(r.out_width, mpq::ceil_div(r.padding, r.step));
  const int64_t room = r.width - 1 + r.padding - reach, to = room < 0 ? 0 : smaller(r.out_width, room / r.step + 1);
  auto border = [&](int64_t x) {
    const int64_t at = x * r.step - r.padding;  // of the first tap
    const int64_t k0 = at < 0 ? smaller(r.columns, mpq::ceil_div(-at, r.dilation)) : 0;
    const int64_t k1 = at >= r.width ? k0 : smaller(r.columns, (r.width - 1 - at) / r.dilation + 1);
    row_tile<1, 0>(r, x, k0, k1);
  };
  for (int64_t x = 0; x < from; ++x) border(x);
  if (r.columns == 3)
    inner_columns<3>(r, from, to);
  else if (r.columns == 5)
    inner_columns<5>(r, from, to);
  else
    inner_columns<0>(r, from, to);
  for (int64_t x = from > to ? from : to; x < r.out_width; ++x) border(x);
}

}  // namespace
