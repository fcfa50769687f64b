// What the ways to convolve share: where results go, and how an input is rounded to 8 bits.
#pragma once
#include <algorithm>
#include <atomic>
#include <cfloat>
#include <vector>

#include "buffer.h"
#include "drivers.h"

namespace mpq {

constexpr int64_t kConvGrain = 1 << 15;  // elements below which a second thread costs more than it saves

// A stretch of output pixels in one output row, at `lane` of its tile.
struct Run {
  int64_t lane, length, batch, y, x;
};

// Output pixels p0..p1, numbered over (batch, row, column), as runs; returns how many.
inline int64_t split(const ConvArgs& a, int64_t p0, int64_t p1, Run* runs) {
  int64_t count = 0;
  for (int64_t p = p0; p < p1;) {
    const int64_t x = p % a.out_width, row = p / a.out_width, left = a.out_width - x;
    const int64_t length = p1 - p < left ? p1 - p : left;
    runs[count++] = {p - p0, length, row / a.out_height, row % a.out_height, x};
    p += length;
  }
  return count;
}

// Where the results of a weight row go: within a channel group the rows of one variant follow those of another.
struct Target {
  int64_t variant, channel;

  Target(const ConvArgs& a, int64_t n) {
    const int64_t rows = a.weight.n / (a.groups * a.variants);
    variant = n / rows % a.variants;
    channel = n / (rows * a.variants) * rows + n % rows;
  }
  float* in(const ConvArgs& a) const { return a.y + variant * a.batch * a.y_stride[0] + channel * a.y_stride[1]; }
  float bias(const ConvArgs& a) const { return a.bias ? a.bias[channel] : 0; }
};

// What samples' 8-bit activations are rounded by: the fixed scale, else max|x| / 127, and NaN where an x is not finite.
// A thread finds a sample's scale when it comes to it, so that rounding meets the sample in the cache; where threads
// would share out too few samples unevenly, they find all scales together, first.
class Scales8 {
 public:
  // Of a thread: the last sample it came to.
  struct Cursor {
    int64_t sample = -1;
    float scale = 0;
  };

  // A fixed scale needs no look at the input if rounding meets all of it and tells what is not finite.
  explicit Scales8(const ConvArgs& a, bool rounds_all = true);
  // Null without 8-bit activations; else of use until the cursor's next sample.
  const float* of(int64_t b, Cursor& at) const;

 private:
  float from_largest(float top) const;

  const ConvArgs& a_;
  const bool rounds_all_;
  Buffer<float> known_;
};

// What results that are handed on become.
inline ByteGrid byte_grid(const ConvArgs& a) {
  const Range range = range_of(a.activation);
  const float ends[2] = {std::max(range.low, -FLT_MAX), std::min(range.high, FLT_MAX)};
  int8_t rounded[2];
  kernels().round_bytes(ends, 2, 1, 2, a.y8_scale, rounded, 2);
  return {a.y8_scale, rounded[0], rounded[1]};
}

// Samples that rounding has found to be not finite.
class Spoiled {
 public:
  explicit Spoiled(int64_t samples) : found_(samples) {}
  void mark(int64_t b) { found_[b].store(true, std::memory_order_relaxed); }
  bool at(int64_t b) const { return found_[b].load(std::memory_order_relaxed); }
  // All results of these samples become NaN, or kSpoiled.
  void fill(const ConvArgs& a) const;

 private:
  std::vector<std::atomic<bool>> found_;
};

// The ways: patches against dequantized weights, or planes where there is one tap; patches in integers; and each
// channel on its own.
void conv_dense(const ConvArgs& a);
void conv_planes(const ConvArgs& a);
bool takes_planes(const ConvArgs& a);
void conv_a8(const ConvArgs& a);
void conv_depthwise(const ConvArgs& a);
bool takes_depthwise(const ConvArgs& a);
bool depthwise_takes_bytes(const ConvArgs& a);

}  // namespace mpq
