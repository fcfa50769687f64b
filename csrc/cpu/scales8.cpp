// Scales of a convolution's 8-bit activations.
#include <algorithm>
#include <limits>

#include "conv.h"
#include "parallel.h"

namespace mpq {

Scales8::Scales8(const ConvArgs& a, bool beforehand, bool rounds_all)
    : a_(a),
      rounds_all_(rounds_all),
      known_(a.act8 && (beforehand || a.batch < thread_count()) ? a.batch : 0),
      spoiled_(a.act8 ? a.batch : 0) {
  for (int64_t b = 0; known_ && b < a.batch; ++b) known_[b] = find(b);
}

const float* Scales8::of(int64_t b, Cursor& at) const {
  if (!a_.act8) return nullptr;
  if (known_) return known_ + b;
  if (at.sample != b) at = {b, find(b)};
  return &at.scale;
}

void Scales8::finish() const {
  const int64_t results = a_.weight.n * a_.out_height * a_.out_width;  // of a sample, in one piece
  for (size_t b = 0; b < spoiled_.size(); ++b)
    if (spoiled_[b]) std::fill_n(a_.y + int64_t(b) * a_.y_stride[0], results, std::numeric_limits<float>::quiet_NaN());
}

float Scales8::find(int64_t b) const {
  const ConvArgs& a = a_;
  const float* fixed = a.act_scale.values;
  if (fixed && rounds_all_) return *fixed;
  // Whole samples in one piece, or else the longest stretches there are.
  const bool planar = a.x_stride[3] == 1 && a.x_stride[2] == a.width && a.x_stride[1] == a.height * a.width;
  const bool last = a.x_stride[1] == 1 && a.x_stride[3] == a.in_channels && a.x_stride[2] == a.width * a.in_channels;
  const int64_t row = a.width * a.in_channels;
  const float* x = a.x + b * a.x_stride[0];
  Buffer<float> tops(a.height);
  parallel_for(a.height, ceil_div(kConvGrain, row), [&](int64_t begin, int64_t end) {
    Buffer<float> line(a.width);
    for (int64_t y = begin; y < end; ++y) {
      if (planar || last) {
        tops[y] = kernels().largest(x + y * row, row);  // some row's worth, whatever lies there
        continue;
      }
      float top = 0;
      for (int64_t c = 0; c < a.in_channels; ++c) {
        kernels().every(x + c * a.x_stride[1] + y * a.x_stride[2], a.x_stride[3], a.width, line);
        const float t = kernels().largest(line, a.width);
        top = top >= t ? top : t;  // a NaN stays
        if (t != t) break;
      }
      tops[y] = top;
    }
  });
  float top = 0;
  for (int64_t y = 0; y < a.height && top == top; ++y) top = top >= tops[y] ? top : tops[y];
  return top != top ? top : fixed ? *fixed : top / 127.0f;
}

}  // namespace mpq
