// The packed weight format: drawn here, and known to no other C++ file.
//
//   weight[n][k] = scale[n][g] * (code[n][k] - zero[n][g]),   g = k / G
//
// Codes are unsigned, 0 .. 2^bits - 1, packed along k, the lowest k in the lowest bits of a byte:
//
//   bits = 2   byte j:  | k=4j+3 | k=4j+2 | k=4j+1 | k=4j |      bit 7 .. bit 0
//   bits = 4   byte j:  |     k=2j+1      |     k=2j      |
//   bits = 8   byte j:  |              k=j                |
//
// A row holds Kp codes, K rounded up to 32 (so that every row starts on a whole 32-code block: 8, 16
// or 32 bytes); the codes past K are 0 and meet zero activations, so they contribute nothing.
//
//   qweight  uint8 [N][Kp * bits / 8]
//   scales   fp16 or fp32 [N][groups],  groups = ceil(Kp / G), G a multiple of 32 (the last may be short)
//   zeros    like scales, or one number for the layer; a *real* number, so that one kernel serves
//            every grid: (2^bits - 1) / 2 is the symmetric one (2 bits: -1.5 -0.5 0.5 1.5), 1 with the
//            codes 0..2 is ternary, anything else is affine.
//
// A convolution is N = out channels by K = (kernel row, kernel column, input channel of the group),
// the input channel running fastest.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define MPQ_HD __host__ __device__
#else
#define MPQ_HD
#endif

namespace mpq {

constexpr int64_t kBlock = 32;  // codes; no group boundary falls inside a block

MPQ_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MPQ_HD constexpr int64_t padded(int64_t k) { return ceil_div(k, kBlock) * kBlock; }
MPQ_HD constexpr int64_t packed_bytes(int64_t kp, int bits) { return kp * bits / 8; }
MPQ_HD constexpr int max_code(int bits) { return (1 << bits) - 1; }
MPQ_HD constexpr float mid_zero(int bits) { return float(max_code(bits)) / 2; }

MPQ_HD inline uint8_t get_code(const uint8_t* row, int64_t k, int bits) {
  const int64_t bit = k * bits;
  return uint8_t(row[bit / 8] >> (bit % 8)) & max_code(bits);
}

MPQ_HD inline void or_code(uint8_t* row, int64_t k, int bits, uint8_t code) {  // the place must hold 0
  const int64_t bit = k * bits;
  row[bit / 8] |= uint8_t(code << (bit % 8));
}

// A packed weight as the kernels see it: pointers and sizes, nothing owned.
struct Packed {
  const uint8_t* codes = nullptr;
  const void* scales = nullptr;
  const void* zeros = nullptr;  // null: mid_zero(bits)
  bool half = false;            // scales and zeros are fp16, else fp32
  bool zero_each = false;       // one zero a row and group, else one for the layer
  int bits = 8;
  int64_t n = 0, k = 0, kp = 0;
  int64_t group = 0, groups = 0;

  MPQ_HD const uint8_t* row(int64_t i) const { return codes + i * packed_bytes(kp, bits); }
};

}  // namespace mpq
