// conv2d as an implicit GEMM: patches are gathered tile by tile into panels, never as a whole, and meet weights that
// are dequantized a block at a time.
#include <algorithm>
#include <cstring>

#include "block.h"
#include "buffer.h"
#include "conv.h"
#include "parallel.h"

namespace mpq {
namespace {

constexpr int64_t kDepth = 512;              // k's of a dequantized block
constexpr int64_t kRows = 48;                // its output channels
constexpr int64_t kTileFloats = 128 * 1024;  // patches of a tile: 512 KiB, a level 2 cache's worth
constexpr int64_t kMinPanels = 4;            // but at least 128 pixels share each decoded weight
constexpr int64_t kSlack = 8;

// The input with its zero padding in place, as planes [batch][channel][height][row]: taps then differ by a
// constant offset and nothing needs a border check. A row holds every stride-th column, then every stride-th from
// the second on, and so on: what one tap meets at neighbouring output pixels is contiguous, whatever the stride.
// Ends in kSlack floats that may be read, not used.
struct Image {
  int64_t height, width, step, span, row;  // `span` floats of each of up to `step` phases make a row
  Buffer<float> data;

  int64_t plane() const { return height * row; }
  int64_t at(int64_t y, int64_t x) const { return y * row + x % step * span + x / step; }

  explicit Image(const ConvArgs& a)
      : height(a.height + 2 * a.padding[0]),
        width(a.width + 2 * a.padding[1]),
        step(a.stride[1]),
        span(ceil_div(width, step)),
        row(std::min(step, width) * span),
        data(a.batch * a.in_channels * plane() + kSlack) {
    const int64_t planes = a.batch * a.in_channels;
    const bool last = a.x_stride[1] == 1 && a.in_channels > 1;  // channels last
    std::memset(data + planes * plane(), 0, kSlack * sizeof(float));
    parallel_for(planes, ceil_div(kConvGrain, plane()), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (row > a.width || height > a.height) std::memset(data + i * plane(), 0, plane() * sizeof(float));
        if (!last) fill(a, i / a.in_channels, i % a.in_channels, 1, 0, a.height);
      }
    });
    if (last)
      parallel_for(a.batch * a.height, ceil_div(kConvGrain, row * a.in_channels), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) fill(a, i / a.height, 0, a.in_channels, i % a.height, i % a.height + 1);
      });
  }

  // Rows y0..y1 of some channels of a sample.
  void fill(const ConvArgs& a, int64_t sample, int64_t channel, int64_t channels, int64_t y0, int64_t y1) {
    for (int64_t x = 0; x < std::min(step, a.width); ++x) {
      const int64_t count = ceil_div(a.width - x, step), gap = step * a.x_stride[3];
      const float* in = a.x + sample * a.x_stride[0] + channel * a.x_stride[1] + y0 * a.x_stride[2] + x * a.x_stride[3];
      float* to = data + (sample * a.in_channels + channel) * plane() + at(y0 + a.padding[0], x + a.padding[1]);
      for (int64_t y = y0; y < y1; ++y, in += a.x_stride[2], to += row) {
        if (channels > 1)
          kernels().transpose(in, gap, count, channels, to, plane());
        else if (gap == 1)
          std::memcpy(to, in, count * sizeof(float));
        else
          for (int64_t i = 0; i < count; ++i) to[i] = in[i * gap];
      }
    }
  }
};

// panel[k][lane] = the input that weight k of a channel group meets at each of up to 32 pixels. May write
// up to kSlack floats past the panel.
void gather(const ConvArgs& a, const Image& image, int64_t group, int64_t p0, int64_t p1, float* panel) {
  const int64_t channels = a.in_channels / a.groups;
  Run runs[kPanel];
  int64_t from[kPanel];  // where a run's first pixel meets the kernel's first tap in its sample's channel 0
  const int64_t count = split(a, p0, p1, runs);
  for (int64_t i = 0; i < count; ++i)
    from[i] = runs[i].batch * a.in_channels * image.plane() + runs[i].y * a.stride[0] * image.row + runs[i].x;
  if (p1 - p0 < kPanel) std::memset(panel, 0, a.weight.kp * kPanel * sizeof(float));
  float* out = panel;
  const float* first = image.data + group * channels * image.plane();
  auto tap = [&](const float* in) {
    for (int64_t i = 0; i < count; ++i)  // whole vectors: what is too much is overwritten by the next run or tap
      for (int64_t j = 0; j < runs[i].length; j += kSlack)
        std::memcpy(out + runs[i].lane + j, in + from[i] + j, kSlack * sizeof(float));
    out += kPanel;
  };
  if (a.floats) {  // in the order of their kind of weight
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t ky = 0; ky < a.kernel[0]; ++ky)
        for (int64_t kx = 0; kx < a.kernel[1]; ++kx)
          tap(first + c * image.plane() + image.at(ky * a.dilation[0], kx * a.dilation[1]));
  } else {
    for (int64_t ky = 0; ky < a.kernel[0]; ++ky)
      for (int64_t kx = 0; kx < a.kernel[1]; ++kx) {
        const float* in = first + image.at(ky * a.dilation[0], kx * a.dilation[1]);
        for (int64_t c = 0; c < channels; ++c, in += image.plane()) tap(in);
      }
  }
  std::memset(out, 0, (a.weight.kp - a.weight.k) * kPanel * sizeof(float));
}

// The same for rows n0..n1 at the pixels from p0 on when channels run fastest: sums[n][pixel] are turned.
void scatter_last(const ConvArgs& a, int64_t n0, int64_t n1, int64_t p0, int64_t pixels, float* sums, int64_t ld) {
  const int64_t rows = a.weight.n / (a.groups * a.variants), channels = a.weight.n / a.variants;
  for (int64_t n = n0, stop; n < n1; sums += (stop - n) * ld, n = stop) {
    stop = std::min(n1, (n / rows + 1) * rows);  // of one variant and channel group
    if (a.bias)
      for (int64_t i = n; i < stop; ++i) {
        const float bias = Target(a, i).bias(a);
        for (int64_t j = 0; j < pixels; ++j) sums[(i - n) * ld + j] += bias;
      }
    kernels().transpose(sums, ld, stop - n, pixels, Target(a, n).in(a) + p0 * channels, channels);
  }
}

}  // namespace

void conv_dense(const ConvArgs& a) {
  const Packed& w = a.weight;
  const Image image(a);
  const int64_t rows = w.n / a.groups, pixels = a.pixels();
  const int64_t panels = std::min(ceil_div(pixels, kPanel), std::max(kMinPanels, kTileFloats / (kPanel * w.kp)));
  const int64_t tiles = ceil_div(pixels, panels * kPanel) * a.groups;
  // With fewer tiles than threads the output channels are shared out too, and patches gathered twice.
  const int64_t parts = std::min(ceil_div(rows, kRows), std::max<int64_t>(1, ceil_div(2 * thread_count(), tiles)));
  const int64_t part_rows = ceil_div(rows, parts);
  parallel_for(tiles * parts, 1, [&](int64_t begin, int64_t end) {
    Buffer<float> patches(panels * kPanel * w.kp + kSlack), room(a.floats ? 0 : kRows * kDepth),
        sums(kRows * panels * kPanel), grid(2 * w.groups);
    Buffer<Run> runs(panels * kPanel);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = i / parts / a.groups, group = i / parts % a.groups, part = i % parts;
      const int64_t p0 = tile * panels * kPanel, p1 = std::min(pixels, p0 + panels * kPanel);
      const int64_t used = ceil_div(p1 - p0, kPanel), ld = used * kPanel, first = group * rows;
      if (part == 0 || i == begin)
        for (int64_t p = 0; p < used; ++p)
          gather(a, image, group, p0 + p * kPanel, std::min(p1, p0 + (p + 1) * kPanel), patches + p * kPanel * w.kp);
      const int64_t count = split(a, p0, p1, runs), stop = first + std::min(rows, (part + 1) * part_rows);
      for (int64_t n0 = first + part * part_rows; n0 < stop; n0 += kRows) {
        const int64_t n1 = std::min(stop, n0 + kRows);
        for (int64_t k0 = 0; k0 < w.kp; k0 += kDepth) {
          const int64_t k1 = std::min(w.kp, k0 + kDepth);
          const Block block = fp32_block(w, a.floats, n0, n1, k0, k1, room, kDepth, grid);
          for (int64_t p = 0; p < used; ++p)
            kernels().gemm(block.data, block.ld, n1 - n0, patches + (p * w.kp + k0) * kPanel, p1 - p0 - p * kPanel,
                           k1 - k0, sums + p * kPanel, ld, k0 == 0);
        }
        if (a.y_stride[1] == 1)
          scatter_last(a, n0, n1, p0, p1 - p0, sums, ld);
        else
          for (int64_t n = n0; n < n1; ++n) scatter(a, n, runs, count, sums + (n - n0) * ld, 1);
      }
    }
  });
}

}  // namespace mpq
