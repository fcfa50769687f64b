// Plain C++ "vectors": runs anywhere; compilers turn the fixed-length loops into whatever they have.
#include <cstdint>
#include <cstring>

namespace {

struct Isa {
  static constexpr int kWidth = 8;  // floats
  struct Vec {
    float v[kWidth];
  };
  static constexpr int tile_rows(int) { return 2; }
  static void fma_to(Vec& a, const Vec& x, const Vec& y) { a = fma(x, y, a); }

  static constexpr int kGemmFrom = 12;
  static int64_t ahead(int, int64_t) { return 0; }
  template <int BITS>
  static constexpr bool kInTurn = false;

  static constexpr int kGramTile = 2;
  static constexpr bool kPairs = false;
  static constexpr bool kFar = false;
  static void store_far(float* p, Vec a) { store(p, a); }

  static Vec zero() { return Vec{}; }
  static Vec load(const float* p) {
    Vec r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static void store(float* p, Vec a) { std::memcpy(p, a.v, sizeof a.v); }
  static Vec set1(float x) {
    Vec r;
    for (float& e : r.v) e = x;
    return r;
  }
  template <class F>
  static Vec each(Vec a, Vec b, F f) {
    for (int i = 0; i < kWidth; ++i) a.v[i] = f(a.v[i], b.v[i]);
    return a;
  }
  static Vec add(Vec a, Vec b) {
    return each(a, b, [](float x, float y) { return x + y; });
  }
  static Vec sub(Vec a, Vec b) {
    return each(a, b, [](float x, float y) { return x - y; });
  }
  static Vec mul(Vec a, Vec b) {
    return each(a, b, [](float x, float y) { return x * y; });
  }
  static Vec div(Vec a, Vec b) {
    return each(a, b, [](float x, float y) { return x / y; });
  }
  static Vec min(Vec a, Vec b) {
    return each(a, b, [](float x, float y) { return x < y ? x : y; });
  }
  static Vec max(Vec a, Vec b) {
    return each(a, b, [](float x, float y) { return x > y ? x : y; });
  }
  static Vec fma(Vec a, Vec b, Vec c) {
    for (int i = 0; i < kWidth; ++i) c.v[i] += a.v[i] * b.v[i];
    return c;
  }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
  static Vec fused(Vec a, Vec b, Vec c) {
    for (int i = 0; i < kWidth; ++i) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
    return c;
  }
  static bool any_above(Vec a, float limit) { return highest(a) > limit; }
  static Vec absolute(Vec a) {
    for (float& e : a.v) e = e < 0 ? -e : e;
    return a;
  }
  static Vec power_of_two(Vec a) {
    for (float& e : a.v) {
      uint32_t n;
      std::memcpy(&n, &e, 4);
      n <<= 23;
      std::memcpy(&e, &n, 4);
    }
    return a;
  }
  static float highest(Vec a) {
    for (int i = 1; i < kWidth; ++i) a.v[0] = a.v[i] > a.v[0] ? a.v[i] : a.v[0];
    return a.v[0];
  }
  static float lowest(Vec a) {
    for (int i = 1; i < kWidth; ++i) a.v[0] = a.v[i] < a.v[0] ? a.v[i] : a.v[0];
    return a.v[0];
  }
  static float sum(Vec a) { return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7])); }
  static Vec sums(const Vec* a) {
    Vec s;
    for (int i = 0; i < kWidth; ++i) s.v[i] = sum(a[i]);
    return s;
  }

  static void evens8(const float* p, float* out) {
    for (int i = 0; i < 8; ++i) out[i] = p[2 * i];
  }
  static void transpose8(const float* in, int64_t in_ld, float* out, int64_t out_ld) {
    for (int i = 0; i < 8; ++i)
      for (int j = 0; j < 8; ++j) out[j * out_ld + i] = in[i * in_ld + j];
  }

  // 32 codes of a block as 32 weights, scale * (code - zero).
  template <int BITS>
  struct Decoder {
    float scale, zero;
    Decoder() = default;
    Decoder(float s, float z) : scale(s), zero(z) {}
    void operator()(const uint8_t* p, Vec out[mpq::kBlock / kWidth]) const {
      for (int i = 0; i < mpq::kBlock; ++i)
        out[i / kWidth].v[i % kWidth] = scale * (float(mpq::get_code(p, i, BITS)) - zero);
    }
  };

  // 32 codes as bytes, in the order of k.
  struct Codes {
    uint8_t v[mpq::kBlock];
  };
  template <int BITS>
  static Codes codes(const uint8_t* p) {
    Codes c;
    for (int i = 0; i < mpq::kBlock; ++i) c.v[i] = mpq::get_code(p, i, BITS);
    return c;
  }
  static void store_codes(uint8_t* out, const Codes& c) { std::memcpy(out, c.v, sizeof c.v); }
  template <int BITS>
  static void unpack_two(const uint8_t* p, uint8_t* out) {  // two blocks of codes
    store_codes(out, codes<BITS>(p));
    store_codes(out + mpq::kBlock, codes<BITS>(p + mpq::kBlock * BITS / 8));
  }

  // Integer products: bytes of codes by signed bytes, 4 neighbours summed into a lane.
  struct Bytes {
    uint8_t v[4 * kWidth];
  };
  struct Ints {
    int32_t v[kWidth];
  };
  template <int BITS>
  static constexpr int64_t kTable = 0;  // no codes are looked up
  template <int BITS>
  static Vec table(const Vec&, const Vec& zero) {
    return zero;
  }
  template <int BITS>
  static Vec centred(const Bytes&, int, const Vec& zero) {
    return zero;
  }
  template <int BITS>
  static Vec looked_up(const Vec& table, const Bytes&, int) {
    return table;
  }

  template <int BITS>
  static constexpr int act_rows() {
    return 2;
  }
  static constexpr bool kApart = false;
  static constexpr int kFullRows = 0;
  static Bytes load_bytes(const void* p) {
    Bytes r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static void store_bytes_far(void* p, const Bytes& b) { store_bytes(p, b); }
  static void store_bytes(void* p, const Bytes& b) { std::memcpy(p, b.v, sizeof b.v); }
  static Ints no_ints() { return Ints{}; }
  static Vec to_floats(const Ints& a) {
    Vec r;
    for (int i = 0; i < kWidth; ++i) r.v[i] = float(a.v[i]);
    return r;
  }
  template <int BITS>
  static Vec code_floats(const Bytes& words, int i) {  // the i-th code of each word
    Vec r;
    for (int j = 0; j < kWidth; ++j) r.v[j] = float(mpq::get_code(words.v + 4 * j, i, BITS));
    return r;
  }
  static Bytes word(const void* p) {  // 4 bytes in every lane
    Bytes r;
    for (int i = 0; i < kWidth; ++i) std::memcpy(r.v + 4 * i, p, 4);
    return r;
  }
  template <int BITS>
  static Bytes field(const Bytes& b, int i, int) {  // field i of every byte
    Bytes r;
    for (int j = 0; j < 4 * kWidth; ++j) r.v[j] = b.v[j] >> (BITS * i) & mpq::max_code(BITS);
    return r;
  }
  static constexpr int kPlaces = 1;
  static Ints shifted(const Ints& v, int) { return v; }
  template <int BITS>
  static constexpr int kWideRows = 0;
  template <int BITS>
  static constexpr bool kBlocks = false;
  template <int BITS, int C, bool STARTED>
  static void block(const uint8_t*, const uint8_t*, const int8_t*, int64_t, const int32_t*, int64_t, bool, void*) {}
  static constexpr bool kStarts = false;
  static int32_t start(const int8_t*, int64_t) { return 0; }
  static constexpr int kTurns = 4;
  template <int BITS>
  static constexpr int64_t kNarrow = 0;
  using Factors = Bytes;
  template <int BITS>
  static const Bytes& factors(const Bytes& c) {
    return c;
  }
  template <int BITS>
  static Vec of_codes(const Ints& sum, const Vec&) {
    return to_floats(sum);
  }
  template <int BITS>
  static Ints dot(Ints sum, const Bytes& c, const Bytes& x) {
    for (int j = 0; j < 4 * kWidth; ++j) sum.v[j / 4] += int32_t(c.v[j]) * int8_t(x.v[j]);
    return sum;
  }
  template <int BITS>
  static Ints added(const Ints& a, const Ints& b) {  // two sums by `dot`
    Ints r;
    for (int i = 0; i < kWidth; ++i) r.v[i] = a.v[i] + b.v[i];
    return r;
  }
  static Ints widened(const Ints& sum, const Ints&) { return sum; }  // nothing is narrow here

  // Four bytes a lane, each q + 128: sums of their products by signed ones. Weights of a size up to kQuadMost are one
  // such byte, or two where that is above 127.
  static constexpr int64_t kQuadMost = 381;  // in two parts
  static Ints quad_dot(Ints sum, const Bytes& x, const Bytes& w) { return dot<8>(sum, x, w); }
  template <int BITS>
  static Ints difference(Ints a, const Ints& b) {  // (a - b) << BITS
    for (int i = 0; i < kWidth; ++i) a.v[i] = (a.v[i] - b.v[i]) * (1 << BITS);
    return a;
  }
  static Ints load_ints(const void* p) {
    Ints r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
  }
  // Bits of a - b beside others: of none but equal numbers it has none.
  static Ints apart(Ints bits, const Vec& a, const Vec& b) {
    const Vec gap = sub(a, b);
    const Ints more = load_ints(gap.v);
    for (int i = 0; i < kWidth; ++i) bits.v[i] |= more.v[i];
    return bits;
  }
  static bool any(const Ints& bits) {
    int32_t all = 0;
    for (int i = 0; i < kWidth; ++i) all |= bits.v[i];
    return all != 0;
  }
  static Bytes flipped(Bytes b) {  // b + 128, modulo 256
    for (uint8_t& v : b.v) v ^= 128;
    return b;
  }
  static Bytes held(const Bytes& b) { return b; }
  static Bytes middle(const Bytes& a, const Bytes& b) {  // two last bytes of each word of a, and two first of b
    Bytes r;
    for (int i = 0; i < kWidth; ++i) {
      std::memcpy(r.v + 4 * i, a.v + 4 * i + 2, 2);
      std::memcpy(r.v + 4 * i + 2, b.v + 4 * i, 2);
    }
    return r;
  }
  static Bytes same_bytes(int8_t v) {
    Bytes r;
    std::memset(r.v, v, sizeof r.v);
    return r;
  }
  static Bytes within(Bytes b, const Bytes& low, const Bytes& high) {  // of bytes with signs
    for (int j = 0; j < 4 * kWidth; ++j) {
      const int8_t v = int8_t(b.v[j]), l = int8_t(low.v[j]), h = int8_t(high.v[j]);
      b.v[j] = uint8_t(v < l ? l : v > h ? h : v);
    }
    return b;
  }
  static void store_halves(const Bytes& b, void* low, void* high) {  // the high half unless its place is null
    std::memcpy(low, b.v, 2 * kWidth);
    if (high) std::memcpy(high, b.v + 2 * kWidth, 2 * kWidth);
  }
  static void store_quarters(const Bytes& b, int8_t* p, int64_t step, int count) {  // the first `count`
    for (int i = 0; i < count; ++i) std::memcpy(p + i * step, b.v + i * kWidth, kWidth);
  }
  // Bytes of 1.5 * 2^23 + integers of a size below 2^23, kept within -127..127: vector after vector, or as quads of
  // bytes q + 128, [lane][4].
  static int8_t low_byte(float v) {
    const float q = v - 12582912.0f;
    return int8_t(q > 127 ? 127 : q < -127 ? -127 : q);
  }
  static Bytes packed(const Vec (&v)[4]) {
    Bytes r;
    for (int j = 0; j < 4 * kWidth; ++j) r.v[j] = uint8_t(low_byte(v[j / kWidth].v[j % kWidth]));
    return r;
  }
  static Bytes quad(const Vec (&v)[4]) {
    Bytes r;
    for (int j = 0; j < 4 * kWidth; ++j) r.v[j] = uint8_t(low_byte(v[j % 4].v[j / 4]) + 128);
    return r;
  }
  // The same of 16 bytes each, whose quads are stored.
  static void store_quad(const int8_t* const (&from)[4], uint8_t* out) {
    for (int j = 0; j < 64; ++j) out[j] = uint8_t(from[j % 4][j / 4] + 128);
  }

  using Lanes = Ints;
  static Lanes load_lanes(const int32_t* p) { return load_ints(p); }
  static Vec picked(const float* p, const Lanes& from) {
    Vec r;
    for (int i = 0; i < kWidth; ++i) r.v[i] = p[from.v[i]];
    return r;
  }
  static void transpose_words(const uint8_t* in, int64_t ld, Bytes out[kWidth]) {
    for (int i = 0; i < kWidth; ++i)
      for (int j = 0; j < kWidth; ++j) std::memcpy(out[j].v + 4 * i, in + i * ld + 4 * j, 4);
  }
  static Bytes shuffled(const Bytes& b, const Bytes& from) {  // within each 16
    Bytes r;
    for (int j = 0; j < 4 * kWidth; ++j) r.v[j] = b.v[j / 16 * 16 + from.v[j]];
    return r;
  }
  static Bytes load_some(const void* p, int64_t count) {  // then zeros
    Bytes r = {};
    std::memcpy(r.v, p, count);
    return r;
  }
  static void store_some(void* p, const Bytes& b, int64_t count) { std::memcpy(p, b.v, count); }  // a multiple of 16
  static void store_rounded(int8_t* p, const Vec& a) {  // to nearest even; adding 1.5 * 2^23 leaves no fraction
    for (int i = 0; i < kWidth; ++i) p[i] = int8_t((a.v[i] + 12582912.0f) - 12582912.0f);
  }

  static void store_low_bytes(int8_t* p, const Vec& a) {  // of 1.5 * 2^23 + an integer within -127..127
    for (int i = 0; i < kWidth; ++i) p[i] = int8_t(a.v[i] - 12582912.0f);
  }

  static float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
    uint32_t bits;
    float f;
    if (rest >= 0x7c00) {
      bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;  // inf, NaN
    } else if (rest >= 0x400) {
      bits = sign | ((rest << 13) + (uint32_t(127 - 15) << 23));
    } else {  // zero and subnormal: rest * 2^-24, exact in fp32
      f = float(rest) * 0x1p-24f;
      std::memcpy(&bits, &f, 4);
      bits |= sign;
    }
    std::memcpy(&f, &bits, 4);
    return f;
  }
  static uint16_t float_to_half(float f) {  // round to nearest even
    uint32_t x;
    std::memcpy(&x, &f, 4);
    const uint32_t sign = x >> 16 & 0x8000, a = x & 0x7fffffff;
    if (a > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (a >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and above
    if (a < 0x38800000) {                                 // below 2^-14: adding 0.5 leaves the fp16 bits
      float t;
      std::memcpy(&t, &a, 4);
      t += 0.5f;
      uint32_t r;
      std::memcpy(&r, &t, 4);
      return uint16_t(sign | (r - 0x3f000000));
    }
    const uint32_t odd = a >> 13 & 1;
    return uint16_t(sign | ((a - (uint32_t(127 - 15) << 23) + 0xfff + odd) >> 13));
  }
  static void halves_to_floats(const uint16_t* src, float* dst, int64_t count) {
    for (int64_t i = 0; i < count; ++i) dst[i] = half_to_float(src[i]);
  }
  static void floats_to_halves(const float* src, uint16_t* dst, int64_t count) {
    for (int64_t i = 0; i < count; ++i) dst[i] = float_to_half(src[i]);
  }
};

}  // namespace
