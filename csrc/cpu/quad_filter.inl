// Depthwise convolutions of quads of bytes: one product takes four taps of a row. Included by kernels.inl.

namespace {

static_assert(Isa::kQuadMost <= 2 * 127 + mpq::kByteMost);  // of 2 * weight + rest, both bytes

// ---- codes -> weights -------------------------------------------------------------------------------

// A word of each of kWidest channels; elements of arrays that need not be aligned.
using Words = int32_t __attribute__((vector_size(4 * mpq::kWidest), aligned(4), may_alias));

void quad_weights(const mpq::QuadShape& shape, const uint8_t* codes, int64_t ld, int each, const int32_t* offsets,
                  uint32_t* weights, uint32_t* rest, int32_t* sums) {
  constexpr int64_t kLanes = mpq::kWidest, kTurned = Isa::kWidth;
  const int64_t steps = mpq::quad_steps(shape.columns, shape.step), many = 2 / shape.step;
  std::memset(weights, 0, shape.words() * sizeof(uint32_t));
  if (rest) std::memset(rest, 0, shape.words() * sizeof(uint32_t));
  uint32_t turned[kTurned][kLanes];  // four codes a word, channels side by side
  const Words offset = *reinterpret_cast<const Words*>(offsets);
  Words sum = {};
  for (int64_t row = 0, t = 0; row < shape.rows; ++row) {
    reinterpret_cast<Words*>(sums)[row] = sum;
    for (int64_t column = 0; column < shape.columns; ++column, ++t) {
      if (t % (4 * kTurned) == 0)
        for (int64_t lane = 0; lane < kLanes; lane += kTurned) {
          typename Isa::Bytes words[kTurned];
          Isa::transpose_words(codes + lane * ld + t, ld, words);
          for (int i = 0; i < kTurned; ++i) Isa::store_bytes(turned[i] + lane, words[i]);
        }
      const Words code = *reinterpret_cast<const Words*>(turned[t / 4 % kTurned]) >> int(t % 4 * 8) & 255;
      const Words w = each * code - offset;
      sum += w;
      Words high = w;
      if (rest) {
        high = w >> 1;
        high = high < -128 ? Words{} - 128 : high;  // what is too much is left to the rest
        high = high > 127 ? Words{} + 127 : high;
      }
      for (int64_t e = 0; e < many; ++e) {
        const int64_t at = (row * steps + (column + e) / 4) * many + e;
        const int shift = int((column + e) % 4 * 8);
        reinterpret_cast<Words*>(weights)[at] |= (high & 255) << shift;
        if (rest) reinterpret_cast<Words*>(rest)[at] |= ((w - 2 * high) & 255) << shift;
      }
    }
  }
  reinterpret_cast<Words*>(sums)[shape.rows] = sum;
}

// ---- quads -> results -------------------------------------------------------------------------------

// STEP: from result to result in pixels, 1 or 2. In each quad begin 4 / STEP results: the first half of them meet the
// quad itself, the others the one that begins in its middle.
template <int QUADS, int STEP>
inline void quad_sums(const mpq::QuadTask& r, const uint8_t* x, const uint32_t* weights,
                      typename Isa::Ints (&acc)[QUADS][4 / STEP]) {
  constexpr int kEach = 2 / STEP;
  for (int64_t s = 0; s < r.steps; ++s, weights += kEach * mpq::kWidest) {
    typename Isa::Bytes w[kEach];
    MPQ_UNROLL for (int e = 0; e < kEach; ++e) w[e] = Isa::load_bytes(weights + e * mpq::kWidest);
    const uint8_t* at = x + r.offsets[s];
    typename Isa::Bytes q = Isa::held(Isa::load_bytes(at));
    MPQ_UNROLL for (int i = 0; i < QUADS; ++i) {
      const typename Isa::Bytes next = Isa::held(Isa::load_bytes(at + (i + 1) * kQuad)), middle = Isa::middle(q, next);
      MPQ_UNROLL for (int e = 0; e < kEach; ++e) {
        acc[i][e] = Isa::quad_dot(acc[i][e], q, w[e]);
        acc[i][kEach + e] = Isa::quad_dot(acc[i][kEach + e], middle, w[e]);
      }
      q = next;
    }
  }
}

// Where they go: floats, or bytes, of which some may be left to who asks whether it is done.
template <bool FAR>  // goes_far, told apart outside of the loops
struct QuadFloats {
  float* y;
  int64_t pixel;
  const Clamp clamp;
  struct Held {};

  // Results i..i + 3 of a tile in which `left` are wanted, for channels from a lane on.
  [[gnu::always_inline]] inline void put(Held&, int i, int64_t left, int lane,
                                         const typename Isa::Vec (&sums)[4]) const {
    MPQ_UNROLL for (int j = 0; j < 4; ++j) if (i + j < left)
        store_result(y + (i + j) * pixel + lane, clamp(sums[j]), FAR);
  }
  bool done(const Held&) const { return true; }
};

struct QuadBytes {
  int8_t* y;
  int64_t pixel;
  const Rounding8& rounding;
  using Held = Rounding8::Held;

  [[gnu::always_inline]] inline void put(Held& held, int i, int64_t left, int lane,
                                         const typename Isa::Vec (&sums)[4]) const {
    const typename Isa::Bytes bytes = rounding(sums, held);
    int8_t* const at = y + i * pixel + lane;
    if (i + 4 <= left)
      Isa::store_quarters(bytes, at, pixel, 4);
    else
      Isa::store_quarters(bytes, at, pixel, int(left - i));
  }
  bool done(const Held& held) const { return held.told(); }
};

// Results of QUADS quads of a block, `from` bytes on.
template <int QUADS, int STEP, class To>
inline bool quad_tile(const mpq::QuadTask& r, const mpq::QuadBlock& block, int64_t from, int64_t left, const To& to) {
  constexpr int kMany = 4 / STEP, kAll = QUADS * kMany;
  typename To::Held held;
  for (int lane = 0; lane < mpq::kWidest; lane += Isa::kWidth) {
    const uint8_t* x = block.x + from + 4 * lane;
    typename Isa::Ints acc[QUADS][kMany];
    const typename Isa::Ints start =  // each pixel is 128 too large
        Isa::template difference<7>(Isa::load_ints(block.before + lane), Isa::load_ints(block.upto + lane));
    MPQ_UNROLL for (int i = 0; i < kAll; ++i) acc[i / kMany][i % kMany] = block.rest ? Isa::no_ints() : start;
    quad_sums<QUADS, STEP>(r, x, block.weights + lane, acc);
    if (block.rest) {
      MPQ_UNROLL for (int i = 0; i < kAll; ++i) {
        typename Isa::Ints& sum = acc[i / kMany][i % kMany];
        sum = Isa::template added<8>(start, Isa::template added<8>(sum, sum));
      }
      quad_sums<QUADS, STEP>(r, x, block.rest + lane, acc);
    }
    const typename Isa::Vec scale = Isa::load(block.scale + lane), bias = Isa::load(block.bias + lane);
    MPQ_UNROLL for (int i = 0; i < kAll; i += 4) if (i < left) {
      typename Isa::Vec sums[4];
      MPQ_UNROLL for (int j = 0; j < 4; ++j) {
        const int at = i + j < kAll ? i + j : kAll - 1;
        sums[j] = Isa::fused(scale, Isa::to_floats(acc[at / kMany][at % kMany]), bias);
      }
      to.put(held, i, left, lane, sums);
    }
  }
  return to.done(held);
}

// The same of all rows and blocks, from the `first` quad on: results of a pixel follow each other in memory.
template <int QUADS, int STEP, bool FAR>
bool quad_column(const mpq::QuadTask& r, int64_t first, int64_t quads) {
  if constexpr (QUADS > 1)
    if (quads < QUADS) return quad_column<QUADS - 1, STEP, FAR>(r, first, quads);
  constexpr int64_t kAll = QUADS * 4 / STEP;
  const int64_t begin = first * 4 / STEP, left = smaller(kAll, r.out_width - begin);
  const Clamp clamp(r.range);
  int64_t x = first * kQuad;
  if (!r.y8) {
    float* y = r.y + begin * r.y_pixel;
    for (int64_t row = 0; row < r.rows; ++row, x += r.x_row, y += r.y_row)
      for (int64_t b = 0; b < r.blocks; ++b) {
        float* const to = y + b * mpq::kWidest;
        for (int64_t i = 0; r.soon && i < left; ++i) __builtin_prefetch(to + r.soon + i * r.y_pixel, 1);
        quad_tile<QUADS, STEP>(r, r.block[b], x, left, QuadFloats<FAR>{to, r.y_pixel, clamp});
      }
    return true;
  }
  const Rounding8 rounding(r.grid);
  bool finite = true;
  for (int64_t row = 0; row < r.rows; ++row, x += r.x_row)
    for (int64_t b = 0; b < r.blocks; ++b) {
      int8_t* y = r.y8 + row * r.y_row + begin * r.y_pixel + b * mpq::kWidest;
      if (quad_tile<QUADS, STEP>(r, r.block[b], x, left, QuadBytes{y, r.y_pixel, rounding})) continue;
      float sums[kAll * mpq::kWidest];
      quad_tile<QUADS, STEP>(r, r.block[b], x, left, QuadFloats<false>{sums, mpq::kWidest, clamp});
      finite &= round_bytes(sums, mpq::kWidest, left, mpq::kWidest, r.grid.scale, y, r.y_pixel);
    }
  return finite;
}

template <int STEP, bool FAR>
bool quad_columns(const mpq::QuadTask& r) {
  constexpr int kMost = (Isa::kWidth == mpq::kWidest ? 4 : 2) * STEP;
  const int64_t quads = mpq::ceil_div(r.out_width, 4 / STEP);
  int64_t columns = mpq::ceil_div(quads, kMost);
  bool finite = true;
  for (int64_t first = 0, many; first < quads; first += many, --columns) {
    many = mpq::ceil_div(quads - first, columns);  // columns are about equal
    finite &= quad_column<kMost, STEP, FAR>(r, first, many);
  }
  return finite;
}

bool filter_quads(const mpq::QuadTask& r) {
  if constexpr (Isa::kFar)
    if (r.far) return r.step == 1 ? quad_columns<1, true>(r) : quad_columns<2, true>(r);
  return r.step == 1 ? quad_columns<1, false>(r) : quad_columns<2, false>(r);
}

}  // namespace
