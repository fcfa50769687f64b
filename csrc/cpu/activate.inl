// What becomes of results in the end: ReLUs keep them within a range, SiLU and GELU bend them. Included by kernels.inl.
// Every step rounds once, so results are the same on every instruction set.
namespace {

using mpq::Activation;
using mpq::Range;

// The range as vectors. NaN passes: of two operands that do not compare, min and max return the second.
struct Clamp {
  typename Isa::Vec low, high;
  explicit Clamp(const Range& r) : low(Isa::set1(r.low)), high(Isa::set1(r.high)) {}
  typename Isa::Vec operator()(typename Isa::Vec v) const { return Isa::min(high, Isa::max(low, v)); }
};

// c[0] + c[1] x + ...
template <int N>
inline typename Isa::Vec polynomial(const float (&c)[N], typename Isa::Vec x) {
  typename Isa::Vec y = Isa::set1(c[N - 1]);
  MPQ_UNROLL for (int i = N - 2; i >= 0; --i) y = Isa::fused(y, x, Isa::set1(c[i]));
  return y;
}

// e^-x = 2^n 2^f with |f| <= 1/2, off by less than 2^-23 (1 + |x| / 8) of itself; infinity below -88, 0 above 87.
inline typename Isa::Vec falling(typename Isa::Vec x) {
  constexpr float kPowers[] = {1,
                               0.6931470037f,
                               0.2402224243f,
                               0.05550733581f,
                               0.009671512991f,
                               0.001326472731f};  // 2^f, off by less than 1e-7 of itself
  const typename Isa::Vec turns = Isa::set1(-1.44269504f), magic = Isa::set1(kRound + 127);
  x = Isa::min(Isa::set1(88), Isa::max(Isa::set1(-88.5f), x));
  const typename Isa::Vec turned = Isa::fused(x, turns, magic);  // 127 + n in the low bits
  return Isa::mul(polynomial(kPowers, Isa::fused(x, turns, Isa::sub(magic, turned))), Isa::power_of_two(turned));
}

// x / (1 + e^-x)
inline typename Isa::Vec silu(typename Isa::Vec x) { return Isa::div(x, Isa::add(Isa::set1(1), falling(x))); }

// x Phi(x) = max(x, 0) - |x| Phi(-|x|), where Phi(-u) = e^(-u^2/2) times a polynomial in 1 / (1 + u/4), in the manner
// of Hastings (1955; Abramowitz & Stegun 26.2.17). Fitted: off by less than 2^-28 |x|.
inline typename Isa::Vec gelu(typename Isa::Vec x) {
  constexpr float kTail[] = {0.1005603150f,  0.09947902709f, 0.06322000176f, 0.2196718305f,
                             -0.2119421810f, 0.3154633045f,  -0.08645231531f};  // of t, t^2, ...
  const typename Isa::Vec one = Isa::set1(1);
  const typename Isa::Vec u = Isa::min(Isa::set1(16), Isa::absolute(x));  // where the tail is below 1e-57
  const typename Isa::Vec t = Isa::div(one, Isa::fused(u, Isa::set1(0.25f), one));
  const typename Isa::Vec tail =
      Isa::mul(Isa::mul(polynomial(kTail, t), t), falling(Isa::mul(u, Isa::mul(u, Isa::set1(0.5f)))));
  return Isa::fused(Isa::sub(Isa::zero(), u), tail, Isa::max(Isa::zero(), x));
}

template <class F>
void each_of(float* y, int64_t rows, int64_t count, int64_t ld, const F& f) {
  if (ld == count) count *= rows, rows = 1;
  for (; rows > 0; --rows, y += ld) {
    int64_t i = 0;
    for (; i + Isa::kWidth <= count; i += Isa::kWidth) Isa::store(y + i, f(Isa::load(y + i)));
    if (i == count) continue;
    float rest[Isa::kWidth] = {};
    std::memcpy(rest, y + i, (count - i) * sizeof(float));
    Isa::store(rest, f(Isa::load(rest)));
    std::memcpy(y + i, rest, (count - i) * sizeof(float));
  }
}

void activate(Activation f, float* y, int64_t rows, int64_t count, int64_t ld) {
  using Vec = typename Isa::Vec;  // functions by name would be called through pointers
  if (f == Activation::silu) return each_of(y, rows, count, ld, [](Vec v) { return silu(v); });
  if (f == Activation::gelu) return each_of(y, rows, count, ld, [](Vec v) { return gelu(v); });
  if (f != Activation::none) each_of(y, rows, count, ld, Clamp(mpq::range_of(f)));
}

void finish(const float* in, int64_t in_ld, const float* bias, const Range& range, int64_t rows, int64_t count,
            float* y, int64_t ld, bool far) {
  const Clamp clamp(range);
  for (; rows > 0; --rows, in += in_ld, y += ld) {
    int64_t i = 0;
    for (; i + Isa::kWidth <= count; i += Isa::kWidth) {
      const typename Isa::Vec v = Isa::load(in + i);
      store_result(y + i, clamp(bias ? Isa::add(v, Isa::load(bias + i)) : v), far);
    }
    for (; i < count; ++i) {
      const float v = bias ? in[i] + bias[i] : in[i];
      y[i] = v < range.low ? range.low : v > range.high ? range.high : v;
    }
  }
}

}  // namespace
