// Pixels as bytes for depthwise convolutions: four neighbouring ones of a channel lie in one word, channels along
// vectors. Included by kernels.inl.

namespace {

using mpq::kQuad;

// ---- pixels -> quads --------------------------------------------------------------------------------

// One quad: of kWidth channels from floats, of kWidest from bytes.
template <class T>
constexpr int64_t kQuadOf = sizeof(T) == 1 ? mpq::kWidest : Isa::kWidth;

// QUADS of them, of channels that follow each other: a test serves them all.
template <int QUADS>
inline void put_quads(const float* const (&x)[4], const Rounder* round, typename Isa::Vec& strange, uint8_t* out,
                      int64_t block) {
  typename Isa::Vec v[QUADS * 4];
  MPQ_UNROLL for (int i = 0; i < QUADS * 4; ++i) v[i] = Isa::load(x[i % 4] + i / 4 * Isa::kWidth);
  round->integers(v, strange);
  MPQ_UNROLL for (int i = 0; i < QUADS; ++i) {
    const int64_t c = i * Isa::kWidth;
    Isa::store_bytes(out + c / mpq::kWidest * block + c % mpq::kWidest * 4,
                     Isa::quad({v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]}));
  }
}
template <int QUADS>
inline void put_quads(const int8_t* const (&x)[4], const Rounder*, typename Isa::Vec&, uint8_t* out, int64_t) {
  static_assert(QUADS == 1);
  Isa::store_quad(x, out);
}

// One quad of every channel, from the pixel at x on; pixels that are not `there` are zeros.
template <bool WHOLE, class T>
inline void quad_of(const T* x, int64_t pixel, const bool (&there)[4], int64_t channels, const Rounder* round,
                    uint8_t* out, int64_t block, typename Isa::Vec& strange) {
  constexpr int64_t kOnce = kQuadOf<T>;
  constexpr int kTogether = sizeof(T) > 1 && Isa::kWidth == mpq::kWidest ? 2 : 1;  // as many as have registers
  static const T nothing[kTogether * kOnce] = {};
  const T* at[4];
  int64_t mask[4];  // of channels, whichever they are the same zeros
  MPQ_UNROLL for (int i = 0; i < 4; ++i) {
    at[i] = WHOLE || there[i] ? x + i * pixel : nothing;
    mask[i] = WHOLE || there[i] ? -1 : 0;
  }
  int64_t c = 0;
  const auto from = [&](int i) { return at[i] + (c & mask[i]); };
  const auto to = [&] { return out + c / mpq::kWidest * block + c % mpq::kWidest * 4; };
  for (; c + kTogether * kOnce <= channels; c += kTogether * kOnce) {
    if (WHOLE)  // a line after the other, as if pixels had no more channels
      MPQ_UNROLL for (int i = 0; i < int(4 * kTogether * kOnce * sizeof(T)); i += mpq::kLine)
          __builtin_prefetch(reinterpret_cast<const char*>(x + 4 * c) + kSpreadAhead * sizeof(float) + i);
    put_quads<kTogether>({from(0), from(1), from(2), from(3)}, round, strange, to(), block);
  }
  for (; kTogether > 1 && c + kOnce <= channels; c += kOnce)
    put_quads<1>({from(0), from(1), from(2), from(3)}, round, strange, to(), block);
  if (c < channels) {
    T rest[4][kOnce] = {};
    for (int i = 0; i < 4; ++i) std::memcpy(rest[i], from(i), (channels - c) * sizeof(T));
    put_quads<1>({rest[0], rest[1], rest[2], rest[3]}, round, strange, to(), block);
  }
}

template <class T>
bool quads_of(const T* x, int64_t pixel, int64_t pixels, int64_t channels, const Rounder* round, int64_t padding,
              uint8_t* out, int64_t block) {
  typename Isa::Vec strange = Isa::zero();
  for (int64_t at = padding / 4 * 4 - padding; at < pixels; at += 4) {
    bool there[4];
    for (int i = 0; i < 4; ++i) there[i] = at + i >= 0 && at + i < pixels;
    uint8_t* to = out + (at + padding) / 4 * kQuad;
    if (there[0] && there[3])
      quad_of<true>(x + at * pixel, pixel, there, channels, round, to, block, strange);
    else
      quad_of<false>(x + at * pixel, pixel, there, channels, round, to, block, strange);
  }
  return Isa::sum(strange) == 0;
}

bool quads_of_floats(const float* x, int64_t pixel, int64_t pixels, int64_t channels, float scale, int64_t padding,
                     uint8_t* out, int64_t block) {
  const Rounder round = rounder(scale);
  return quads_of(x, pixel, pixels, channels, &round, padding, out, block);
}
void quads_of_bytes(const int8_t* x, int64_t pixel, int64_t pixels, int64_t channels, int64_t padding, uint8_t* out,
                    int64_t block) {
  quads_of(x, pixel, pixels, channels, nullptr, padding, out, block);
}

// ---- planes -> quads --------------------------------------------------------------------------------

// Rounded in one piece, brought to rows that begin and end with zeros, and four pixels at a time turned to lie beside
// those of other channels: so many rows at once that all this stays in the level 1 cache. Of channels that there are
// not, `out` gets what the room holds.
bool quads_of_planes(const float* x, int64_t plane, int64_t rows, int64_t columns, int64_t channels, float scale,
                     int64_t padding, uint8_t* out, int64_t row, uint8_t* room) {
  const int64_t pitch = row / mpq::kWidest, most = mpq::plane_rows(row), ld = mpq::plane_ld(row);
  const int64_t whole = columns / kStep * kStep;
  static_assert(kStep <= mpq::kLine);
  int8_t* const lines = reinterpret_cast<int8_t*>(room);
  uint8_t* const padded = room + mpq::kWidest * ld;
  int8_t bounds[2][kStep] = {};  // of the last vector of a row: 0 past its end
  std::memset(bounds[0], -128, columns - whole);
  std::memset(bounds[1], 127, columns - whole);
  const typename Isa::Bytes low = Isa::load_bytes(bounds[0]), high = Isa::load_bytes(bounds[1]);
  bool finite = true;
  for (int64_t first = 0, many; first < rows; first += many, out += many * row) {
    many = smaller(most, rows - first);
    finite &= round_bytes(x + first * columns, plane, channels, many * columns, scale, lines, ld);
    for (int64_t c = 0; c < channels; ++c) {
      const int8_t* from = lines + c * ld;
      uint8_t* to = padded + c * ld + padding;
      for (int64_t i = 0; i < many; ++i, from += columns, to += pitch) {  // what is too much is overwritten by the next
        for (int64_t j = 0; j < whole; j += kStep) Isa::store_bytes(to + j, Isa::flipped(Isa::load_bytes(from + j)));
        if (whole < columns)
          Isa::store_bytes(to + whole, Isa::flipped(Isa::within(Isa::load_bytes(from + whole), low, high)));
      }
    }
    const int64_t quads = many * pitch / 4;
    for (int64_t quad = 0; quad < quads; quad += Isa::kWidth)
      for (int64_t lane = 0; lane < mpq::kWidest; lane += Isa::kWidth) {
        typename Isa::Bytes words[Isa::kWidth];
        Isa::transpose_words(padded + lane * ld + 4 * quad, ld, words);
        const int64_t count = smaller(Isa::kWidth, quads - quad);
        for (int64_t i = 0; i < count; ++i) Isa::store_bytes(out + (quad + i) * kQuad + 4 * lane, words[i]);
      }
  }
  return finite;
}

}  // namespace
