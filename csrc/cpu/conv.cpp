// conv2d as an implicit GEMM: patches are gathered tile by tile into the layout that the kernels take,
// never as a whole. One input channel a group (depthwise) is convolved directly.
#include <algorithm>
#include <cstring>

#include "block.h"
#include "buffer.h"
#include "drivers.h"
#include "parallel.h"

namespace mpq {
namespace {

constexpr int64_t kDepth = 512;              // k's of a dequantized block
constexpr int64_t kRows = 48;                // its output channels
constexpr int64_t kTileFloats = 128 * 1024;  // patches of a tile: 512 KiB, a level 2 cache's worth
constexpr int64_t kMinPanels = 4;            // but at least 128 pixels share each decoded weight
constexpr int64_t kRows8 = 32;               // pixels of an 8-bit tile
constexpr int64_t kSlack = 8;
constexpr int64_t kGrain = 1 << 15;  // elements below which a second thread costs more than it saves

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
    parallel_for(planes, ceil_div(kGrain, plane()), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (row > a.width || height > a.height) std::memset(data + i * plane(), 0, plane() * sizeof(float));
        if (!last) fill(a, i / a.in_channels, i % a.in_channels, 1, 0, a.height);
      }
    });
    if (last)
      parallel_for(a.batch * a.height, ceil_div(kGrain, row * a.in_channels), [&](int64_t begin, int64_t end) {
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

// A stretch of output pixels in one output row, at `lane` of its tile.
struct Run {
  int64_t lane, length, batch, y, x;
};

// Output pixels p0..p1, numbered over (batch, row, column), as runs; returns how many.
int64_t split(const ConvArgs& a, int64_t p0, int64_t p1, Run* runs) {
  int64_t count = 0;
  for (int64_t p = p0; p < p1;) {
    const int64_t x = p % a.out_width, row = p / a.out_width, length = std::min(p1 - p, a.out_width - x);
    runs[count++] = {p - p0, length, row / a.out_height, row % a.out_height, x};
    p += length;
  }
  return count;
}

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

// sums[j] of weight row n at the pixels of `runs` -> y, with the bias.
void scatter(const ConvArgs& a, int64_t n, const Run* runs, int64_t count, const float* sums, int64_t step) {
  const Target target(a, n);
  const float bias = target.bias(a);
  for (int64_t i = 0; i < count; ++i) {
    const Run& r = runs[i];
    float* y = target.in(a) + r.batch * a.y_stride[0] + r.y * a.y_stride[2] + r.x * a.y_stride[3];
    for (int64_t j = 0; j < r.length; ++j) y[j * a.y_stride[3]] = sums[(r.lane + j) * step] + bias;
  }
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

void dense(const ConvArgs& a) {
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

void depthwise(const ConvArgs& a) {
  const Packed& w = a.weight;
  const Image image(a);
  const int64_t multiplier = w.n / a.groups;
  parallel_for(a.batch * w.n, ceil_div(kGrain, a.out_height * a.out_width * w.k), [&](int64_t begin, int64_t end) {
    Buffer<float> room(w.kp), grid(2 * w.groups), line(a.out_width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / w.n, n = i % w.n;
      const float* plane = image.data + (b * a.in_channels + n / multiplier) * image.plane();
      const float* taps = fp32_block(w, a.floats, n, n + 1, 0, w.kp, room, w.kp, grid).data;
      for (int64_t y = 0; y < a.out_height; ++y) {
        std::memset(line, 0, a.out_width * sizeof(float));
        for (int64_t ky = 0; ky < a.kernel[0]; ++ky)
          for (int64_t kx = 0; kx < a.kernel[1]; ++kx)
            kernels().axpy(taps[ky * a.kernel[1] + kx],
                           plane + image.at(y * a.stride[0] + ky * a.dilation[0], kx * a.dilation[1]), line,
                           a.out_width);
        const Run run{0, a.out_width, b, y, 0};
        scatter(a, n, &run, 1, line, 1);
      }
    }
  });
}

// 8-bit activations: the input is rounded once, channels last, so that a patch is a few copies.
void quantized(const ConvArgs& a) {
  const Packed& w = a.weight;
  const int64_t rows = w.n / a.groups, channels = a.in_channels / a.groups, pixels = a.pixels();
  const int64_t sample = a.in_channels * a.height * a.width, held = padded(sample);
  Buffer<int8_t> q(a.batch * held);
  Buffer<float> scales(a.batch);
  parallel_for(a.batch, 1, [&](int64_t begin, int64_t end) {
    Buffer<float> image(held);
    std::memset(image + sample, 0, (held - sample) * sizeof(float));
    for (int64_t b = begin; b < end; ++b) {
      float* out = image;
      for (int64_t y = 0; y < a.height; ++y)
        for (int64_t x = 0; x < a.width; ++x)
          for (int64_t c = 0; c < a.in_channels; ++c)
            *out++ = a.x[b * a.x_stride[0] + c * a.x_stride[1] + y * a.x_stride[2] + x * a.x_stride[3]];
      kernels().quantize_act(image, held, held, a.act_scale, q + b * held, scales + b);
    }
  });
  const Spans spans(w);
  const int64_t tiles = ceil_div(pixels, kRows8);
  parallel_for(tiles * a.groups, 1, [&](int64_t begin, int64_t end) {
    Buffer<int8_t> patch(kRows8 * w.kp);
    Buffer<uint8_t> codes(kPanel * w.kp);
    Buffer<float> a_scale(kRows8 * w.groups), a_sum(kRows8 * spans.count), sums(kRows8 * kPanel), tile(kPanel * kRows8),
        w_scale(kPanel * w.groups), w_zero(kPanel * w.groups), scratch(kPanel * w.groups);
    Run runs[kRows8];
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
                std::memcpy(out, q + run.batch * held + (y * a.width + x) * a.in_channels + group * channels, channels);
            }
          std::memset(out, 0, w.kp - w.k);
          kernels().arrange_a8(w, patch + m * w.kp, a_sum + m * spans.count);
          for (int64_t g = 0; g < w.groups; ++g) a_scale[m * w.groups + g] = scales[run.batch];
        }
      for (int64_t n0 = group * rows; n0 < (group + 1) * rows; n0 += kPanel) {
        const int64_t n1 = std::min((group + 1) * rows, n0 + kPanel);
        kernels().grid_a8(w, n0, n1, w_scale, w_zero, scratch);
        kernels().panel_a8(w, n0, n1, 0, w.kp, codes);
        kernels().gemm_a8(w, {codes, w_scale, w_zero}, {patch, w.kp, a_scale, a_sum}, p1 - p0, 0, spans.count, sums,
                          true);
        kernels().transpose(sums, kPanel, p1 - p0, n1 - n0, tile, kRows8);
        for (int64_t n = n0; n < n1; ++n) scatter(a, n, runs, count, tile + (n - n0) * kRows8, 1);
      }
    }
  });
}

}  // namespace

void conv2d(const ConvArgs& a) {
  if (a.pixels() == 0 || a.weight.n == 0) return;
  if (a.act8) return quantized(a);
  if (a.groups > 1 && a.in_channels == a.groups) return depthwise(a);
  dense(a);
}

void probe_conv2d(const ConvArgs& a) {
  ConvArgs all = a;
  all.weight.n = a.variants * a.weight.n;
  const int64_t group = a.weight.n / a.groups * a.weight.k;  // weights of one variant
  Buffer<float> stacked(a.groups > 1 ? all.weight.n * a.weight.k : 0);
  if (a.groups > 1) {  // [variant][group] -> [group][variant]: more rows for each patch
    for (int64_t g = 0; g < a.groups; ++g)
      for (int64_t v = 0; v < a.variants; ++v)
        std::memcpy(stacked + (g * a.variants + v) * group, a.floats + (v * a.groups + g) * group,
                    group * sizeof(float));
    all.floats = stacked;
  }
  conv2d(all);
}

}  // namespace mpq
