// What the two ways of a depthwise convolution share: its weights, and how integer sums become results.
//
// 8-bit activations take the same ways as others: with codes and activations as integers every fp32 sum is exact.
#pragma once
#include "buffer.h"
#include "conv.h"

namespace mpq {

constexpr int64_t kExactTaps = 256;  // taps * 510 * 127 < 2^24

// Weight row n for the kernels: y = scale * sum + bias, with the sum over its `taps`.
struct Filters {
  const int64_t count;                    // taps of a row
  Buffer<float> taps, scale, bias, zero;  // taps [N][count]; zero: of the codes, where it is not in the taps
  bool centered = true;                   // the zero is in the taps

  explicit Filters(const ConvArgs& a);

 private:
  void fill_row(int64_t n, const uint8_t* codes);  // its taps
};

// Sums of code * q and of q -> results.
inline void settle(float* y, const float* total, int64_t count, float scale, float zero, float bias) {
  for (int64_t i = 0; i < count; ++i) y[i] = float(double(scale) * (y[i] - double(zero) * total[i]) + bias);
}

// Vectors along pixels, over a band of one channel's plane in the cache.
void depthwise_planes(const ConvArgs& a, const Filters& f, const Scales8& scales, Spoiled& spoiled);
// Vectors along channels, that lie side by side or, in small planes, are brought so.
void depthwise_channels(const ConvArgs& a, const Filters& f, const Scales8& scales, Spoiled& spoiled);
void depthwise_turned(const ConvArgs& a, const Filters& f, const Scales8& scales, Spoiled& spoiled);

}  // namespace mpq
