// Many activations rounded by one scale. Included by kernels.inl.

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

// The quotient's integer by a product with 1 / scale: both lie within 3e-5 of the exact quotient up to 127, so they
// round alike unless a half is nearer than that, and then the lanes are divided after all.
struct Rounder {
  typename Isa::Vec scale, inverse, low, high, magic;
  bool safe;  // 1 / scale is a normal number

  explicit Rounder(float s)
      : scale(Isa::set1(s)),
        inverse(Isa::set1(1 / s)),
        low(Isa::set1(-127)),
        high(Isa::set1(127)),
        magic(Isa::set1(kRound)),
        safe(s > 0x1p-100f && s < 0x1p100f) {}

  typename Isa::Vec clamp(typename Isa::Vec v) const { return Isa::min(Isa::max(v, low), high); }
  typename Isa::Vec whole(typename Isa::Vec v) const { return Isa::sub(Isa::add(v, magic), magic); }
  typename Isa::Vec operator()(typename Isa::Vec x) const {
    const typename Isa::Vec v = clamp(Isa::mul(x, inverse)), q = whole(v);
    if (safe && !Isa::any_above(Isa::absolute(Isa::sub(v, q)), 0.4999f)) return q;
    return whole(clamp(Isa::div(x, scale)));
  }
};

void round_act(const float* x, int64_t count, float scale, float* out) {
  if (!(scale > 0)) {
    std::memset(out, 0, count * sizeof(float));
    return;
  }
  const Rounder round(scale);
  int64_t i = 0;
  for (; i + Isa::kWidth <= count; i += Isa::kWidth) Isa::store(out + i, round(Isa::load(x + i)));
  if (i == count) return;
  float rest[Isa::kWidth] = {};
  std::memcpy(rest, x + i, (count - i) * sizeof(float));
  Isa::store(rest, round(Isa::load(rest)));
  std::memcpy(out + i, rest, (count - i) * sizeof(float));
}

void round_bytes(const float* x, int64_t x_ld, int64_t rows, int64_t count, float scale, int8_t* out, int64_t ld) {
  if (x_ld == count && ld == count) count *= rows, rows = 1;
  const Rounder round(scale > 0 ? scale : 1);
  for (; rows > 0; --rows, x += x_ld, out += ld) {
    if (!(scale > 0)) {
      std::memset(out, 0, count);
      continue;
    }
    int64_t i = 0;
    for (; i + Isa::kWidth <= count; i += Isa::kWidth) Isa::store_rounded(out + i, round(Isa::load(x + i)));
    if (i == count) continue;
    float rest[Isa::kWidth] = {};
    int8_t bytes[Isa::kWidth];
    std::memcpy(rest, x + i, (count - i) * sizeof(float));
    Isa::store_rounded(bytes, round(Isa::load(rest)));
    std::memcpy(out + i, bytes, count - i);
  }
}

}  // namespace
