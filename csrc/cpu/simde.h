// AVX-512 without such a processor, for tests: SIMDe carries the intrinsics out in plain C. Below, what
// Debian's SIMDe 0.7.4 lacks.
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <cstdint>
#include <cstring>

static inline __m512 mpq_cvtepi32_ps(__m512i a) {
  alignas(64) int32_t in[16];
  alignas(64) float out[16];
  _mm512_store_si512(in, a);
  for (int i = 0; i < 16; ++i) out[i] = float(in[i]);
  return _mm512_load_ps(out);
}
static inline __m512i mpq_cvtepu8_epi32(__m128i a) {
  alignas(16) uint8_t in[16];
  alignas(64) int32_t out[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(in), a);
  for (int i = 0; i < 16; ++i) out[i] = in[i];
  return _mm512_load_si512(out);
}
static inline __m512i mpq_cvtepu8_epi16(__m256i a) {
  alignas(32) uint8_t in[32];
  alignas(64) int16_t out[32];
  _mm256_store_si256(reinterpret_cast<__m256i*>(in), a);
  for (int i = 0; i < 32; ++i) out[i] = in[i];
  return _mm512_load_si512(out);
}
static inline __m512d mpq_cvtps_pd(__m256 a) {
  alignas(32) float in[8];
  alignas(64) double out[8];
  _mm256_store_ps(in, a);
  for (int i = 0; i < 8; ++i) out[i] = in[i];
  return _mm512_load_pd(out);
}
static inline __m512i mpq_cvtps_epi32(__m512 a) {
  alignas(64) float in[16];
  alignas(64) int32_t out[16];
  _mm512_store_ps(in, a);
  for (int i = 0; i < 16; ++i) out[i] = int32_t(__builtin_nearbyintf(in[i]));
  return _mm512_load_si512(out);
}
static inline __m128i mpq_cvtepi32_epi8(__m512i a) {
  alignas(64) int32_t in[16];
  alignas(16) int8_t out[16];
  _mm512_store_si512(in, a);
  for (int i = 0; i < 16; ++i) out[i] = int8_t(in[i]);
  return _mm_load_si128(reinterpret_cast<const __m128i*>(out));
}
static inline __m512i mpq_maskz_loadu_epi8(uint64_t mask, const void* p) {
  alignas(64) int8_t out[64] = {};
  for (int i = 0; i < 64; ++i)
    if (mask >> i & 1) out[i] = static_cast<const int8_t*>(p)[i];
  return _mm512_load_si512(out);
}
static inline void mpq_stream_ps(float* to, __m512 a) { _mm512_store_ps(to, a); }
#define _mm512_stream_ps mpq_stream_ps
static inline void mpq_stream_si512(__m512i* to, __m512i a) { _mm512_store_si512(to, a); }
#define _mm512_stream_si512 mpq_stream_si512
#define _mm512_cvtepi32_epi8 mpq_cvtepi32_epi8
#define _mm512_maskz_loadu_epi8 mpq_maskz_loadu_epi8
#define _mm512_cvtepi32_ps mpq_cvtepi32_ps
#define _mm512_cvtepu8_epi16 mpq_cvtepu8_epi16
#define _mm512_cvtepu8_epi32 mpq_cvtepu8_epi32
#define _mm512_cvtps_epi32 mpq_cvtps_epi32
#define _mm512_cvtps_pd mpq_cvtps_pd
static inline __m512 mpq_shuffle_f32x4(__m512 a, __m512 b, int pick) {
  alignas(64) float from[32], out[16];
  _mm512_store_ps(from, a);
  _mm512_store_ps(from + 16, b);
  for (int i = 0; i < 16; ++i) out[i] = from[i / 8 * 16 + (pick >> i / 4 * 2 & 3) * 4 + i % 4];
  return _mm512_load_ps(out);
}
static inline __m512 mpq_permutevar_ps(__m512 a, __m512i pick) {
  alignas(64) float from[16], out[16];
  alignas(64) int32_t index[16];
  _mm512_store_ps(from, a);
  _mm512_store_si512(index, pick);
  for (int i = 0; i < 16; ++i) out[i] = from[i / 4 * 4 + (index[i] & 3)];
  return _mm512_load_ps(out);
}
static inline float mpq_cvtss_f32(__m512 a) {
  alignas(64) float out[16];
  _mm512_store_ps(out, a);
  return out[0];
}
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 mpq_shuffle_f32x4
#define _mm512_cvtss_f32 mpq_cvtss_f32
#define _mm512_permutevar_ps mpq_permutevar_ps

// vdpbf16ps: the odd pair, then the even one, each a multiply-add rounded to nearest even; subnormals count as 0.
static inline __m512 mpq_dpbf16_ps(__m512 sum, __m512 a, __m512 b) {
  auto flushed = [](float v) { return __builtin_fabsf(v) < 0x1p-126f ? __builtin_copysignf(0, v) : v; };
  auto half = [&](float pair, int odd) {
    uint32_t bits;
    std::memcpy(&bits, &pair, 4);
    bits = odd ? bits & 0xffff0000 : bits << 16;
    std::memcpy(&pair, &bits, 4);
    return flushed(pair);
  };
  alignas(64) float s[16], x[16], y[16];
  _mm512_store_ps(s, sum);
  _mm512_store_ps(x, a);
  _mm512_store_ps(y, b);
  for (int i = 0; i < 16; ++i)
    for (int odd = 1; odd >= 0; --odd) s[i] = flushed(__builtin_fmaf(half(x[i], odd), half(y[i], odd), flushed(s[i])));
  return _mm512_load_ps(s);
}
