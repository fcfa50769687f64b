// What this processor can do at best: bytes read and multiply-adds done, for roofline.py to time.
//
// For x86 with AVX2 and fused multiply-adds; where it does not compile, benchmarks do without it. Steps are
// written as instructions, so that no compiler takes them out of their loop or copies their sums about.
#include <cstddef>
#include <cstdint>

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#else
constexpr int kBytes = 32;
#endif
typedef int64_t Vec __attribute__((vector_size(kBytes)));
typedef int64_t Vec32 __attribute__((vector_size(32)));
constexpr int kSums = 12;  // more than latency times ports: no sum waits for its last addition

// `step` adds into one sum at a time, `times` times into each. All zeros: only the instructions matter.
template <class T, class Step>
int64_t repeat(int64_t times, int64_t macs_each, Step step) {
  T sums[kSums] = {};
  for (int64_t i = 0; i < times; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kSums; ++j) step(sums[j]);
  }
  return times * kSums * macs_each;
}

}  // namespace

extern "C" {

// Reads `bytes` (a multiple of streams * 256) once, as `streams` parts side by side.
int64_t read_memory(const char* data, size_t bytes, int streams) {
  Vec a = {}, b = {}, c = {}, d = {};
  const size_t part = bytes / streams;
  const auto load = [](const char* p) { return *reinterpret_cast<const Vec*>(p); };
  for (size_t at = 0; at < part; at += 4 * kBytes) {
    for (int s = 0; s < streams; ++s) {
      const char* p = data + s * part + at;
      a ^= load(p);
      b ^= load(p + kBytes);
      c ^= load(p + 2 * kBytes);
      d ^= load(p + 3 * kBytes);
    }
  }
  a ^= b ^ c ^ d;
  return a[0] ^ a[1] ^ a[2] ^ a[3];
}

// Multiply-adds of fp32 numbers, in `times` rounds; returns how many.
int64_t multiply_add_fp32(int64_t times) {
  const Vec x = {}, y = {};
  return repeat<Vec>(times, kBytes / 4, [&](Vec& sum) {
    asm volatile("vfmadd231ps %1, %2, %0" : "+v"(sum) : "v"(x), "v"(y));
  });
}

// The same of 8-bit numbers into exact 32-bit sums: one instruction where the processor has it, else three.
int64_t multiply_add_int8(int64_t times) {
#if defined(__AVX512VNNI__)
  const Vec x = {}, y = {};
  return repeat<Vec>(times, kBytes, [&](Vec& sum) {
    asm volatile("vpdpbusd %1, %2, %0" : "+v"(sum) : "v"(x), "v"(y));
  });
#elif defined(__AVXVNNI__)
  const Vec32 x = {}, y = {};
  return repeat<Vec32>(times, 32, [&](Vec32& sum) {
    asm volatile("%{vex%} vpdpbusd %1, %2, %0" : "+x"(sum) : "x"(x), "x"(y));
  });
#else
  const Vec32 x = {}, y = {};
  return repeat<Vec32>(times, 32, [&](Vec32& sum) {
    Vec32 pairs;
    asm volatile("vpmaddubsw %1, %2, %0" : "=x"(pairs) : "x"(x), "x"(y));
    asm volatile("vpmaddwd %1, %0, %0" : "+x"(pairs) : "x"(y));
    asm volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(pairs));
  });
#endif
}

}  // extern "C"
