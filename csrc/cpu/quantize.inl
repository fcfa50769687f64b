// Rounding one group of a weight to a grid, and how far off that is; written over `Isa` like kernels.inl, which
// includes this. Codes and errors come out the same on every instruction set: each step is one IEEE operation,
// and sums run in an order of their own.
namespace {

constexpr int64_t kSpan = 256;  // weights whose codes wait on the stack

// The range that a grid has to cover. It always holds 0, so that the zero lies in 0..top.
struct Range {
  float lo, hi;
  bool finite;
};

inline Range range_of(const float* w, int64_t count) {
  typename Isa::Vec lo = Isa::zero(), hi = Isa::zero(), bad = Isa::zero();
  int64_t k = 0;
  for (; k + Isa::kWidth <= count; k += Isa::kWidth) {
    const typename Isa::Vec v = Isa::load(w + k);
    lo = Isa::min(v, lo);
    hi = Isa::max(v, hi);
    bad = Isa::fma(v, Isa::zero(), bad);  // 0, or NaN from an infinity or NaN on
  }
  Range r{Isa::lowest(lo), Isa::highest(hi), Isa::sum(bad) == 0};
  for (; k < count; ++k) {
    r.lo = w[k] < r.lo ? w[k] : r.lo;
    r.hi = w[k] > r.hi ? w[k] : r.hi;
    r.finite &= finite(w[k]);
  }
  return r;
}

inline float stored(float v, bool half) {
  if (!half) return v;
  uint16_t h;
  Isa::floats_to_halves(&v, &h, 1);
  Isa::halves_to_floats(&h, &v, 1);
  return v;
}

// A grid over `fraction` of a range; scale and zero are of the stored type.
struct Fit {
  float scale, zero, top;

  Fit(const Range& r, float fraction, int bits, bool symmetric, bool half) : top(float(mpq::max_code(bits))) {
    if (symmetric) {
      zero = top / 2;
      scale = stored((r.hi > -r.lo ? r.hi : -r.lo) * fraction / zero, half);
    } else {
      scale = stored((r.hi - r.lo) * fraction / top, half);
      zero = scale > 0 ? stored(clamp(-r.lo * fraction / scale, 0, top), half) : 0;
    }
  }

  // out[i] = the nearest code of w[i], as a float: rounding clamp(w / scale + zero). Products with 1 / scale are tried
  // first. They are off by less than 5 * 2^-24 * top where the clamp does not hide it (three roundings of the quotient
  // and two of the sum, none above top), so only what lies that close to half a code needs the division.
  void codes(const float* w, int64_t count, float* out) const {
    int64_t k = 0;
    if (scale > 0) {
      const int64_t whole = count / Isa::kWidth * Isa::kWidth;
      if (!(scale > 0x1p-100f && scale < 0x1p100f && whole > 0 && multiplied(w, whole, out))) divided(w, whole, out);
      k = whole;
    }
    for (; k < count; ++k) out[k] = round_even(clamp(scale > 0 ? w[k] / scale + zero : zero, 0, top));
  }

  void divided(const float* w, int64_t count, float* out) const {
    const typename Isa::Vec s = Isa::set1(scale), z = Isa::set1(zero), last = Isa::set1(top), magic = Isa::set1(kRound);
    for (int64_t k = 0; k < count; k += Isa::kWidth) {
      const typename Isa::Vec v = Isa::add(Isa::div(Isa::load(w + k), s), z);
      Isa::store(out + k, Isa::sub(Isa::add(Isa::min(Isa::max(v, Isa::zero()), last), magic), magic));
    }
  }

  bool multiplied(const float* w, int64_t count, float* out) const {
    const typename Isa::Vec s = Isa::set1(1 / scale), z = Isa::set1(zero), last = Isa::set1(top),
                            magic = Isa::set1(kRound);
    typename Isa::Vec off = Isa::zero();
    for (int64_t k = 0; k < count; k += Isa::kWidth) {
      const typename Isa::Vec v = Isa::min(Isa::max(Isa::fma(Isa::load(w + k), s, z), Isa::zero()), last),
                              code = Isa::sub(Isa::add(v, magic), magic);
      Isa::store(out + k, code);
      off = Isa::max(Isa::absolute(Isa::sub(v, code)), off);
    }
    return Isa::highest(off) < 0.5f - 0x1p-21f * top;
  }

  // Sum of (w - scale * (code - zero))^2 in fp64, in which the difference is exact or nearly: 16 running sums.
  // The codes go to `bytes`, if given.
  double error(const float* w, int64_t count, uint8_t* bytes = nullptr) const {
    typename Isa::Doubles even = Isa::no_doubles(), odd = even;
    float code[kSpan];
    for (int64_t k0 = 0; k0 < count; k0 += kSpan, w += kSpan) {
      const int64_t n = smaller(kSpan, count - k0);
      codes(w, n, code);
      if (bytes)
        for (int64_t i = 0; i < n; ++i) bytes[k0 + i] = uint8_t(int(code[i]));
      int64_t k = 0;
      for (; k + 16 <= n; k += 16) {
        __builtin_prefetch(w + count + k);  // the next group
        Isa::add_squares(even, w + k, code + k, scale, zero);
        Isa::add_squares(odd, w + k + 8, code + k + 8, scale, zero);
      }
      for (; k < n; k += 8) {  // the last ones, filled up with weights that have no error
        float last[8] = {}, its_code[8];
        for (int i = 0; i < 8; ++i) its_code[i] = zero;
        std::memcpy(last, w + k, smaller(8, n - k) * sizeof(float));
        std::memcpy(its_code, code + k, smaller(8, n - k) * sizeof(float));
        Isa::add_squares(even, last, its_code, scale, zero);
      }
    }
    return Isa::total(even, odd);
  }
};

// MSE search: fractions 1, 0.98, ... 0.2 of the full range; the first of equals wins.
constexpr int kFractions = 41;
constexpr float kFractionStep = 0.02f;

bool quantize(const float* w, int64_t count, const mpq::QuantizeOptions& how, uint8_t* codes, mpq::Grid* grid) {
  const Range range = range_of(w, count);
  Fit best(range, 1, how.bits, how.symmetric, how.half_scales);
  if (!range.finite || !finite(best.scale)) return false;
  double error = best.error(w, count, codes);
  bool found = false;
  for (int i = 1; how.mse && i < kFractions; ++i) {
    const Fit fit(range, 1 - float(i) * kFractionStep, how.bits, how.symmetric, how.half_scales);
    const double e = fit.error(w, count);
    if (e < error) error = e, best = fit, found = true;
  }
  if (found) best.error(w, count, codes);
  *grid = {best.scale, best.zero, error};
  return true;
}

bool probe_errors(const float* w, int64_t count, const mpq::ProbeOptions& how, float* out, int64_t step) {
  const Range range = range_of(w, count);
  if (!range.finite) return false;
  for (int64_t b = 0; b < how.widths; ++b)
    for (int64_t f = 0; f < how.fraction_count; ++f) {
      const Fit fit(range, how.fractions[f], int(how.bits[b]), how.symmetric, how.half_scales);
      if (!finite(fit.scale)) return false;
      out[b * step + f] = float(fit.error(w, count));
    }
  return true;
}

}  // namespace
