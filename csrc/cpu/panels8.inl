// Panels: up to kPanel rows of a weight in the order in which products with 8-bit activations read them. Included by
// kernels.inl.

namespace {

// Squares of packed words are transposed; codes come out of them where they are multiplied.
template <int BITS>
void panel_words(const Packed& w, int64_t n0, int64_t n1, uint8_t* out) {
  constexpr int kWords = Isa::kWidth, kBytes = 4 * kWords;
  const int64_t row_bytes = mpq::packed_bytes(w.kp, BITS);
  for (int64_t n = 0; n < kPanel; n += kWords)
    for (int64_t at = 0; at < row_bytes; at += kBytes) {
      const int64_t bytes = smaller(kBytes, row_bytes - at);
      typename Isa::Bytes square[kWords];
      if (n0 + n + kWords <= n1 && bytes == kBytes) {
        Isa::transpose_words(w.row(n0 + n) + at, row_bytes, square);
      } else {  // the last row stands for those past it
        uint8_t edge[kWords][kBytes];
        for (int r = 0; r < kWords; ++r) std::memcpy(edge[r], w.row(smaller(n0 + n + r, n1 - 1)) + at, bytes);
        Isa::transpose_words(edge[0], kBytes, square);
      }
      uint8_t* to = out + at * kPanel + 4 * n;
      for (int64_t t = 0; t < bytes / 4; ++t, to += 4 * kPanel) Isa::store_bytes(to, square[t]);
    }
}

void panel_a8(const Packed& w, int64_t n0, int64_t n1, uint8_t* out) {
  if (w.bits == 2) panel_words<2>(w, n0, n1, out);
  if (w.bits == 4) panel_words<4>(w, n0, n1, out);
  if (w.bits == 8) panel_words<8>(w, n0, n1, out);
}

void grid_a8(const Packed& w, int64_t n0, int64_t n1, float* scales, float* zeros, float* scratch) {
  auto turned = [&](const void* from, float* to) {
    const float* floats = static_cast<const float*>(from) + n0 * w.groups;
    if (w.half) {
      Isa::halves_to_floats(static_cast<const uint16_t*>(from) + n0 * w.groups, scratch, (n1 - n0) * w.groups);
      floats = scratch;
    }
    transpose(floats, w.groups, n1 - n0, w.groups, to, kPanel);
  };
  turned(w.scales, scales);
  if (w.zero_each) return turned(w.zeros, zeros);
  float zero = mpq::mid_zero(w.bits);
  if (w.zeros) to_float(w.zeros, w.half ? Float::f16 : Float::f32, &zero, 1);
  for (int64_t j = 0; j < kPanel; ++j) zeros[j] = zero;
}

// Panels of fp32: strips of columns, as many as a tile of `gemm_rows` has.
constexpr int64_t kStrip = 2 * Isa::kWidth;

template <int BITS>
void panel_columns(const Packed& w, const mpq::Panel8& panel, int64_t k0, int64_t k1, float* out, int64_t step) {
  constexpr int kCodes = 32 / BITS;  // of a word
  for (int64_t k = k0, end; k < k1; k = end) {
    const int64_t group = k / w.group;
    end = smaller(k1, (group + 1) * w.group);
    for (int v = 0; v < kPanel; v += Isa::kWidth) {
      const typename Isa::Vec scale = Isa::load(panel.scales + group * kPanel + v);
      const typename Isa::Vec zero = Isa::load(panel.zeros + (w.zero_each ? group * kPanel : 0) + v);
      float* to = out + v / kStrip * step + (k - k0) * kStrip + v % kStrip;
      for (int64_t i = k; i < end; i += kCodes, to += kCodes * kStrip) {
        const typename Isa::Bytes words = Isa::load_bytes(panel.codes + (i / kCodes * kPanel + v) * 4);
        MPQ_UNROLL for (int c = 0; c < kCodes; ++c)
            Isa::store(to + c * kStrip, Isa::mul(scale, Isa::sub(Isa::template code_floats<BITS>(words, c), zero)));
      }
    }
  }
}

void panel_floats(const Packed& w, const mpq::Panel8& panel, int64_t k0, int64_t k1, float* out, int64_t step) {
  if (w.bits == 2) panel_columns<2>(w, panel, k0, k1, out, step);
  if (w.bits == 4) panel_columns<4>(w, panel, k0, k1, out, step);
  if (w.bits == 8) panel_columns<8>(w, panel, k0, k1, out, step);
}

void turn_floats(const float* weights, int64_t ld, int64_t rows, int64_t columns, float* out, int64_t step) {
  if (rows < kPanel)
    for (int64_t j = 0; j < kPanel; j += kStrip)
      std::memset(out + j / kStrip * step, 0, columns * kStrip * sizeof(float));
  for (int64_t j = 0; j < rows; j += kStrip)
    transpose(weights + j * ld, ld, smaller(kStrip, rows - j), columns, out + j / kStrip * step, kStrip);
}

}  // namespace
