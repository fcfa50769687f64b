// conv2d with 8-bit activations: the input is rounded once, channels last, so that a patch is a few copies.
#include <algorithm>
#include <cstring>

#include "buffer.h"
#include "conv.h"
#include "parallel.h"

namespace mpq {
namespace {

constexpr int64_t kRows8 = 32;  // pixels of an 8-bit tile

}  // namespace

void load_grids(const Packed& w, int64_t n0, int64_t n1, float* scales, float* zeros) {
  const Float type = w.half ? Float::f16 : Float::f32;
  const int64_t size = w.half ? 2 : 4, at = n0 * w.groups, count = (n1 - n0) * w.groups;
  kernels().to_float(static_cast<const char*>(w.scales) + at * size, type, scales, count);
  if (w.zero_each) return kernels().to_float(static_cast<const char*>(w.zeros) + at * size, type, zeros, count);
  float zero = mid_zero(w.bits);
  if (w.zeros) kernels().to_float(w.zeros, type, &zero, 1);
  std::fill_n(zeros, count, zero);
}

void sample_scales(const ConvArgs& a, float* scales) {
  // Whole samples in one piece, or else the longest stretches there are.
  const bool planar = a.x_stride[3] == 1 && a.x_stride[2] == a.width && a.x_stride[1] == a.height * a.width;
  const bool last = a.x_stride[1] == 1 && a.x_stride[3] == a.in_channels && a.x_stride[2] == a.width * a.in_channels;
  const int64_t pieces = a.height, row = a.width * a.in_channels;
  Buffer<float> tops(a.batch * pieces);
  parallel_for(a.batch * pieces, ceil_div(kConvGrain, row), [&](int64_t begin, int64_t end) {
    Buffer<float> line(a.width);
    for (int64_t i = begin; i < end; ++i) {
      const float* x = a.x + i / pieces * a.x_stride[0];
      const int64_t y = i % pieces;
      if (planar || last) {
        tops[i] = kernels().largest(x + y * row, row);  // some row's worth, whatever lies there
        continue;
      }
      float top = 0;
      for (int64_t c = 0; c < a.in_channels; ++c) {
        kernels().every(x + c * a.x_stride[1] + y * a.x_stride[2], a.x_stride[3], a.width, line);
        const float t = kernels().largest(line, a.width);
        top = top >= t ? top : t;  // a NaN stays
        if (t != t) break;
      }
      tops[i] = top;
    }
  });
  for (int64_t b = 0; b < a.batch; ++b) {
    float top = 0;
    for (int64_t i = 0; i < pieces && top == top; ++i) top = top >= tops[b * pieces + i] ? top : tops[b * pieces + i];
    scales[b] = top != top ? top : a.act_scale.values ? a.act_scale.values[0] : top / 127.0f;
  }
}

void conv_a8(const ConvArgs& a) {
  const Packed& w = a.weight;
  const int64_t rows = w.n / a.groups, channels = a.in_channels / a.groups, pixels = a.pixels();
  const int64_t sample = a.in_channels * a.height * a.width;
  Buffer<int8_t> q(a.batch * sample);
  Buffer<float> scales(a.batch);
  parallel_for(a.batch, 1, [&](int64_t begin, int64_t end) {
    Buffer<float> image(sample);
    for (int64_t b = begin; b < end; ++b) {
      float* out = image;
      for (int64_t y = 0; y < a.height; ++y)
        for (int64_t x = 0; x < a.width; ++x)
          for (int64_t c = 0; c < a.in_channels; ++c)
            *out++ = a.x[b * a.x_stride[0] + c * a.x_stride[1] + y * a.x_stride[2] + x * a.x_stride[3]];
      int64_t unused;
      kernels().quantize_act(image, sample, sample, a.act_scale, q + b * sample, scales + b, &unused);
    }
  });
  const int64_t tiles = ceil_div(pixels, kRows8);
  parallel_for(tiles * a.groups, 1, [&](int64_t begin, int64_t end) {
    Buffer<int8_t> patch(kRows8 * w.kp);
    Buffer<float> a_scale(kRows8 * w.groups), sums(kRows8 * rows), grid(8 * w.groups);
    Buffer<int64_t> a_sum(kRows8 * w.groups);
    Run runs[kRows8];
    std::memset(patch, 0, kRows8 * w.kp);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i % a.groups, p0 = i / a.groups * kRows8, p1 = std::min(pixels, p0 + kRows8);
      const int64_t count = split(a, p0, p1, runs);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t j = 0; j < runs[r].length; ++j) {
          const Run& run = runs[r];
          const int64_t m = run.lane + j;
          int8_t* out = patch + m * w.kp;
          for (int64_t ky = 0; ky < a.kernel[0]; ++ky)
            for (int64_t kx = 0; kx < a.kernel[1]; ++kx, out += channels) {
              const int64_t y = run.y * a.stride[0] - a.padding[0] + ky * a.dilation[0];
              const int64_t x = (run.x + j) * a.stride[1] - a.padding[1] + kx * a.dilation[1];
              if (y < 0 || y >= a.height || x < 0 || x >= a.width)
                std::memset(out, 0, channels);
              else
                std::memcpy(out, q + run.batch * sample + (y * a.width + x) * a.in_channels + group * channels,
                            channels);
            }
          for (int64_t g = 0; g < w.groups; ++g) {
            int64_t total = 0;
            for (int64_t k = g * w.group; k < std::min(w.kp, (g + 1) * w.group); ++k) total += patch[m * w.kp + k];
            a_scale[m * w.groups + g] = scales[run.batch];
            a_sum[m * w.groups + g] = total;
          }
        }
      kernels().gemm_a8(w, group * rows, (group + 1) * rows, patch, a_scale, a_sum, p1 - p0, sums, rows, grid);
      for (int64_t n = 0; n < rows; ++n) scatter(a, group * rows + n, runs, count, sums + n, rows);
    }
  });
}

}  // namespace mpq
