// conv2d as an implicit GEMM: patches are gathered tile by tile into panels, never as a whole, and meet weights that
// are dequantized a block at a time.
#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

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

// Where patches are read: planes [batch][channel][height][row] in which taps differ by a constant offset and what one
// tap meets at neighbouring output pixels is contiguous. That is the input itself where it has no padding and is
// walked pixel by pixel. Else it is copied with its zeros in place, and a row holds every stride-th column, then every
// stride-th from the second on, and so on.
struct Image {
  const bool in_place;
  const int64_t height, width, step, span;  // `span` floats of each of up to `step` phases make a row
  const int64_t row, plane, sample;         // distances
  Buffer<float> room;
  const float *data, *end;

  explicit Image(const ConvArgs& a)
      : in_place(a.padding[0] == 0 && a.padding[1] == 0 && a.stride[1] == 1 && a.x_stride[3] == 1),
        height(a.height + 2 * a.padding[0]),
        width(a.width + 2 * a.padding[1]),
        step(a.stride[1]),
        span(ceil_div(width, step)),
        row(in_place ? a.x_stride[2] : std::min(step, width) * span),
        plane(in_place ? a.x_stride[1] : height * row),
        sample(in_place ? a.x_stride[0] : a.in_channels * plane),
        room(in_place ? 0 : a.batch * sample),
        data(in_place ? a.x : room),
        end(data + (a.batch - 1) * sample + (a.in_channels - 1) * plane + (height - 1) * row +
            (in_place ? width : row)) {
    if (!in_place) copy(a);
  }

  int64_t at(int64_t y, int64_t x) const { return y * row + x % step * span + x / step; }

  void copy(const ConvArgs& a) {
    const int64_t planes = a.batch * a.in_channels;
    const bool last = a.x_stride[1] == 1 && a.in_channels > 1;  // channels last
    parallel_for(planes, ceil_div(kConvGrain, plane), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (row > a.width || height > a.height) std::memset(room + i * plane, 0, plane * sizeof(float));
        if (!last) fill(a, i / a.in_channels, i % a.in_channels, 1, 0, a.height);
      }
    });
    if (last)
      parallel_for(a.batch * a.height, ceil_div(kConvGrain, row * a.in_channels), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) fill(a, i / a.height, 0, a.in_channels, i % a.height, i % a.height + 1);
      });
  }

  // Rows y0..y1 of some channels of a sample.
  void fill(const ConvArgs& a, int64_t b, int64_t channel, int64_t channels, int64_t y0, int64_t y1) {
    for (int64_t x = 0; x < std::min(step, a.width); ++x) {
      const int64_t count = ceil_div(a.width - x, step), gap = step * a.x_stride[3];
      const float* in = a.x + b * a.x_stride[0] + channel * a.x_stride[1] + y0 * a.x_stride[2] + x * a.x_stride[3];
      float* to = room + b * sample + channel * plane + at(y0 + a.padding[0], x + a.padding[1]);
      for (int64_t y = y0; y < y1; ++y, in += a.x_stride[2], to += row)
        if (channels > 1)
          kernels().transpose(in, gap, count, channels, to, plane);
        else
          kernels().every(in, gap, count, to);
    }
  }

  // Where the weights of a row meet the input, from the first pixel on, in their order.
  std::vector<int64_t> taps(const ConvArgs& a) const {
    std::vector<int64_t> found;
    const int64_t channels = a.in_channels / a.groups, area = a.kernel[0] * a.kernel[1];
    for (int64_t k = 0; k < channels * area; ++k) {
      const int64_t c = a.floats ? k / area : k % channels, tap = a.floats ? k % area : k / channels;
      found.push_back(c * plane + at(tap / a.kernel[1] * a.dilation[0], tap % a.kernel[1] * a.dilation[1]));
    }
    return found;
  }
};

// Channels-last pixels that are patches themselves, and need but be turned.
bool pixels_are_patches(const ConvArgs& a) {
  return a.x_stride[1] == 1 && a.in_channels > 1 && a.height == 1 && a.out_width == a.width &&
         a.weight.k == a.in_channels / a.groups;
}

// panel[k][lane] = the input that weight k of a channel group meets at each of up to 32 pixels. May write
// up to kWidest floats past the panel.
void fill_panel(const ConvArgs& a, const Image* image, const std::vector<int64_t>& taps, int64_t group, int64_t p0,
                int64_t p1, float* panel) {
  const int64_t channels = a.in_channels / a.groups;
  Run runs[kPanel];
  const int64_t count = split(a, p0, p1, runs);
  if (p1 - p0 < kPanel) std::memset(panel, 0, a.weight.kp * kPanel * sizeof(float));
  if (!image) {
    for (int64_t i = 0; i < count; ++i)
      kernels().transpose(a.x + runs[i].batch * a.x_stride[0] + group * channels + runs[i].x * a.x_stride[3],
                          a.x_stride[3], runs[i].length, channels, panel + runs[i].lane, kPanel);
  } else {
    Piece pieces[kPanel];
    for (int64_t i = 0; i < count; ++i)
      pieces[i] = {runs[i].lane, runs[i].length,
                   runs[i].batch * image->sample + runs[i].y * a.stride[0] * image->row + runs[i].x};
    kernels().gather(image->data + group * channels * image->plane, image->end, taps.data(), a.weight.k, pieces, count,
                     panel);
  }
  std::memset(panel + a.weight.k * kPanel, 0, (a.weight.kp - a.weight.k) * kPanel * sizeof(float));
}

// sums[row][pixel] of weight rows n0..n1 at the pixels p0..p1 -> y, with the bias.
void store_planes(const ConvArgs& a, int64_t n0, int64_t n1, int64_t p0, int64_t p1, const float* sums, int64_t ld) {
  const int64_t plane = a.out_height * a.out_width;
  for (int64_t n = n0; n < n1; ++n, sums += ld) {
    const Target target(a, n);
    const float bias = target.bias(a);
    for (int64_t p = p0, stop; p < p1; p = stop) {  // sample by sample
      stop = std::min(p1, (p / plane + 1) * plane);
      float* y = target.in(a) + p / plane * a.y_stride[0] + p % plane;
      for (int64_t i = 0; i < stop - p; ++i) y[i] = sums[p - p0 + i] + bias;
    }
  }
}

// The same where channels run fastest: the sums are turned.
void store_last(const ConvArgs& a, int64_t n0, int64_t n1, int64_t p0, int64_t pixels, float* sums, int64_t ld) {
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

void conv_dense(const ConvArgs& args) {
  ConvArgs a = args;
  const Packed& w = a.weight;
  if (a.kernel[0] == 1 && a.kernel[1] == 1 && a.padding[0] == 0 && a.padding[1] == 0) {  // only pixels that are used
    a.x_stride[2] *= a.stride[0], a.x_stride[3] *= a.stride[1], a.stride[0] = a.stride[1] = 1;
    a.height = a.out_height, a.width = a.out_width;
    if (a.x_stride[2] == a.width * a.x_stride[3]) {  // a plane is one row
      a.width = a.out_width = a.height * a.width;
      a.height = a.out_height = 1;
    }
  }
  const std::optional<Image> image =
      pixels_are_patches(a) ? std::optional<Image>() : std::optional<Image>(std::in_place, a);
  const std::vector<int64_t> taps = image ? image->taps(a) : std::vector<int64_t>();
  const int64_t rows = w.n / a.groups, pixels = a.pixels();
  const int64_t panels = std::min(ceil_div(pixels, kPanel), std::max(kMinPanels, kTileFloats / (kPanel * w.kp)));
  const int64_t tiles = ceil_div(pixels, panels * kPanel) * a.groups;
  // With fewer tiles than threads the output channels are shared out too, and patches gathered twice.
  const int64_t parts = std::min(ceil_div(rows, kRows), std::max<int64_t>(1, ceil_div(2 * thread_count(), tiles)));
  const int64_t part_rows = ceil_div(rows, parts), block_rows = ceil_div(part_rows, ceil_div(part_rows, kRows));
  parallel_for(tiles * parts, 1, [&](int64_t begin, int64_t end) {
    Buffer<float> patches(panels * kPanel * w.kp + kWidest), room(a.floats ? 0 : kRows * kDepth),
        sums(kRows * panels * kPanel), grid(2 * w.groups);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = i / parts / a.groups, group = i / parts % a.groups, part = i % parts;
      const int64_t p0 = tile * panels * kPanel, p1 = std::min(pixels, p0 + panels * kPanel);
      const int64_t used = ceil_div(p1 - p0, kPanel), ld = used * kPanel, first = group * rows;
      if (part == 0 || i == begin)
        for (int64_t p = 0; p < used; ++p)
          fill_panel(a, image ? &*image : nullptr, taps, group, p0 + p * kPanel, std::min(p1, p0 + (p + 1) * kPanel),
                     patches + p * kPanel * w.kp);
      const int64_t stop = first + std::min(rows, (part + 1) * part_rows);
      for (int64_t n0 = first + part * part_rows; n0 < stop; n0 += block_rows) {
        const int64_t n1 = std::min(stop, n0 + block_rows);
        for (int64_t k0 = 0; k0 < w.kp; k0 += kDepth) {
          const int64_t k1 = std::min(w.kp, k0 + kDepth);
          const Block block = fp32_block(w, a.floats, n0, n1, k0, k1, room, kDepth, grid);
          for (int64_t p = 0; p < used; ++p)
            kernels().gemm(block.data, block.ld, n1 - n0, patches + (p * w.kp + k0) * kPanel, p1 - p0 - p * kPanel,
                           k1 - k0, sums + p * kPanel, ld, k0 == 0);
        }
        if (a.y_stride[1] == 1)
          store_last(a, n0, n1, p0, p1 - p0, sums, ld);
        else
          store_planes(a, n0, n1, p0, p1, sums, ld);
      }
    }
  });
}

}  // namespace mpq
