// Rounding the groups of a weight's row to grids, and how far off that is; written over `Isa` like kernels.inl, which
// includes this. Codes and errors come out the same on every instruction set: each step is one IEEE operation or one
// fused multiply-add, and sums run in an order of their own.
namespace {

constexpr int kLanes = kBlock;  // sums that run side by side ...
constexpr int64_t kSpan = 256;  // ... over so many weights in fp32; fp64 from there on
constexpr int64_t kBatch = 16;  // groups whose grids are computed together

// Up to kBatch groups of a row, one after the other; the last may be short.
struct Batch {
  const float* w;
  int64_t weights, group;

  int64_t groups() const { return mpq::ceil_div(weights, group); }
  int64_t size(int64_t g) const { return smaller(group, weights - g * group); }
};

// The ranges that grids have to cover. They always hold 0, so that the zero lies in 0..top.
struct Ranges {
  float lo[kBatch] = {}, hi[kBatch] = {};
  bool all_finite;

  explicit Ranges(const Batch& b) {
    typename Isa::Vec lows[kBatch], highs[kBatch], bad[kVecs];
    for (typename Isa::Vec& v : bad) v = Isa::zero();
    for (int64_t g = 0; g < b.groups(); ++g) {
      const float* w = b.w + g * b.group;
      typename Isa::Vec low[kVecs], high[kVecs];
      for (int i = 0; i < kVecs; ++i) low[i] = high[i] = Isa::zero();
      for (int64_t k = 0; k + kLanes <= b.size(g); k += kLanes) {
        __builtin_prefetch(w + k / 2 + b.weights);  // half of the next batch; the rest in Fit::span
        for (int i = 0; i < kVecs; ++i) {
          const typename Isa::Vec v = Isa::load(w + k + i * Isa::kWidth);
          low[i] = Isa::min(v, low[i]);
          high[i] = Isa::max(v, high[i]);
          bad[i] = Isa::fma(v, Isa::zero(), bad[i]);  // 0, or NaN from an infinity or NaN on
        }
      }
      for (int i = 1; i < kVecs; ++i) low[0] = Isa::min(low[i], low[0]), high[0] = Isa::max(high[i], high[0]);
      lows[g] = low[0], highs[g] = high[0];
    }
    for (int64_t g = 0; g < b.groups(); ++g) lo[g] = Isa::lowest(lows[g]), hi[g] = Isa::highest(highs[g]);
    for (int i = 1; i < kVecs; ++i) bad[0] = Isa::add(bad[0], bad[i]);
    all_finite = Isa::sum(bad[0]) == 0;
    const int64_t last = b.groups() - 1;
    for (int64_t k = b.weights - b.weights % kLanes; k < b.weights; ++k) {  // of the last group
      lo[last] = b.w[k] < lo[last] ? b.w[k] : lo[last];
      hi[last] = b.w[k] > hi[last] ? b.w[k] : hi[last];
      all_finite &= finite(b.w[k]);
    }
  }
};

inline void store_rounded(float* v, bool half) {
  if (!half) return;
  uint16_t h[kBatch];
  Isa::floats_to_halves(v, h, kBatch);
  Isa::halves_to_floats(h, v, kBatch);
}

struct Span {
  typename Isa::Vec squares, near;
};

// One group's grid.
struct Fit {
  float scale, zero, top;
  float inverse;       // 1 / scale
  float coarse, fine;  // their sum is the zero; the coarse part is a multiple of 2^-15, and code - coarse exact

  // The code of each weight and what it is off by: clamp(w / scale + zero) rounded to nearest even. A product with
  // 1 / scale is off by less than 5 * 2^-24 * top where the clamp does not hide it (three roundings of the quotient and
  // two of the sum, none above top), so unless `near` grows to that close to half a code, DIVIDE makes no difference.
  template <bool DIVIDE>
  typename Isa::Vec step(typename Isa::Vec w, typename Isa::Vec* code, typename Isa::Vec* near) const {
    const typename Isa::Vec magic = Isa::set1(kRound), z = Isa::set1(zero);
    typename Isa::Vec v;
    if constexpr (DIVIDE)
      v = Isa::add(Isa::div(w, Isa::set1(scale > 0 ? scale : __builtin_inff())), z);  // without a scale, the zero
    else
      v = Isa::fma(w, Isa::set1(inverse), z);
    v = Isa::min(Isa::max(v, Isa::zero()), Isa::set1(top));
    *code = Isa::sub(Isa::add(v, magic), magic);
    if constexpr (!DIVIDE) *near = Isa::max(Isa::absolute(Isa::sub(v, *code)), *near);
    const typename Isa::Vec off = Isa::fused(Isa::set1(-scale), Isa::sub(*code, Isa::set1(coarse)), w);
    return Isa::fused(Isa::set1(scale), Isa::set1(fine), off);
  }

  // The squared errors of at most kSpan weights, as one vector to sum up, and how near to half a code any was. Codes go
  // to `codes` if given; `ahead` weights further on are the next ones, fetched meanwhile.
  template <bool DIVIDE>
  void span(const float* w, int64_t count, int64_t ahead, Span* out, float* codes) const {
    typename Isa::Vec lanes[kVecs], near[kVecs], code;
    for (int i = 0; i < kVecs; ++i) lanes[i] = near[i] = Isa::zero();
    auto block = [&](const float* at, float* its_codes, auto keep) {
      for (int i = 0; i < kVecs; ++i) {
        const typename Isa::Vec e = keep(step<DIVIDE>(Isa::load(at + i * Isa::kWidth), &code, &near[i]), i);
        lanes[i] = Isa::fused(e, e, lanes[i]);
        if (its_codes) Isa::store(its_codes + i * Isa::kWidth, code);
      }
    };
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) {
      for (int i = 0; i < kLanes; i += 16) __builtin_prefetch(w + k + ahead + i);
      block(w + k, codes ? codes + k : nullptr, [](auto e, int) { return e; });
    }
    if (k < count) {  // filled up with the last weight, whose error then counts once
      float last[kLanes], real[kLanes], its_codes[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        last[i] = w[smaller(k + i, count - 1)];
        real[i] = k + i < count ? 1.0f : 0.0f;
      }
      block(last, its_codes, [&](auto e, int i) { return Isa::mul(e, Isa::load(real + i * Isa::kWidth)); });
      if (codes) std::memcpy(codes + k, its_codes, (count - k) * sizeof(float));
    }
    for (int stride = kVecs / 2; stride > 0; stride /= 2)
      for (int i = 0; i < stride; ++i) {
        lanes[i] = Isa::add(lanes[i], lanes[i + stride]);
        near[i] = Isa::max(near[i], near[i + stride]);
      }
    *out = {lanes[0], near[0]};
  }

  // The sum of what span<false> left, or of a span with divisions where products would not do.
  float sum(const Span& s, const float* w, int64_t count, float* codes = nullptr) const {
    const bool products = scale > 0x1p-100f && scale < 0x1p100f && !Isa::any_above(s.near, 0.5f - 0x1p-21f * top);
    return products ? Isa::sum(s.squares) : divided(w, count, codes);
  }

  [[gnu::noinline, gnu::cold]] float divided(const float* w, int64_t count, float* codes) const {
    Span s;
    span<true>(w, count, 0, &s, codes);
    return Isa::sum(s.squares);
  }

  // Codes and their error, which is that of `errors`.
  double codes(const float* w, int64_t count, int64_t ahead, uint8_t* out) const {
    double error = 0;
    for (int64_t k = 0; k < count; k += kSpan) {
      const int64_t n = smaller(kSpan, count - k);
      float code[kSpan];
      Span s;
      span<false>(w + k, n, ahead, &s, code);
      error += sum(s, w + k, n, code);
      for (int64_t i = 0; i < n; ++i) out[k + i] = uint8_t(int(code[i]));
    }
    return error;
  }
};

// Grids over `fraction` of a batch's ranges; scales and zeros are of the stored type.
struct Fits {
  float scale[kBatch], zero[kBatch], inverse[kBatch], top;

  Fits(const Ranges& r, float fraction, int bits, bool symmetric, bool half) : top(float(mpq::max_code(bits))) {
    const typename Isa::Vec part = Isa::set1(fraction), last = Isa::set1(top);
    for (int i = 0; i < kBatch; i += Isa::kWidth) {
      const typename Isa::Vec lo = Isa::load(r.lo + i), hi = Isa::load(r.hi + i);
      const typename Isa::Vec v = symmetric ? Isa::max(hi, Isa::sub(Isa::zero(), lo)) : Isa::sub(hi, lo);
      Isa::store(scale + i, Isa::div(Isa::mul(v, part), symmetric ? Isa::set1(top / 2) : last));
    }
    store_rounded(scale, half);
    for (int i = 0; i < kBatch; i += Isa::kWidth) {
      const typename Isa::Vec s = Isa::load(scale + i), below = Isa::sub(Isa::zero(), Isa::load(r.lo + i));
      const typename Isa::Vec z = Isa::min(Isa::max(Isa::div(Isa::mul(below, part), s), Isa::zero()), last);
      Isa::store(zero + i, symmetric ? Isa::set1(top / 2) : z);
      Isa::store(inverse + i, Isa::div(Isa::set1(1), s));
    }
    if (!symmetric) store_rounded(zero, half);
    for (int i = 0; i < kBatch; ++i) zero[i] = scale[i] > 0 || symmetric ? zero[i] : 0;
  }

  Fit operator[](int64_t g) const {
    const float coarse = (zero[g] + 384.0f) - 384.0f;
    return {scale[g], zero[g], top, inverse[g], coarse, zero[g] - coarse};
  }
};

// error[g] = sum of (w - scale * (code - zero))^2 over group g. Each difference is off by at most 2^-23 of itself, and
// a span's sum of squares by 13 roundings (8 weights a lane, then halving): together less than 2^-19. fp32's range
// holds: squares below 2^-149 are 0. Lanes are summed for many spans together, which hides the latency.
void errors(const Batch& b, const Fits& fits, double* error) {
  const int64_t each = mpq::ceil_div(b.group, kSpan);
  const int64_t spans = (b.groups() - 1) * each + mpq::ceil_div(b.size(b.groups() - 1), kSpan);
  auto at = [&](int64_t u, auto body) {
    const int64_t g = each == 1 ? u : u / each, k = (u - g * each) * kSpan;
    body(g, fits[g], b.w + g * b.group + k, smaller(kSpan, b.size(g) - k));
  };
  for (int64_t g = 0; g < b.groups(); ++g) error[g] = 0;
  for (int64_t u = 0; u < spans; u += kBatch) {
    const int64_t count = smaller(kBatch, spans - u);
    Span span[kBatch];
    for (int64_t i = 0; i < count; ++i)
      at(u + i, [&](int64_t, const Fit& fit, const float* w, int64_t n) {
        fit.span<false>(w, n, b.weights, &span[i], nullptr);
      });
    for (int64_t i = 0; i < count; ++i)
      at(u + i, [&](int64_t g, const Fit& fit, const float* w, int64_t n) { error[g] += fit.sum(span[i], w, n); });
  }
}

// body(batch, its first group) over a row, until one is false.
template <class F>
bool each_batch(const float* w, int64_t k, int64_t group, const F& body) {
  for (int64_t k0 = 0; k0 < k; k0 += kBatch * group)
    if (!body(Batch{w + k0, smaller(kBatch * group, k - k0), group}, k0 / group)) return false;
  return true;
}

// MSE search: fractions 1, 0.98, ... 0.2 of the full range; the first of equals wins.
constexpr int kFractions = 41;
constexpr float kFractionStep = 0.02f;

bool quantize(const float* w, int64_t k, int64_t group, const mpq::QuantizeOptions& how, uint8_t* codes,
              mpq::Grid* grids) {
  return each_batch(w, k, group, [&](const Batch& b, int64_t first) {
    const Ranges ranges(b);
    if (!ranges.all_finite) return false;
    Fit best[kBatch];
    double least[kBatch], error[kBatch] = {};
    for (int i = 0; i < (how.mse ? kFractions : 1); ++i) {
      const Fits fits(ranges, 1 - float(i) * kFractionStep, how.bits, how.symmetric, how.half_scales);
      if (how.mse) errors(b, fits, error);
      for (int64_t g = 0; g < b.groups(); ++g) {
        if (i == 0 && !finite(fits.scale[g])) return false;
        if (i == 0 || error[g] < least[g]) least[g] = error[g], best[g] = fits[g];
      }
    }
    for (int64_t g = 0; g < b.groups(); ++g) {
      const double e = best[g].codes(b.w + g * group, b.size(g), b.weights, codes + (first + g) * group);
      grids[first + g] = {best[g].scale, best[g].zero, e};
    }
    return true;
  });
}

bool probe_errors(const float* w, int64_t k, int64_t group, const mpq::ProbeOptions& how, float* out, int64_t step) {
  return each_batch(w, k, group, [&](const Batch& b, int64_t first) {
    const Ranges ranges(b);
    if (!ranges.all_finite) return false;
    for (int64_t width = 0; width < how.widths; ++width)
      for (int64_t f = 0; f < how.fraction_count; ++f) {
        const Fits fits(ranges, how.fractions[f], int(how.bits[width]), how.symmetric, how.half_scales);
        double error[kBatch];
        errors(b, fits, error);
        for (int64_t g = 0; g < b.groups(); ++g) {
          if (!finite(fits.scale[g])) return false;
          out[width * step + (first + g) * how.fraction_count + f] = float(error[g]);
        }
      }
    return true;
  });
}

}  // namespace
