// Many activations rounded by one scale, and whether all were finite. Included by kernels.inl.

namespace {

float largest(const float* x, int64_t count) {
  int32_t top = 0;  // bits of |x| as integers: they grow with |x|, infinities and NaN above all numbers
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    top = bits > top ? bits : top;
  }
  float result;
  std::memcpy(&result, &top, 4);
  return finite(result) ? result : __builtin_nanf("");
}

// The quotient's integer by products with what is a little above and a little below 1 / scale, further than the rounded
// quotient may be from the true one: where both products round alike so does all between them, and where not lanes are
// divided after all. Integers stay in the low bits of magic + q. Where 1 / scale is too large or small for that, NaN in
// place of the upper product tells nothing, and all are divided.
struct Rounder {
  typename Isa::Vec scale, above, below, low, high, magic;

  explicit Rounder(float s)
      : scale(Isa::set1(s)),
        above(Isa::set1(s > 0x1p-100f && s < 0x1p100f ? 1 / s * (1 + 0x1p-22f) : __builtin_nanf(""))),
        below(Isa::set1(1 / s * (1 - 0x1p-22f))),
        low(Isa::set1(kRound - 127)),
        high(Isa::set1(kRound + 127)),
        magic(Isa::set1(kRound)) {}

  // N vectors of x -> magic + q, of a size below 2^23: a test serves them all. `strange` turns NaN where one holds an
  // infinity or NaN.
  template <int N>
  void integers(typename Isa::Vec (&x)[N], typename Isa::Vec& strange) const {
    typename Isa::Vec q[N];
    typename Isa::Ints apart = Isa::no_ints();
    multiply(x, q, apart);
    if (__builtin_expect(Isa::any(apart), 0))
      for (int i = 0; i < N; ++i) {
        q[i] = within(Isa::add(Isa::div(x[i], scale), magic));
        strange = Isa::multiply_add(x[i], Isa::zero(), strange);
      }
    for (int i = 0; i < N; ++i) x[i] = q[i];
  }
  // By products: these have told them all unless `apart` has bits then. Infinities are NaN apart. Where magic + q skips
  // integers, products below -2^22 are always apart; some between 2^22 and 2^23 look told, and are kept within 127 as
  // what is larger than that.
  template <int N>
  void multiply(const typename Isa::Vec (&x)[N], typename Isa::Vec (&q)[N], typename Isa::Ints& apart) const {
    for (int i = 0; i < N; ++i) {
      q[i] = Isa::fma(x[i], above, magic);
      apart = Isa::apart(apart, q[i], Isa::fma(x[i], below, magic));
    }
  }
  typename Isa::Vec within(typename Isa::Vec q) const { return Isa::min(Isa::max(q, low), high); }  // 127 in size
  // From x to out, where vectors lie `x_step` and `step` elements apart.
  template <int N, class T>
  void run(const float* x, int64_t x_step, T* out, int64_t step, typename Isa::Vec& strange) const {
    typename Isa::Vec v[N];
    for (int i = 0; i < N; ++i) v[i] = Isa::load(x + i * x_step);
    integers(v, strange);
    put(v, out, step);
  }

 private:
  template <int N>
  void put(const typename Isa::Vec (&q)[N], float* out, int64_t step) const {
    for (int i = 0; i < N; ++i) Isa::store(out + i * step, Isa::sub(within(q[i]), magic));
  }
  void put(const typename Isa::Vec (&q)[1], int8_t* out, int64_t) const { Isa::store_low_bytes(out, within(q[0])); }
  void put(const typename Isa::Vec (&q)[4], int8_t* out, int64_t step) const {
    if (step == Isa::kWidth)
      Isa::store_bytes(out, Isa::packed(q));
    else
      Isa::store_quarters(Isa::packed(q), out, step, 4);
  }
  void put(const typename Isa::Vec (&q)[8], int8_t* out, int64_t step) const {
    MPQ_UNROLL for (int i = 0; i < 8; i += 4) put({q[i], q[i + 1], q[i + 2], q[i + 3]}, out + i * step, step);
  }
};

// By one scale for all; where that is not above 0, by infinity: everything becomes 0.
inline Rounder rounder(float scale) { return Rounder(scale > 0 ? scale : __builtin_inff()); }

bool round_act(const float* x, int64_t count, float scale, float* out) {
  const Rounder round = rounder(scale);
  constexpr int64_t kWidth = Isa::kWidth;
  typename Isa::Vec strange = Isa::zero();
  int64_t i = 0;
  for (; i + 4 * kWidth <= count; i += 4 * kWidth) round.run<4>(x + i, kWidth, out + i, kWidth, strange);
  for (; i + kWidth <= count; i += kWidth) round.run<1>(x + i, kWidth, out + i, kWidth, strange);
  if (i < count) {
    float rest[kWidth] = {};
    std::memcpy(rest, x + i, (count - i) * sizeof(float));
    round.run<1>(rest, 0, rest, 0, strange);
    std::memcpy(out + i, rest, (count - i) * sizeof(float));
  }
  return Isa::sum(strange) == 0;
}

bool round_bytes(const float* x, int64_t x_ld, int64_t rows, int64_t count, float scale, int8_t* out, int64_t ld) {
  if (x_ld == count && ld == count) count *= rows, rows = 1;
  const Rounder round = rounder(scale);
  constexpr int64_t kWidth = Isa::kWidth, kOnce = kWidth * (kWidth == mpq::kWidest ? 8 : 4);
  typename Isa::Vec strange = Isa::zero();
  const int64_t wide = count / kOnce * kOnce;
  for (int64_t many; rows > 0; rows -= many, x += many * x_ld, out += many * ld) {
    many = rows < 4 ? 1 : 4;  // a test serves what is left of four rows
    for (int64_t r = 0; r < many; ++r)
      for (int64_t i = 0; i < wide; i += kOnce)
        round.run<kOnce / kWidth>(x + r * x_ld + i, kWidth, out + r * ld + i, kWidth, strange);
    if (count < kWidth)
      for (int64_t r = 0; r < many; ++r) {
        float rest[kWidth] = {};
        int8_t bytes[kWidth];
        std::memcpy(rest, x + r * x_ld, count * sizeof(float));
        round.run<1>(rest, 0, bytes, 0, strange);
        std::memcpy(out + r * ld, bytes, count);
      }
    else
      for (int64_t i = wide; i < count; i += kWidth) {
        const int64_t at = smaller(i, count - kWidth);  // the last vector may overlap the one before
        if (many == 4)
          round.run<4>(x + at, x_ld, out + at, ld, strange);
        else
          round.run<1>(x + at, 0, out + at, 0, strange);
      }
  }
  return Isa::sum(strange) == 0;
}

}  // namespace
