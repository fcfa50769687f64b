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

template <int BITS>
void put_in_order(int8_t* q, int64_t count) {
  if (BITS == 8) return;
  uint8_t from[16];  // a word or two
  for (int j = 0; j < 16; ++j) {
    const int word = j / (4 * kFields<BITS>), quad = j / 4 % kFields<BITS>;
    from[j] = uint8_t(word * 4 * kFields<BITS> + j % 4 * kFields<BITS> + quad);
  }
  for (int64_t k = 0; k < count; k += kBlock) Isa::shuffle16(q + k, from);
}

void order_a8(int bits, int8_t* q, int64_t count) {
  if (bits == 2) put_in_order<2>(q, count);
  if (bits == 4) put_in_order<4>(q, count);
}

// The sums of up to kWidth rows over count bytes; up to a vector is read in any case.
inline typename Isa::Vec byte_sums(const int8_t* q, int64_t ld, int64_t rows, int64_t count) {
  constexpr int64_t kStep = 4 * Isa::kWidth;
  alignas(64) uint8_t bytes[2 * kStep];
  std::memset(bytes, 1, kStep);
  std::memset(bytes + kStep, 0, kStep);
  const int64_t whole = count / kStep * kStep;
  const typename Isa::Bytes ones = Isa::load_bytes(bytes), rest = Isa::load_bytes(bytes + kStep - (count - whole));
  typename Isa::Vec sums[Isa::kWidth];
  for (typename Isa::Vec& sum : sums) sum = Isa::zero();
  for (int64_t r = 0; r < rows; ++r) {
    const int8_t* row = q + r * ld;
    typename Isa::Ints sum = Isa::no_ints();
    for (int64_t k = 0; k < whole; k += kStep) sum = Isa::template dot<8>(sum, ones, Isa::load_bytes(row + k));
    if (whole < count) sum = Isa::template dot<8>(sum, rest, Isa::load_bytes(row + whole));
    sums[r] = Isa::to_floats(sum);
  }
  return Isa::sums(sums);  // exact: below 2^24
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
