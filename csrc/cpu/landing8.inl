// Where products with 8-bit activations leave their results: as floats, or as bytes that the next convolution takes.
// Included by kernels.inl.

namespace {

// Vectors of weight rows in a tile of results.
constexpr int kTileVecs = 2;

// Floats within the panel's range.
struct ToFloats {
  float* y;
  int64_t ld;
  const Clamp clamp;
  struct Held {};

  // Asks for where C rows go. Rows without gaps are on their way elsewhere, and in a cache. Unrolled, addresses would
  // be kept in registers of vectors.
  template <int C>
  void fetch() const {
    if (ld == kTileVecs * Isa::kWidth) return;
#pragma GCC unroll 1
    for (int c = 0; c < C; ++c)
      for (int v = 0; v < kTileVecs; ++v) __builtin_prefetch(y + c * ld + v * Isa::kWidth, 1);
  }
  // Vector v of row c of C, in order.
  template <int C>
  [[gnu::always_inline]] inline void put(Held&, int c, int v, typename Isa::Vec sum) const {
    Isa::store(y + c * ld + v * Isa::kWidth, clamp(sum));
  }
  bool done(const Held&) const { return true; }
};

// Bytes, rounded as in `round_act` by products alone: what these cannot tell is left to who asks whether it is done.
// Calls in between would have all sums kept in memory.
struct Rounding8 {
  const Rounder round;
  typename Isa::Bytes low, high;  // the range, which may as well be kept after rounding

  Rounding8(float scale, const Range& range) : round(rounder(scale)) {
    const float ends[2] = {range.low < -FLT_MAX ? -FLT_MAX : range.low, range.high > FLT_MAX ? FLT_MAX : range.high};
    int8_t rounded[2], both[2][4 * Isa::kWidth];
    round_bytes(ends, 2, 1, 2, scale, rounded, 2);
    for (int i = 0; i < 2; ++i) std::memset(both[i], rounded[i], sizeof both[i]);
    low = Isa::load_bytes(both[0]), high = Isa::load_bytes(both[1]);
  }
};

struct ToBytes {
  int8_t* y;
  int64_t ld;
  const Rounding8& rounding;
  struct Held {
    typename Isa::Vec sums[4];  // of two rows
    typename Isa::Ints unlike = Isa::no_ints(), bits = Isa::no_ints();
  };

  template <int C>
  void fetch() const {}
  template <int C>
  [[gnu::always_inline]] inline void put(Held& held, int c, int v, typename Isa::Vec sum) const {
    static_assert(kTileVecs == 2);
    held.sums[c % 2 * 2 + v] = sum;
    if (v == 0 || (c % 2 == 0 && c + 1 < C)) return;
    if (c % 2 == 0) held.sums[2] = held.sums[0], held.sums[3] = held.sums[1];
    typename Isa::Vec q[4];
    rounding.round.multiply(held.sums, q, held.unlike, held.bits);
    int8_t* const first = y + (c - c % 2) * ld;
    Isa::store_halves(Isa::within(Isa::packed(q), rounding.low, rounding.high), first, c % 2 ? first + ld : nullptr);
  }
  bool done(const Held& held) const { return Rounder::told(held.unlike, held.bits); }
};

}  // namespace
