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
  template <int BITS>
  static constexpr bool kNarrow = false;
  static constexpr int kPlaces = 4;
  template <int BITS>
  static Ints dot(Ints sum, Bytes c, Bytes x) {
#ifdef MPQ_SIMDE
    return Avx2::dot<8>(sum, c, x);
#else
    return _mm256_dpbusd_avx_epi32(sum, c, x);
#endif
  }
  static constexpr int64_t kQuadMost = 381;  // in two parts
  static Ints quad_dot(Ints sum, Bytes x, Bytes w) { return dot<8>(sum, x, w); }
  template <int BITS>
  static Ints added(Ints a, Ints b) {
    return _mm256_add_epi32(a, b);
  }
};

}  // namespace
#include "kernels.inl"

MPQ_KERNELS(avxvnni_kernels, "avxvnni");
