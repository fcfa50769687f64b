// Depthwise convolution with vectors along pixels: over a zero-padded band of one channel's plane that stays in the
// cache.
#include <algorithm>
#include <cstring>
#include <vector>

#include "depthwise.h"
#include "parallel.h"

namespace mpq {
namespace {

constexpr int64_t kBandFloats = 8 * 1024;  // of a plane: 32 KiB, most of a level 1 cache

// Some rows of one plane, padded with zeros and taken apart into phases: every stride-th row and column from each
// start. What a tap meets at neighbouring results is then contiguous, and every row of results follows the one before
// at the same distance, `span`: a tap is one offset.
struct Band {
  const int64_t out_rows, rows_in, width, steps[2], span, height;
  std::vector<int64_t> offsets;
  Buffer<float> data, rounded;  // rounded: input rows in one piece

  Band(const ConvArgs& a, int64_t wanted)
      : out_rows(wanted),
        rows_in((wanted - 1) * a.stride[0] + (a.kernel[0] - 1) * a.dilation[0] + 1),
        width(a.width + 2 * a.padding[1]),
        steps{std::min(a.stride[0], rows_in), std::min(a.stride[1], width)},
        span(ceil_div(width, a.stride[1])),
        height(ceil_div(rows_in, a.stride[0])),
        data(size() + 2 * kWidest),
        rounded(a.act8 ? std::min(rows_in, a.height) * a.width : 0) {
    std::memset(data, 0, (size() + 2 * kWidest) * sizeof(float));
    for (int64_t ky = 0; ky < a.kernel[0]; ++ky)
      for (int64_t kx = 0; kx < a.kernel[1]; ++kx)
        offsets.push_back(row_at(a, ky * a.dilation[0]) + column_at(a, kx * a.dilation[1]));
  }
  int64_t size() const { return steps[0] * steps[1] * height * span; }
  int64_t row_at(const ConvArgs& a, int64_t v) const {
    return (v % a.stride[0] * steps[1] * height + v / a.stride[0]) * span;
  }
  int64_t column_at(const ConvArgs& a, int64_t u) const { return u % a.stride[1] * height * span + u / a.stride[1]; }

  // Input rows that results from row y0 on meet; `scale` is that of 8-bit activations. False where one of them is not
  // finite.
  bool fill(const ConvArgs& a, const float* plane, int64_t y0, int64_t rows, const float* scale) {
    const int64_t top = y0 * a.stride[0] - a.padding[0];
    const int64_t used = (rows - 1) * a.stride[0] + (a.kernel[0] - 1) * a.dilation[0] + 1;
    const int64_t first = std::clamp<int64_t>(top, 0, a.height), last = std::clamp(top + used, first, a.height);
    const float* in = plane + first * a.x_stride[2];
    int64_t row = a.x_stride[2], gap = a.x_stride[3];
    bool finite = true;
    if (scale) {
      finite = round(a, in, last - first, *scale);
      in = rounded, row = a.width, gap = 1;
    }
    for (int64_t v = 0; v < used; ++v) {
      const bool inside = first <= top + v && top + v < last;
      for (int64_t x = 0; x < std::min(a.stride[1], a.width); ++x) {
        const int64_t count = ceil_div(a.width - x, a.stride[1]);
        float* out = data + row_at(a, v) + column_at(a, x + a.padding[1]);
        if (inside)
          kernels().every(in + x * gap, gap * a.stride[1], count, out);
        else
          std::memset(out, 0, count * sizeof(float));
      }
      if (inside) in += row;
    }
    return finite;
  }

  bool round(const ConvArgs& a, const float* in, int64_t rows, float scale) {
    if (a.x_stride[3] == 1 && a.x_stride[2] == a.width) return kernels().round_act(in, rows * a.width, scale, rounded);
    for (int64_t i = 0; i < rows; ++i, in += a.x_stride[2])
      kernels().every(in, a.x_stride[3], a.width, rounded + i * a.width);
    return kernels().round_act(rounded, rows * a.width, scale, rounded);
  }
};

}  // namespace

void depthwise_planes(const ConvArgs& a, const Filters& f, const Scales8& scales, Spoiled& spoiled) {
  const Packed& w = a.weight;
  const int64_t multiplier = w.n / a.groups, row_floats = a.stride[0] * (a.width + 2 * a.padding[1]);
  const int64_t wanted =
      std::clamp<int64_t>(kBandFloats / row_floats, std::min<int64_t>(a.out_height, a.kernel[0]), a.out_height);
  const int64_t bands = ceil_div(a.out_height, wanted);
  const bool far = a.variants == 1 && a.y_stride[3] == 1 && a.y_stride[2] == a.out_width &&
                   goes_far(a.y, a.y_stride[1], a.pixels() * w.n);
  parallel_for(a.batch * a.groups, ceil_div(kConvGrain, a.out_height * a.out_width * w.k),
               [&](int64_t begin, int64_t end) {
                 Band band(a, ceil_div(a.out_height, bands));
                 const int64_t room = ceil_div(band.out_rows * band.span, kWidest) * kWidest;
                 Buffer<float> sums(room), totals(f.centered ? 0 : room), ones(f.count);
                 std::fill_n(static_cast<float*>(ones), f.count, 1.0f);
                 Scales8::Cursor cursor;
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t b = i / a.groups, channel = i % a.groups;
                   const float *plane = a.x + b * a.x_stride[0] + channel * a.x_stride[1], *act = scales.of(b, cursor);
                   for (int64_t y0 = 0; y0 < a.out_height; y0 += band.out_rows) {
                     const int64_t rows = std::min(band.out_rows, a.out_height - y0),
                                   count = (rows - 1) * band.span + a.out_width;
                     if (!band.fill(a, plane, y0, rows, act)) spoiled.mark(b);
                     if (!f.centered)
                       kernels().filter_plane(band.data, band.offsets.data(), ones, f.count, 1, 0, {}, totals, count);
                     for (int64_t n = channel * multiplier; n < (channel + 1) * multiplier; ++n) {
                       const float* taps = &f.taps[n * f.count];
                       const float scale = act ? f.scale[n] * *act : 1;
                       kernels().filter_plane(band.data, band.offsets.data(), taps, f.count, f.centered ? scale : 1,
                                              f.centered ? f.bias[n] : 0, f.centered ? range_of(a.activation) : Range{},
                                              sums, count);
                       if (!f.centered) settle(sums, totals, count, scale, f.zero[n], f.bias[n]);
                       if (!f.centered || bends(a.activation)) kernels().activate(a.activation, sums, 1, count, count);
                       float* y = Target(a, n).in(a) + b * a.y_stride[0] + y0 * a.y_stride[2];
                       if (far) {  // in one piece
                         for (int64_t r = 1; r < rows; ++r)
                           std::memmove(sums + r * a.out_width, sums + r * band.span, a.out_width * sizeof(float));
                         kernels().copy_far(sums, rows * a.out_width, y);
                         continue;
                       }
                       for (int64_t r = 0; r < rows; ++r, y += a.y_stride[2])
                         if (a.y_stride[3] == 1)
                           std::memcpy(y, sums + r * band.span, a.out_width * sizeof(float));
                         else
                           for (int64_t x = 0; x < a.out_width; ++x) y[x * a.y_stride[3]] = sums[r * band.span + x];
                     }
                   }
                 }
               });
}

}  // namespace mpq
