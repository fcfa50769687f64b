// Scales of a convolution's 8-bit activations.
#include <algorithm>
#include <limits>

#include "conv.h"
#include "parallel.h"

namespace mpq {
namespace {

// The largest size in rows y0..y1 of sample b, NaN where one is not finite. Where a sample is in one piece it is taken
// in order, so that other values stand for those of a row.
float largest_of(const ConvArgs& a, int64_t b, int64_t y0, int64_t y1) {
  const bool planar = a.x_stride[3] == 1 && a.x_stride[2] == a.width && a.x_stride[1] == a.height * a.width;
  const bool last = a.x_stride[1] == 1 && a.x_stride[3] == a.in_channels && a.x_stride[2] == a.width * a.in_channels;
  const float* x = a.x + b * a.x_stride[0];
  const int64_t row = a.width * a.in_channels;
  if (planar || last) return kernels().largest(x + y0 * row, (y1 - y0) * row);
  Buffer<float> line(a.width);
  float top = 0;
  for (int64_t c = 0; c < a.in_channels; ++c)
    for (int64_t y = y0; y < y1; ++y) {
      kernels().every(x + c * a.x_stride[1] + y * a.x_stride[2], a.x_stride[3], a.width, line);
      const float t = kernels().largest(line, a.width);
      if (t != t) return t;
      top = std::max(top, t);
    }
  return top;
}

bool each_by_one(int64_t samples) {
  const int64_t threads = thread_count();
  return samples % threads == 0 || samples >= 4 * threads;
}

}  // namespace

Scales8::Scales8(const ConvArgs& a, bool rounds_all)
    : a_(a), rounds_all_(rounds_all), known_(a.act8 && !a.x8 && !each_by_one(a.batch) ? a.batch : 0) {
  if (!known_) return;
  const bool fixed = a.act_scale.values && rounds_all;
  Buffer<float> tops(fixed ? 0 : a.batch * a.height);
  if (!fixed)
    parallel_for(a.batch * a.height, ceil_div(kConvGrain, a.width * a.in_channels), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t y = i % a.height;
        tops[i] = largest_of(a, i / a.height, y, y + 1);
      }
    });
  for (int64_t b = 0; b < a.batch; ++b) {
    float top = 0;
    for (int64_t y = 0; !fixed && y < a.height && top == top; ++y) {
      const float t = tops[b * a.height + y];
      top = top >= t ? top : t;  // a NaN stays
    }
    known_[b] = from_largest(top);
  }
}

float Scales8::from_largest(float top) const {
  return top != top ? top : a_.act_scale.values ? *a_.act_scale.values : top / 127.0f;
}

const float* Scales8::of(int64_t b, Cursor& at) const {
  if (!a_.act8) return nullptr;
  if (known_) return known_ + b;
  if (a_.x8) {
    const bool spoiled = a_.x8[b * a_.x_stride[0]] == kSpoiled;
    at = {b, spoiled ? std::numeric_limits<float>::quiet_NaN() : *a_.act_scale.values};
  } else if (at.sample != b) {
    const bool fixed = a_.act_scale.values && rounds_all_;
    at = {b, from_largest(fixed ? 0 : largest_of(a_, b, 0, a_.height))};
  }
  return &at.scale;
}

void Spoiled::fill(const ConvArgs& a) const {
  const int64_t results = a.weight.n * a.out_height * a.out_width;  // of a sample, in one piece
  for (int64_t b = 0; b < int64_t(found_.size()); ++b)
    if (at(b) && a.y8)
      std::fill_n(a.y8 + b * a.y_stride[0], results, kSpoiled);
    else if (at(b))
      std::fill_n(a.y + b * a.y_stride[0], results, std::numeric_limits<float>::quiet_NaN());
}

}  // namespace mpq
