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
  float lows[Isa::kWidth], highs[Isa::kWidth];
  Isa::store(lows, lo);
  Isa::store(highs, hi);
  Range r{0, 0, Isa::sum(bad) == 0};
  for (int i = 0; i < Isa::kWidth; ++i) {
    r.lo = lows[i] < r.lo ? lows[i] : r.lo;
    r.hi = highs[i] > r.hi ? highs[i] : r.hi;
  }
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

  // codes[i] = the nearest code of w[i], as floats
  void codes(const float* w, int64_t count, float* out) const {
    int64_t k = 0;
    if (scale > 0) {
      const typename Isa::Vec s = Isa::set1(scale), z = Isa::set1(zero), last = Isa::set1(top),
                              magic = Isa::set1(kRound);
      for (; k + Isa::kWidth <= count; k += Isa::kWidth) {
        const typename Isa::Vec v = Isa::add(Isa::div(Isa::load(w + k), s), z);
        Isa::store(out + k, Isa::sub(Isa::add(Isa::min(Isa::max(v, Isa::zero()), last), magic), magic));
      }
    }
    for (; k < count; ++k) out[k] = round_even(clamp(scale > 0 ? w[k] / scale + zero : zero, 0, top));
  }

  // Sum of (w - scale * (code - zero))^2 in fp64, in which the difference is exact or nearly: 16 running sums.
  double error(const float* w, int64_t count) const {
    typename Isa::Doubles even = Isa::no_doubles(), odd = even;
    float code[kSpan];
    for (int64_t k0 = 0; k0 < count; k0 += kSpan, w += kSpan) {
      const int64_t n = smaller(kSpan, count - k0);
      codes(w, n, code);
      int64_t k = 0;
      for (; k + 16 <= n; k += 16) {
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
    double sums[16];
    Isa::store(sums, even);
    Isa::store(sums + 8, odd);
    for (int step = 8; step > 0; step /= 2)
      for (int i = 0; i < step; ++i) sums[i] += sums[i + step];
    return sums[0];
  }
};

// MSE search: fractions 1, 0.98, ... 0.2 of the full range; the first of equals wins.
constexpr int kFractions = 41;
constexpr float kFractionStep = 0.02f;

bool quantize(const float* w, int64_t count, const mpq::QuantizeOptions& how, uint8_t* codes, mpq::Grid* grid) {
  const Range range = range_of(w, count);
  Fit best(range, 1, how.bits, how.symmetric, how.half_scales);
  if (!range.finite || !finite(best.scale)) return false;
  double error = best.error(w, count);
  if (how.mse)
    for (int i = 1; i < kFractions; ++i) {
      const Fit fit(range, 1 - float(i) * kFractionStep, how.bits, how.symmetric, how.half_scales);
      const double e = fit.error(w, count);
      if (e < error) error = e, best = fit;
    }
  float code[kSpan];
  for (int64_t k0 = 0; k0 < count; k0 += kSpan) {
    const int64_t n = smaller(kSpan, count - k0);
    best.codes(w + k0, n, code);
    for (int64_t k = 0; k < n; ++k) codes[k0 + k] = uint8_t(int(code[k]));
  }
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
