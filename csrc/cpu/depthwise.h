// What the ways of a depthwise convolution share: its weights, and how integer sums become results.
//
// Bytes have a way of their own, through quads. Where that does not serve, 8-bit activations go the ways of floats:
// with codes and activations as integers every fp32 sum is exact.
#pragma once
#include <vector>

#include "buffer.h"
#include "conv.h"

namespace mpq {

constexpr int64_t kExactTaps = 256;  // taps * 510 * 127 < 2^24

// Weight row n for the kernels: y = scale * sum + bias, with the sum over its `taps`.
struct Filters {
  const int64_t count;              // taps of a row
  Buffer<float> scale, bias, zero;  // zero: of the codes
  bool centered = true;             // taps are each() * code - offset(n), integers; else codes
  float most = 0;                   // the largest size of such a tap there may be
  std::vector<float> taps;          // [N][count], once decoded

  explicit Filters(const ConvArgs& a);
  void decode(const ConvArgs& a);
  int each() const { return centered ? 2 : 1; }
  int offset(int64_t n) const { return centered ? int(2 * zero[n]) : 0; }
};

// Sums of code * q and of q -> results.
inline void settle(float* y, const float* total, int64_t count, float scale, float zero, float bias) {
  for (int64_t i = 0; i < count; ++i) y[i] = float(double(scale) * (y[i] - double(zero) * total[i]) + bias);
}

// Vectors along pixels, over a band of one channel's plane in the cache.
void depthwise_planes(const ConvArgs& a, const Filters& f, const Scales8& scales, Spoiled& spoiled);
// Vectors along channels, that lie side by side or, to be turned, in planes: over floats, or bytes where these serve.
void depthwise_floats(const ConvArgs& a, const Filters& f, bool turn, const Scales8& scales, Spoiled& spoiled);
void depthwise_quads(const ConvArgs& a, const Filters& f, bool turn, const Scales8& scales, Spoiled& spoiled);
bool takes_quads(const ConvArgs& a, const Filters& f);

}  // namespace mpq
