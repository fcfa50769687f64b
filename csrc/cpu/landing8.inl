// Where products with 8-bit activations leave their results: as floats, or as bytes that the next convolution takes.
// Included by kernels.inl.

namespace {

// Vectors of weight rows in a tile of results, at the most.
constexpr int kTileVecs = 2;

// Floats within the panel's range.
struct ToFloats {
  float* y;
  int64_t ld;
  const Clamp clamp;
  const bool far = false;       // as in Panel8
  const float* soon = nullptr;  // where C rows go soon, or null
  struct Held {};

  // Asks for memory there. Unrolled, addresses would be kept in registers of vectors.
  template <int C, int V>
  void fetch() const {
    if (!soon) return;
#pragma GCC unroll 1
    for (int c = 0; c < C; ++c)
      for (int v = 0; v < V; ++v) __builtin_prefetch(soon + c * ld + v * Isa::kWidth, 1);
  }
  // Vector v of V in row c of C, in order.
  template <int C, int V>
  [[gnu::always_inline]] inline void put(Held&, int c, int v, typename Isa::Vec sum) const {
    store_result(y + c * ld + v * Isa::kWidth, clamp(sum), far);
  }
  bool done(const Held&) const { return true; }
};

// Bytes, by products alone: what these cannot tell is left to who asks whether it is done. Calls in between would have
// all sums kept in memory. The range may as well be kept after rounding.
struct Rounding8 {
  const Rounder round;
  const typename Isa::Bytes low, high;
  struct Held {
    typename Isa::Ints apart = Isa::no_ints();
    bool told() const { return !Isa::any(apart); }
  };

  explicit Rounding8(const mpq::ByteGrid& grid)
      : round(rounder(grid.scale)), low(Isa::same_bytes(grid.low)), high(Isa::same_bytes(grid.high)) {}

  [[gnu::always_inline]] inline typename Isa::Bytes operator()(const typename Isa::Vec (&sums)[4], Held& held) const {
    typename Isa::Vec q[4];
    round.multiply(sums, q, held.apart);
    return Isa::within(Isa::packed(q), low, high);
  }
};

struct ToBytes {
  int8_t* y;
  int64_t ld;
  const Rounding8& rounding;
  struct Held : Rounding8::Held {
    typename Isa::Vec sums[4];  // of some rows
  };

  template <int C, int V>
  void fetch() const {}
  template <int C, int V>
  [[gnu::always_inline]] inline void put(Held& held, int c, int v, typename Isa::Vec sum) const {
    constexpr int kRows = 4 / V;
    const int at = c % kRows * V + v;
    held.sums[at] = sum;
    if (at < 3 && (c < C - 1 || v < V - 1)) return;
    MPQ_UNROLL for (int i = 1; i < 4; ++i) if (i > at) held.sums[i] = sum;
    int8_t* const first = y + (c - c % kRows) * ld;
    const typename Isa::Bytes bytes = rounding(held.sums, held);
    if constexpr (V == 2)
      Isa::store_halves(bytes, first, c % kRows ? first + ld : nullptr);
    else
      Isa::store_quarters(bytes, first, ld, c % kRows + 1);
  }
  bool done(const Held& held) const { return held.told(); }
};

}  // namespace
