// AVX-512 F, BW, DQ, VL and VNNI, on top of the AVX2 pieces. With MPQ_SIMDE the intrinsics are carried
// out in plain C, so that this file can be tested on any processor.
#include "vec_avx2.h"

namespace {

struct Avx512 : Avx2 {
  static constexpr int kWidth = 16;
  using Vec = __m512;
  static constexpr int tile_rows(int) { return 12; }  // of the 32 registers, 24 sums
  static void fma_to(Vec& a, Vec x, Vec y) { a = fma(x, y, a); }

  static constexpr int kGemmFrom = 24;
  // Few rows against 8 bits leave the processor time to ask by itself, which is faster.
  static int64_t ahead(int bits, int64_t rows) { return bits < 8 ? 16384 : rows > 5 ? 8192 : 0; }
  template <int BITS>
  static constexpr bool kInTurn = false;

  static constexpr int kGramTile = 5;
  static constexpr bool kPairs = true;
  static constexpr bool kFar = true;

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
  static void store_far(float* p, Vec a) { _mm512_stream_ps(p, a); }  // on a line's start
  static Vec set1(float x) { return _mm512_set1_ps(x); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
  static Vec fused(Vec a, Vec b, Vec c) { return fma(a, b, c); }
  // c + the products of two bf16 a lane. In assembly, because only some processors with AVX-512 have the instruction
  // (`multiplies_bf16`), and the compiler must not use it elsewhere in this file.
  static Vec add_pairs(Vec a, Vec b, Vec c) {
#ifdef MPQ_SIMDE
    return mpq_dpbf16_ps(c, a, b);
#else
    asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
#endif
  }
  static Vec absolute(Vec a) { return _mm512_abs_ps(a); }
  static Vec power_of_two(Vec a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a), 23)); }
  static Vec fold(Vec a, Vec (*join)(Vec, Vec)) {  // by halving, to every lane
    a = join(a, _mm512_shuffle_f32x4(a, a, 0x4e));
    a = join(a, _mm512_shuffle_f32x4(a, a, 0xb1));
    a = join(a, _mm512_shuffle_ps(a, a, 0x4e));
    return join(a, _mm512_shuffle_ps(a, a, 0xb1));
  }
  static float highest(Vec a) { return _mm512_cvtss_f32(fold(a, max)); }
  static bool any_above(Vec a, float limit) { return _mm512_cmp_ps_mask(a, set1(limit), _CMP_GT_OQ) != 0; }
  static float lowest(Vec a) { return _mm512_cvtss_f32(fold(a, min)); }
  static float sum(Vec a) { return _mm512_cvtss_f32(fold(a, add)); }
  static Vec sums(const Vec* a) {  // lane i: the sum of a[i]
    __m512 s[4];
    for (int i = 0; i < 4; ++i) {
      const __m512 ab =
          _mm512_add_ps(_mm512_unpacklo_ps(a[4 * i], a[4 * i + 1]), _mm512_unpackhi_ps(a[4 * i], a[4 * i + 1]));
      const __m512 cd =
          _mm512_add_ps(_mm512_unpacklo_ps(a[4 * i + 2], a[4 * i + 3]), _mm512_unpackhi_ps(a[4 * i + 2], a[4 * i + 3]));
      s[i] = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    }
    for (int i = 0; i < 2; ++i)
      s[i] = _mm512_add_ps(_mm512_shuffle_f32x4(s[2 * i], s[2 * i + 1], 0x44),
                           _mm512_shuffle_f32x4(s[2 * i], s[2 * i + 1], 0xee));
    return _mm512_add_ps(_mm512_shuffle_f32x4(s[0], s[1], 0x88), _mm512_shuffle_f32x4(s[0], s[1], 0xdd));
  }

  using Bytes = __m512i;

  // 8 bits: convert; 2 and 4 bits: the group's weights sit in a register, looked up by a permutation
  // that reads only the 4 low bits of each index.
  template <int BITS>
  struct Decoder {
    __m512 scale, zero;
    Decoder() = default;
    Decoder(float s, float z) : scale(set1(s)), zero(set1(z)) {}
    void operator()(const uint8_t* p, Vec out[2]) const {
      for (int i = 0; i < 2; ++i) {
        const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * i)));
        out[i] = _mm512_mul_ps(scale, _mm512_sub_ps(_mm512_cvtepi32_ps(code), zero));
      }
    }
  };

  // Codes that are looked up: so many share a table, a whole register of 4-bit weights or a quarter of one of 2 bits,
  // and an index's other bits do not matter.
  template <int BITS>
  static constexpr int64_t kTable = BITS == 4   ? 128
                                    : BITS == 2 ? 64
                                                : 0;
  template <int BITS>
  static Vec table(Vec scale, Vec zero) {
    return _mm512_mul_ps(scale, _mm512_sub_ps(table(1, 0, (1 << BITS) - 1), zero));
  }
  template <int BITS>
  static Vec centred(Bytes, int, Vec zero) {  // all are looked up
    return zero;
  }
  template <int BITS>
  static Vec looked_up(Vec table, Bytes words, int field) {
    const __m512i code = _mm512_srli_epi32(words, BITS * field);
    return BITS == 4 ? _mm512_permutexvar_ps(code, table) : _mm512_permutevar_ps(table, code);
  }

  static __m512i lanes(int a, int b, int step) {  // a, a + step, ... in lanes 0..7, b, ... in 8..15
    alignas(64) int32_t v[16];
    for (int i = 0; i < 8; ++i) v[i] = a + i * step, v[8 + i] = b + i * step;
    return _mm512_load_si512(v);
  }
  static __m512 table(float s, float z, int mask) {
    alignas(64) float v[16];
    for (int i = 0; i < 16; ++i) v[i] = float(i & mask);
    return _mm512_mul_ps(set1(s), _mm512_sub_ps(_mm512_load_ps(v), set1(z)));
  }

  template <int BITS>
  static void unpack_two(const uint8_t* p, uint8_t* out) {  // as `codes` does, twice as wide
    __m512i v;
    if constexpr (BITS == 2) {
      const __m512i t = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      const __m512i a = _mm512_or_si512(t, _mm512_slli_epi32(t, 6));
      v = _mm512_and_si512(_mm512_or_si512(a, _mm512_slli_epi32(a, 12)), _mm512_set1_epi8(3));
    } else if constexpr (BITS == 4) {
      const __m512i t = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
      v = _mm512_and_si512(_mm512_or_si512(t, _mm512_slli_epi16(t, 4)), _mm512_set1_epi8(15));
    } else {
      v = load_bytes(p);
    }
    store_bytes(out, v);
  }

  // Not __m512i, whose elements are 64 bits to a compiler: sums that change type in a loop and after it take two
  // registers each.
  using Ints = int32_t __attribute__((vector_size(64)));
  template <int BITS>
  static constexpr int act_rows() {
    return 12;
  }
  static constexpr bool kApart = false;  // a Zen 5 core would take 1.6 to 2 times as long
  static constexpr int kFullRows = 14;   // of tiles that take every register: faster where others would be 7 to 10 high
  static Bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
  static void store_bytes(void* p, Bytes v) { _mm512_storeu_si512(p, v); }
  static void store_bytes_far(void* p, Bytes v) { _mm512_stream_si512(static_cast<__m512i*>(p), v); }
  static Ints no_ints() { return Ints{}; }
  static Vec to_floats(Ints v) { return _mm512_cvtepi32_ps((__m512i)v); }
  template <int BITS>
  static Vec code_floats(Bytes words, int i) {
    return to_floats((Ints)words >> BITS * i & ((1 << BITS) - 1));
  }
  static __m512i word(const void* p) {
    int32_t w;
    std::memcpy(&w, p, 4);
    return _mm512_set1_epi32(w);
  }
  template <int BITS>
  static Bytes field(Bytes v, int i, int place) {
    if (BITS == 8) return v;
    const __m512i mask = _mm512_set1_epi8(char(((1 << BITS) - 1) << BITS * place));
    return _mm512_and_si512(i == place ? v : _mm512_srli_epi32(v, BITS * (i - place)), mask);
  }
  static constexpr int kPlaces = 4;
  static Ints shifted(Ints v, int bits) { return v >> bits; }
  template <int BITS>
  static constexpr int kWideRows = 0;
  template <int BITS>
  static constexpr bool kBlocks = false;
  static constexpr bool kStarts = false;
  static constexpr int kTurns = 4;
  template <int BITS>
  static constexpr int64_t kNarrow = 0;
  using Factors = Bytes;
  template <int BITS>
  static Bytes factors(Bytes c) {
    return c;
  }
  template <int BITS>
  static Ints dot(Ints sum, Bytes c, Bytes x) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, c, x);
  }
  template <int BITS>
  static Vec of_codes(Ints sum, Vec) {
    return to_floats(sum);
  }
  template <int BITS>
  static Ints added(Ints a, Ints b) {
    return a + b;
  }
  static Ints widened(Ints sum, Ints) { return sum; }  // nothing is narrow here
  static constexpr int64_t kQuadMost = 381;            // in two parts
  static Ints quad_dot(Ints sum, Bytes x, Bytes w) { return dot<8>(sum, x, w); }
  template <int BITS>
  static Ints difference(Ints a, Ints b) {
    return (a - b) * (1 << BITS);
  }
  static Ints load_ints(const void* p) { return (Ints)load_bytes(p); }
  static Ints apart(Ints bits, Vec a, Vec b) { return bits | (Ints)_mm512_castps_si512(_mm512_sub_ps(a, b)); }
  static bool any(Ints bits) { return _mm512_test_epi32_mask((__m512i)bits, (__m512i)bits) != 0; }
  static Bytes flipped(Bytes b) { return _mm512_xor_si512(b, _mm512_set1_epi8(-128)); }
  static Bytes held(Bytes b) {
#ifndef MPQ_SIMDE
    asm("" : "+v"(b));
#endif
    return b;
  }
  static Bytes middle(Bytes a, Bytes b) { return _mm512_rol_epi32(_mm512_mask_blend_epi16(0x55555555, a, b), 16); }
  static Bytes shuffled(Bytes b, Bytes from) { return _mm512_shuffle_epi8(b, from); }  // within each 16
  static Bytes load_some(const void* p, int64_t count) {                               // then zeros
    return _mm512_maskz_loadu_epi8(count < 64 ? (uint64_t(1) << count) - 1 : ~uint64_t(0), p);
  }
  static void store_some(void* p, Bytes b, int64_t count) {  // a multiple of 16
    __m128i* to = static_cast<__m128i*>(p);
    if (count >= 64) return store_bytes(p, b);
    if (count >= 32) _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_castsi512_si256(b));
    if (count == 16) _mm_storeu_si128(to, _mm512_castsi512_si128(b));
    if (count == 48) _mm_storeu_si128(to + 2, _mm512_extracti32x4_epi32(b, 2));
  }
  static Bytes same_bytes(int8_t v) { return _mm512_set1_epi8(v); }
  static Bytes within(Bytes b, Bytes low, Bytes high) { return _mm512_min_epi8(_mm512_max_epi8(b, low), high); }
  static void store_halves(Bytes b, void* low, void* high) {  // the high half unless its place is null
    _mm256_storeu_si256(static_cast<__m256i*>(low), _mm512_castsi512_si256(b));
    if (high) _mm256_storeu_si256(static_cast<__m256i*>(high), _mm512_extracti64x4_epi64(b, 1));
  }
  static void store_quarters(Bytes b, int8_t* p, int64_t step, int count) {  // the first `count`
    const __m128i quarters[4] = {_mm512_castsi512_si128(b), _mm512_extracti32x4_epi32(b, 1),
                                 _mm512_extracti32x4_epi32(b, 2), _mm512_extracti32x4_epi32(b, 3)};
    for (int i = 0; i < 4; ++i)
      if (i < count) _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i * step), quarters[i]);
  }
  static Bytes packed(const Vec (&v)[4]) {
    const __m512i turn = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i q[2];
    words<0>(v, q);
    return _mm512_permutexvar_epi32(turn, _mm512_max_epi8(_mm512_packs_epi16(q[0], q[1]), _mm512_set1_epi8(-127)));
  }
  static Bytes quad(const Vec (&v)[4]) {
    const __m128i turn = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i q[2];
    words<128>(v, q);
    const __m512i all = _mm512_max_epu8(_mm512_packus_epi16(q[0], q[1]), _mm512_set1_epi8(1));
    return _mm512_shuffle_epi8(all, _mm512_broadcast_i32x4(turn));
  }
  template <int MORE>
  static void words(const Vec (&v)[4], __m512i (&out)[2]) {  // in each of 16 bytes four of two vectors, MORE larger
    __m512i q[4];
    for (int i = 0; i < 4; ++i)
      q[i] = _mm512_sub_epi32(_mm512_castps_si512(v[i]), _mm512_set1_epi32(0x4b400000 - MORE));
    for (int i = 0; i < 2; ++i) out[i] = _mm512_packs_epi32(q[2 * i], q[2 * i + 1]);
  }

  using Lanes = __m512i;
  static Lanes load_lanes(const int32_t* p) { return _mm512_loadu_si512(p); }
  static Vec picked(const float* p, Lanes from) { return _mm512_permutexvar_ps(from, load(p)); }
  static void transpose_words(const uint8_t* in, int64_t ld, Bytes out[16]) {
    __m512 r[16];
    for (int i = 0; i < 16; i += 4) {  // within blocks of 4 x 4
      __m512 a[4];
      for (int j = 0; j < 4; ++j) a[j] = _mm512_castsi512_ps(load_bytes(in + (i + j) * ld));
      const __m512 ab[2] = {_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1])};
      const __m512 cd[2] = {_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3])};
      for (int j = 0; j < 2; ++j) {
        r[i + 2 * j] = _mm512_shuffle_ps(ab[j], cd[j], 0x44);
        r[i + 2 * j + 1] = _mm512_shuffle_ps(ab[j], cd[j], 0xee);
      }
    }
    for (int j = 0; j < 4; ++j) {  // and the blocks
      const __m512 even[2] = {_mm512_shuffle_f32x4(r[j], r[4 + j], 0x88),
                              _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88)};
      const __m512 odd[2] = {_mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd),
                             _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd)};
      out[j] = _mm512_castps_si512(_mm512_shuffle_f32x4(even[0], even[1], 0x88));
      out[4 + j] = _mm512_castps_si512(_mm512_shuffle_f32x4(odd[0], odd[1], 0x88));
      out[8 + j] = _mm512_castps_si512(_mm512_shuffle_f32x4(even[0], even[1], 0xdd));
      out[12 + j] = _mm512_castps_si512(_mm512_shuffle_f32x4(odd[0], odd[1], 0xdd));
    }
  }
  static void store_low_bytes(int8_t* p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_castps_si512(v)));
  }
  static void store_rounded(int8_t* p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }
};

template <>
struct Avx512::Decoder<2> {
  __m512 lut;
  Decoder() = default;
  Decoder(float s, float z) : lut(table(s, z, 3)) {}
  void operator()(const uint8_t* p, Vec out[2]) const {
    const __m512i shift = lanes(0, 16, 2);
    for (int i = 0; i < 2; ++i) {
      int32_t w;
      std::memcpy(&w, p + 4 * i, 4);
      out[i] = _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi32(w), shift), lut);
    }
  }
};

template <>
struct Avx512::Decoder<4> {
  __m512 lut;
  Decoder() = default;
  Decoder(float s, float z) : lut(table(s, z, 15)) {}
  void operator()(const uint8_t* p, Vec out[2]) const {
    const __m512i shift = lanes(0, 0, 4);
    const __m512i four = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    for (int i = 0; i < 2; ++i)  // lanes 0..7 take the block's word 2i, lanes 8..15 its word 2i + 1
      out[i] = _mm512_permutexvar_ps(
          _mm512_srlv_epi32(_mm512_permutexvar_epi32(lanes(2 * i, 2 * i + 1, 0), four), shift), lut);
  }
};

}  // namespace
