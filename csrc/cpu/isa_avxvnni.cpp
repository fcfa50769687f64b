// Built with -mavx2 -mfma -mf16c -mavxvnni, or without the last and with -DMPQ_SIMDE.
#include "../packed.h"
#include "vec_avx2.h"

namespace {

// AVX2 whose products of bytes are one instruction, with sums of 32 bits.
struct Isa : Avx2 {
  template <int BITS>
  static constexpr int act_rows() {
    return 6;
  }
  static constexpr int kTurns = 4;
  template <int BITS>
  static constexpr int kWideRows = 0;
  template <int BITS>
  static constexpr bool kBlocks = false;
  template <int BITS>
  static constexpr int64_t kNarrow = 0;
  static constexpr bool kStarts = false;
  static constexpr int kPlaces = 4;
  using Factors = Bytes;
  template <int BITS>
  static Bytes factors(Bytes c) {
    return c;
  }
  template <int BITS>
  static Vec of_codes(Ints sum, Vec) {
    return to_floats(sum);
  }
  template <int BITS>
  static Ints dot(Ints sum, Bytes c, Bytes x) {
#ifdef MPQ_SIMDE
    const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x_odd = _mm256_srai_epi16(x, 8);
    sum += (Ints)_mm256_madd_epi16(_mm256_and_si256(c, _mm256_set1_epi16(255)), x_even);
    return sum + (Ints)_mm256_madd_epi16(_mm256_srli_epi16(c, 8), x_odd);
#else
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, c, x);
#endif
  }
  static constexpr int64_t kQuadMost = 381;  // in two parts
  static Ints quad_dot(Ints sum, Bytes x, Bytes w) { return dot<8>(sum, x, w); }
  template <int BITS>
  static Ints added(Ints a, Ints b) {
    return a + b;
  }
};

}  // namespace
#include "kernels.inl"

MPQ_KERNELS(avxvnni_kernels, "avxvnni");
