// AVX2 + FMA + F16C. Included only by files built with those flags; everything here has internal
// linkage, so that no other file can be handed code that its processor lacks.
#ifdef MPQ_SIMDE
#include "simde.h"
#else
#include <immintrin.h>
#endif
#include <cstdint>
#include <cstring>

#include "block_avx2.h"

namespace {

struct Avx2 {
  static constexpr int kWidth = 8;
  using Vec = __m256;
  // Rows of a tile that is so many vectors wide: sums for two multiply-add ports of 4 cycles each, and room
  // for the operands among 16 registers; of four vectors one is read from memory for each row.
  static constexpr int tile_rows(int wide) { return wide == 4 ? 3 : wide == 3 ? 4 : wide == 2 ? 6 : 8; }
  // a += x * y, and nothing else: compilers move sums about that they keep in registers.
  static void fma_to(Vec& a, Vec x, Vec y) {
#if defined(__AVX2__) && defined(__FMA__)
    asm("vfmadd231ps %2, %1, %0" : "+x"(a) : "x"(x), "x"(y));
#else
    a = fma(x, y, a);
#endif
  }

  static constexpr int kGemmFrom = 12;
  static int64_t ahead(int, int64_t) { return 2048; }
  // Whether memory is asked for codes in turn. Products of 2 bits take as long as memory does one page after the other.
  template <int BITS>
  static constexpr bool kInTurn = BITS > 2;

  static constexpr int kGramTile = 3;    // 9 sums, enough to hide the latency, 3 rows and a column
  static constexpr bool kPairs = false;  // whether add_pairs multiplies bf16
  // Past the caches half a line waits for the other, and what comes between may send it off alone: an eighth as fast.
  static constexpr bool kFar = false;
  static void store_far(float* p, Vec a) { store(p, a); }

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
  static Vec set1(float x) { return _mm256_set1_ps(x); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
  static Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
  static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
  static Vec fused(Vec a, Vec b, Vec c) { return fma(a, b, c); }  // rounded once on every instruction set
  static Vec absolute(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  // 2^n of 1.5 * 2^23 + 127 + n, with n within -127..128: 0 and infinity at the ends.
  static Vec power_of_two(Vec a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), 23)); }
  static float highest(Vec a) {
    a = _mm256_max_ps(a, _mm256_permute2f128_ps(a, a, 1));
    a = _mm256_max_ps(a, _mm256_shuffle_ps(a, a, 0x4e));
    return _mm256_cvtss_f32(_mm256_max_ps(a, _mm256_shuffle_ps(a, a, 0xb1)));
  }
  static bool any_above(Vec a, float limit) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, set1(limit), _CMP_GT_OQ)) != 0;
  }
  static float lowest(Vec a) { return -highest(_mm256_sub_ps(zero(), a)); }
  static float sum(Vec a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }

  static Vec sums(const Vec* a) {  // lane i: the sum of a[i]
    const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
  }

  // out[i] = p[2 * i], reading nothing past p[14]
  static void evens8(const float* p, float* out) {
    const __m256 v = _mm256_shuffle_ps(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 7), 0xd8);  // 0 2 8 10 4 6 12 14
    _mm256_storeu_ps(out, _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8)));
  }

  // out[j][i] = in[i][j] for 8 x 8 floats
  static void transpose8(const float* in, int64_t in_ld, float* out, int64_t out_ld) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(in + i * in_ld);
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
      for (int j = 0; j < 2; ++j) {
        r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
        r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
      }
    for (int j = 0; j < 4; ++j) {
      _mm256_storeu_ps(out + j * out_ld, _mm256_permute2f128_ps(r[j], r[j + 4], 0x20));
      _mm256_storeu_ps(out + (j + 4) * out_ld, _mm256_permute2f128_ps(r[j], r[j + 4], 0x31));
    }
  }

  static __m256i word(const void* p) {  // 4 bytes in every lane
    int32_t w;
    std::memcpy(&w, p, 4);
    return _mm256_set1_epi32(w);
  }

  // 32 codes of a block as 32 weights, scale * (code - zero).
  template <int BITS>
  struct Decoder {
    __m256 scale, zero;
    Decoder() = default;
    Decoder(float s, float z) : scale(set1(s)), zero(set1(z)) {}
    __m256 weights(__m256i code) const { return _mm256_mul_ps(scale, _mm256_sub_ps(_mm256_cvtepi32_ps(code), zero)); }
    void operator()(const uint8_t* p, Vec out[4]) const {
      if constexpr (BITS == 4) {
        const __m256i shift = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28), mask = _mm256_set1_epi32(15);
        for (int i = 0; i < 4; ++i) out[i] = weights(_mm256_and_si256(_mm256_srlv_epi32(word(p + 4 * i), shift), mask));
      } else {
        for (int i = 0; i < 4; ++i)
          out[i] = weights(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * i))));
      }
    }
  };

  // 32 codes as bytes, in the order of k.
  using Codes = __m256i;
  template <int BITS>
  static Codes codes(const uint8_t* p) {
    if constexpr (BITS == 2) {  // a byte to each 32-bit lane, its fields spread to the lane's bytes
      const __m256i t = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
      const __m256i a = _mm256_or_si256(t, _mm256_slli_epi32(t, 6));
      const __m256i b = _mm256_or_si256(_mm256_slli_epi32(t, 12), _mm256_slli_epi32(t, 18));
      return _mm256_and_si256(_mm256_or_si256(a, b), _mm256_set1_epi8(3));
    } else if constexpr (BITS == 4) {
      const __m256i t = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      return _mm256_and_si256(_mm256_or_si256(t, _mm256_slli_epi16(t, 4)), _mm256_set1_epi8(15));
    } else {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    }
  }
  static void store_codes(uint8_t* out, Codes c) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), c); }
  template <int BITS>
  static void unpack_two(const uint8_t* p, uint8_t* out) {  // two blocks of codes
    store_codes(out, codes<BITS>(p));
    store_codes(out + mpq::kBlock, codes<BITS>(p + mpq::kBlock * BITS / 8));
  }

  // Codes that are looked up: so many share a table of 2-bit weights, half a register, and an index's other bits do not
  // matter. There is none of 4-bit weights, which are `centred` a lane of 8 codes at a time.
  template <int BITS>
  static constexpr int64_t kTable = BITS == 2   ? 64
                                    : BITS == 4 ? 8
                                                : 0;
  template <int BITS>
  static Vec table(Vec scale, Vec zero) {
    return _mm256_mul_ps(scale, _mm256_sub_ps(_mm256_setr_ps(0, 1, 2, 3, 0, 1, 2, 3), zero));
  }
  template <int BITS>
  static Vec centred(__m256i words, int field, Vec zero) {  // codes less zero
    const __m256i code = _mm256_and_si256(_mm256_srli_epi32(words, BITS * field), _mm256_set1_epi32((1 << BITS) - 1));
    return _mm256_sub_ps(_mm256_cvtepi32_ps(code), zero);
  }
  template <int BITS>
  static Vec looked_up(Vec table, __m256i words, int field) {
    return _mm256_permutevar_ps(table, _mm256_srli_epi32(words, BITS * field));
  }

  // Integer products: bytes of codes by signed bytes, 4 neighbours summed into a lane.
  using Bytes = __m256i;
  // Lanes of 32 bits to operators, too.
  using Ints = int32_t __attribute__((vector_size(32)));
  template <int BITS>
  static constexpr int act_rows() {
    return BITS == 8 ? 4 : 6;
  }  // of a tile two vectors wide
  static constexpr bool kApart = true;  // panels far apart are read by turns
  static constexpr int kFullRows = 0;   // there are no larger tiles
  static Bytes load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store_bytes_far(void* p, Bytes v) { store_bytes(p, v); }
  static void store_bytes(void* p, Bytes v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static Ints no_ints() { return Ints{}; }
  static Vec to_floats(Ints v) { return _mm256_cvtepi32_ps((__m256i)v); }
  template <int BITS>
  static Vec code_floats(Bytes words, int i) {  // the i-th code of each word
    return to_floats((Ints)words >> BITS * i & ((1 << BITS) - 1));
  }

  template <int BITS>
  static Bytes field(Bytes v, int i, int place) {  // field i of every byte, moved to another place there
    if (BITS == 8) return v;
    const __m256i mask = _mm256_set1_epi8(char(((1 << BITS) - 1) << BITS * place));
    return _mm256_and_si256(i == place ? v : _mm256_srli_epi16(v, BITS * (i - place)), mask);
  }
  static constexpr int kPlaces = 1;  // that fields may be in where `dot` takes them: higher up they are too large
  static Ints shifted(Ints v, int bits) { return v >> bits; }
  static constexpr int kTurns = 1;  // a sum waits for an addition alone
  template <int BITS>
  static constexpr int kWideRows = BITS == 8 ? 1 : 2;  // as there are registers for
  // So many codes `dot` sums in 16 bits, which `widened` adds to a sum of 32: 32 steps of 3 * 127 * 2 = 762 fit, and 8
  // of 15 * 127 * 2 = 3810.
  template <int BITS>
  static constexpr int64_t kNarrow = BITS == 2   ? 128
                                     : BITS == 4 ? 32
                                                 : 0;
  // 255 * 127 * 2 does not fit at all. Codes of 8 bits are 128 less here, and their size and sign are apart: 128 * 127
  // * 2 fits.
  struct Factors {
    Bytes value, size;
  };
  template <int BITS>
  static Factors factors(Bytes c) {
    if (BITS < 8) return {c, c};
    return {flipped(c), _mm256_abs_epi8(flipped(c))};
  }
  // Written out, since compilers would take all products first and keep sums in memory.
  template <int BITS>
  static Ints dot(Ints sum, Factors c, Bytes x) {
    Bytes product;
    if constexpr (BITS == 8)
      asm("vpsignb %3, %2, %1\n\tvpmaddubsw %1, %4, %1\n\tvpmaddwd %5, %1, %1\n\tvpaddd %1, %0, %0"
          : "+x"(sum), "=&x"(product)
          : "x"(x), "x"(c.value), "x"(c.size), "x"(_mm256_set1_epi16(1)));
    else
      asm("vpmaddubsw %2, %3, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(x), "x"(c.value));
    return sum;
  }
  // Whether, for two vectors, `block` does what `factors`, `dot` and `widened` do elsewhere.
  template <int BITS>
  static constexpr bool kBlocks = BITS < 8;
  template <int BITS, int C, bool STARTED>
  static void block(const uint8_t* codes, const uint8_t* soon, const int8_t* q, int64_t ld, const int32_t* starts,
                    int64_t count, bool first, void* sums) {
    avx2_block<BITS, C, STARTED>(codes, soon, q, ld, starts, count, first, sums);
  }
  // 4-bit codes less 8 are half as large. Where a block's sums start at minus 8 times those of its activations, 16 bits
  // are enough in the end for 16 steps of 8 * 127 * 2 = 2032: on the way additions are modulo 2^16.
  static constexpr bool kStarts = true;
  static int32_t start(const int8_t* q, int64_t count) {  // count: a multiple of 32, up to kStartCodes
    __m256i sum = _mm256_setzero_si256();
    for (int64_t i = 0; i < count; i += 32)
      sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(_mm256_set1_epi8(8), load_bytes(q + i)));
    __m128i half = _mm_add_epi16(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    half = _mm_add_epi16(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_add_epi16(half, _mm_shuffle_epi32(half, 0xb1));
    return _mm_cvtsi128_si32(_mm_sub_epi16(_mm_setzero_si128(), half));
  }
  template <int BITS>
  static Vec of_codes(Ints sum, Vec x_sum) {  // exact
    return BITS == 8 ? fma(set1(128), x_sum, to_floats(sum)) : to_floats(sum);
  }
  template <int BITS>
  static Ints added(Ints a, Ints b) {  // two sums by `dot`
    return kNarrow<BITS> ? (Ints)_mm256_add_epi16((__m256i)a, (__m256i)b) : a + b;
  }
  static Ints widened(Ints sum, Ints narrow) {
    asm("vpmaddwd %2, %1, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "+x"(narrow) : "x"(_mm256_set1_epi16(1)));
    return sum;
  }

  // Four bytes a lane, each q + 128: sums of their products by signed ones. Weights of a size up to kQuadMost are one
  // such byte, or two where that is above 127.
  static constexpr int64_t kQuadMost = 64;  // 255 * 64 * 2 fits 16 bits
  static Ints quad_dot(Ints sum, Bytes x, Bytes w) {
    return sum + (Ints)_mm256_madd_epi16(_mm256_maddubs_epi16(x, w), _mm256_set1_epi16(1));
  }
  template <int BITS>
  static Ints difference(Ints a, Ints b) {  // (a - b) << BITS
    return (a - b) * (1 << BITS);
  }
  static Ints load_ints(const void* p) { return (Ints)load_bytes(p); }
  // Bits of a - b beside others: of none but equal numbers it has none.
  static Ints apart(Ints bits, Vec a, Vec b) { return bits | (Ints)_mm256_sub_ps(a, b); }
  static bool any(Ints bits) { return !_mm256_testz_si256((__m256i)bits, (__m256i)bits); }
  static Bytes flipped(Bytes b) { return _mm256_xor_si256(b, _mm256_set1_epi8(-128)); }  // b + 128, modulo 256
  // In a register: compilers would load it anew for each instruction that may take it from memory.
  static Bytes held(Bytes b) {
    asm("" : "+x"(b));
    return b;
  }
  static Bytes middle(Bytes a, Bytes b) {  // two last bytes of each word of a, and two first of b
    return _mm256_or_si256(_mm256_srli_epi32(a, 16), _mm256_slli_epi32(b, 16));
  }
  static Bytes same_bytes(int8_t v) { return _mm256_set1_epi8(v); }
  static Bytes within(Bytes b, Bytes low, Bytes high) { return _mm256_min_epi8(_mm256_max_epi8(b, low), high); }
  static void store_halves(Bytes b, void* low, void* high) {  // the high half unless its place is null
    _mm_storeu_si128(static_cast<__m128i*>(low), _mm256_castsi256_si128(b));
    if (high) _mm_storeu_si128(static_cast<__m128i*>(high), _mm256_extracti128_si256(b, 1));
  }
  static void store_quarters(Bytes b, int8_t* p, int64_t step, int count) {  // the first `count`
    const __m128i halves[2] = {_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1)};
    for (int i = 0; i < 4; ++i)
      if (i < count)
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p + i * step),
                         i % 2 ? _mm_unpackhi_epi64(halves[i / 2], halves[i / 2]) : halves[i / 2]);
  }
  // Bytes of 1.5 * 2^23 + integers of a size below 2^23, kept within -127..127: vector after vector, or as quads of
  // bytes q + 128, [lane][4].
  static Bytes packed(const Vec (&v)[4]) {
    __m256i q[2];
    words<0>(v, q);
    const __m256i all = _mm256_max_epi8(_mm256_packs_epi16(q[0], q[1]), _mm256_set1_epi8(-127));
    return _mm256_permutevar8x32_epi32(all, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
  static Bytes quad(const Vec (&v)[4]) {
    const __m128i turn = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m256i q[2];
    words<128>(v, q);
    const __m256i all = _mm256_max_epu8(_mm256_packus_epi16(q[0], q[1]), _mm256_set1_epi8(1));
    return _mm256_shuffle_epi8(all, _mm256_broadcastsi128_si256(turn));
  }
  template <int MORE>
  static void words(const Vec (&v)[4], __m256i (&out)[2]) {  // in each of 16 bytes four of two vectors, MORE larger
    __m256i q[4];
    for (int i = 0; i < 4; ++i)
      q[i] = _mm256_sub_epi32(_mm256_castps_si256(v[i]), _mm256_set1_epi32(0x4b400000 - MORE));
    for (int i = 0; i < 2; ++i) out[i] = _mm256_packs_epi32(q[2 * i], q[2 * i + 1]);
  }
  // The same of 16 bytes each, whose quads are stored.
  static void store_quad(const int8_t* const (&from)[4], uint8_t* out) {
    __m128i q[4];
    for (int i = 0; i < 4; ++i)
      q[i] = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from[i])), _mm_set1_epi8(-128));
    const __m128i pairs[4] = {_mm_unpacklo_epi8(q[0], q[1]), _mm_unpacklo_epi8(q[2], q[3]),
                              _mm_unpackhi_epi8(q[0], q[1]), _mm_unpackhi_epi8(q[2], q[3])};
    __m128i* to = reinterpret_cast<__m128i*>(out);
    for (int i = 0; i < 4; i += 2) {
      _mm_storeu_si128(to + i, _mm_unpacklo_epi16(pairs[i], pairs[i + 1]));
      _mm_storeu_si128(to + i + 1, _mm_unpackhi_epi16(pairs[i], pairs[i + 1]));
    }
  }

  using Lanes = __m256i;
  static Lanes load_lanes(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Vec picked(const float* p, Lanes from) { return _mm256_permutevar8x32_ps(load(p), from); }  // p[from], 0..7

  // Word i of out[j] = word j of row i, for as many rows as words in a vector; rows are ld bytes apart.
  static void transpose_words(const uint8_t* in, int64_t ld, Bytes out[8]) {
    transpose8(reinterpret_cast<const float*>(in), ld / 4, reinterpret_cast<float*>(out), 8);
  }
  // Within each 16 bytes byte j becomes what byte from[j] was.
  static Bytes shuffled(Bytes b, Bytes from) { return _mm256_shuffle_epi8(b, from); }
  static Bytes load_some(const void* p, int64_t count) {  // then zeros
    if (count == 16) return _mm256_zextsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    alignas(32) int8_t bytes[32] = {};
    std::memcpy(bytes, p, count);
    return load_bytes(bytes);
  }
  static void store_some(void* p, Bytes b, int64_t count) {  // a multiple of 16
    if (count > 16) return store_bytes(p, b);
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_castsi256_si128(b));
  }
  static void store_rounded(int8_t* p, Vec v) {  // to nearest even; within -127..127
    const __m256i i = _mm256_cvtps_epi32(v);
    const __m128i s = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(s, s));
  }

  static void store_low_bytes(int8_t* p, Vec v) {  // of 1.5 * 2^23 + an integer within -127..127
    const __m256i i = _mm256_sub_epi32(_mm256_castps_si256(v), _mm256_set1_epi32(0x4b400000));
    const __m128i s = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(s, s));
  }

  static void halves_to_floats(const uint16_t* src, float* dst, int64_t count) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
      store(dst + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
    for (; i < count; ++i) dst[i] = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(src[i])));
  }
  static void floats_to_halves(const float* src, uint16_t* dst, int64_t count) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i), _mm256_cvtps_ph(load(src + i), 0));
    for (; i < count; ++i) dst[i] = uint16_t(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(src[i]), 0)));
  }
};

// 2 bits: the four weights of a group sit in a register, and a permutation looks them up. Lanes 4..7
// repeat 0..3, so the third index bit, which belongs to the next code, does not matter.
template <>
struct Avx2::Decoder<2> {
  __m256 lut;
  Decoder() = default;
  Decoder(float s, float z)
      : lut(_mm256_mul_ps(set1(s), _mm256_sub_ps(_mm256_setr_ps(0, 1, 2, 3, 0, 1, 2, 3), set1(z)))) {}
  void operator()(const uint8_t* p, Vec out[4]) const {
    const __m256i low = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14),
                  high = _mm256_add_epi32(low, _mm256_set1_epi32(16));
    for (int i = 0; i < 2; ++i) {
      const __m256i w = word(p + 4 * i);
      out[2 * i] = _mm256_permutevar8x32_ps(lut, _mm256_srlv_epi32(w, low));
      out[2 * i + 1] = _mm256_permutevar8x32_ps(lut, _mm256_srlv_epi32(w, high));
    }
  }
};

}  // namespace
