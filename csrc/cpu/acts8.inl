// Activations of 8 bits: rounded, summed, and put into the order in which codes meet them. Included by kernels.inl.

namespace {

// ---- rounding activations ---------------------------------------------------------------------------

void quantize_act(const float* x, int64_t kp, int64_t group, mpq::FixedScale fixed, int8_t* q, float* scale) {
  constexpr int kWidth = Isa::kWidth;
  const typename Isa::Vec top = Isa::set1(127), low = Isa::set1(-127);
  for (int64_t k0 = 0; k0 < kp; k0 += group, ++scale) {
    const int64_t k1 = smaller(kp, k0 + group);
    typename Isa::Vec most = Isa::zero(), strange = Isa::zero();
    for (int64_t k = k0; k < k1; k += kWidth) {
      const typename Isa::Vec v = Isa::load(x + k);
      most = Isa::max(most, Isa::absolute(v));
      strange = Isa::multiply_add(v, Isa::zero(), strange);  // NaN once there is an infinity or NaN
    }
    const float known = fixed.values ? fixed.values[fixed.each ? k0 / group : 0] : Isa::highest(most) / 127.0f;
    const float s = known + Isa::sum(strange);  // infinities and NaN reach every result
    *scale = s;
    if (!(s > 0)) {
      std::memset(q + k0, 0, k1 - k0);
      continue;
    }
    for (int64_t k = k0; k < k1; k += kWidth)
      Isa::store_rounded(q + k, Isa::min(Isa::max(Isa::div(Isa::load(x + k), Isa::set1(s)), low), top));
  }
}

// ---- in which order codes and activations meet ------------------------------------------------------

// A 4-byte word of packed codes holds 4 * kFields of them, and its i-th field of each byte is taken out at once: codes
// i, i + kFields, ... of the word make the i-th quad. Panels are in this order, and activations are put into it.
template <int BITS>
constexpr int kFields = 8 / BITS;

constexpr int64_t kStep = 4 * Isa::kWidth;  // bytes of a vector

template <int BITS>
struct ByteOrder {
  alignas(64) uint8_t from[kStep] = {};  // within each 16, a word or two

  constexpr ByteOrder() {
    for (int j = 0; j < kStep; ++j) {
      const int at = j % 16, word = at / (4 * kFields<BITS>), quad = at / 4 % kFields<BITS>;
      from[j] = uint8_t(word * 4 * kFields<BITS> + at % 4 * kFields<BITS> + quad);
    }
  }
};

// Sums of up to kWidth rows, each found by sum(r) as a vector of parts, exact: below 2^24.
template <class Sum>
inline typename Isa::Vec sums_of(int64_t rows, const Sum& sum) {
  typename Isa::Vec sums[Isa::kWidth];
  for (typename Isa::Vec& s : sums) s = Isa::zero();
  for (int64_t r = 0; r < rows; ++r) sums[r] = Isa::to_floats(sum(r));
  return Isa::sums(sums);
}

template <int BITS>
void order_rows(const int8_t* in, int64_t in_ld, int64_t rows, int64_t count, int8_t* out, int64_t ld, int64_t width,
                float* sums) {
  static constexpr ByteOrder<BITS> kOrder;
  const typename Isa::Bytes order = Isa::load_bytes(kOrder.from);
  uint8_t bytes[kStep];
  std::memset(bytes, 1, kStep);
  const typename Isa::Bytes ones = Isa::load_bytes(bytes);
  const int64_t whole = count / kStep * kStep;
  const auto put = [&](int64_t r) {
    const int8_t* from = in + r * in_ld;
    int8_t* to = out + r * ld;
    typename Isa::Ints sum = Isa::no_ints();
    for (int64_t k = 0; k < whole; k += kStep) {
      const typename Isa::Bytes b = Isa::load_bytes(from + k);
      sum = Isa::quad_dot(sum, ones, b);
      Isa::store_bytes(to + k, BITS == 8 ? b : Isa::shuffled(b, order));
    }
    if (whole < width) {
      const typename Isa::Bytes b = Isa::load_some(from + whole, count - whole);
      sum = Isa::quad_dot(sum, ones, b);
      Isa::store_some(to + whole, BITS == 8 ? b : Isa::shuffled(b, order), width - whole);
    }
    return sum;
  };
  for (int64_t r = 0; r < rows; r += Isa::kWidth) {
    const int64_t used = smaller(Isa::kWidth, rows - r);
    float found[Isa::kWidth];
    Isa::store(found, sums_of(used, [&](int64_t i) { return put(r + i); }));
    if (sums) std::memcpy(sums + r, found, used * sizeof(float));
  }
}

void order_a8(int bits, const int8_t* in, int64_t in_ld, int64_t rows, int64_t count, int8_t* out, int64_t ld,
              int64_t width, float* sums) {
  if (bits == 8 && in == out && count == width && !sums) return;
  if (bits == 2) order_rows<2>(in, in_ld, rows, count, out, ld, width, sums);
  if (bits == 4) order_rows<4>(in, in_ld, rows, count, out, ld, width, sums);
  if (bits == 8) order_rows<8>(in, in_ld, rows, count, out, ld, width, sums);
}

void start_a8(const int8_t* q, int64_t ld, int64_t rows, int64_t count, int32_t* starts, int64_t step) {
  for (int64_t k = 0; k < count; k += mpq::kStartCodes, starts += step)
    for (int64_t r = 0; r < rows; ++r) starts[r] = Isa::start(q + r * ld + k, smaller(mpq::kStartCodes, count - k));
}

// Over count bytes; up to a vector is read in any case.
inline typename Isa::Vec byte_sums(const int8_t* q, int64_t ld, int64_t rows, int64_t count) {
  alignas(64) uint8_t bytes[2 * kStep];
  std::memset(bytes, 1, kStep);
  std::memset(bytes + kStep, 0, kStep);
  const int64_t whole = count / kStep * kStep;
  const typename Isa::Bytes ones = Isa::load_bytes(bytes), rest = Isa::load_bytes(bytes + kStep - (count - whole));
  return sums_of(rows, [&](int64_t r) {
    const int8_t* row = q + r * ld;
    typename Isa::Ints sum = Isa::no_ints();
    for (int64_t k = 0; k < whole; k += kStep) sum = Isa::quad_dot(sum, ones, Isa::load_bytes(row + k));
    if (whole < count) sum = Isa::quad_dot(sum, rest, Isa::load_bytes(row + whole));
    return sum;
  });
}

void sum_a8(const int8_t* q, int64_t ld, int64_t rows, int64_t count, float* sums, int64_t step) {
  for (int64_t r = 0; r < rows; r += Isa::kWidth) {
    float found[Isa::kWidth];
    const int64_t used = smaller(Isa::kWidth, rows - r);
    Isa::store(found, byte_sums(q + r * ld, ld, used, count));
    for (int64_t i = 0; i < used; ++i) sums[(r + i) * step] = found[i];
  }
}

}  // namespace
