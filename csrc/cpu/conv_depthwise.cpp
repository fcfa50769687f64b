// conv2d with one input channel a group. Vectors run along pixels, over a zero-padded band of one channel's plane that
// stays in the cache, or along channels, where these lie side by side or planes are small.
//
// 8-bit activations take the same way: with codes and activations as integers every fp32 sum is exact (`kExactTaps`).
#include <algorithm>
#include <cstring>
#include <vector>

#include "block.h"
#include "buffer.h"
#include "conv.h"
#include "parallel.h"

namespace mpq {
namespace {

constexpr int64_t kExactTaps = 512;        // taps * 255 * 127 < 2^24
constexpr int64_t kBandFloats = 8 * 1024;  // of a plane: 32 KiB, most of a level 1 cache
constexpr int64_t kRowFloats = 96 * 1024;  // of rows with channels side by side: within a level 2 cache
constexpr int64_t kLanes = kWidest;        // channels side by side
constexpr int64_t kManyTaps = 25;
constexpr int64_t kNarrow = 16;       // results of a narrow row
constexpr int64_t kSmallPlane = 256;  // planes of fewer pixels are turned

int64_t padded_lanes(int64_t channels) { return ceil_div(channels, kLanes) * kLanes; }

// Weight row n for the kernels: y = scale * sum + bias, with the sum over its `taps`.
struct Filters {
  const int64_t count;                    // taps of a row
  Buffer<float> taps, scale, bias, zero;  // taps [N][count]; zero: of the codes, where it is not in the taps
  bool centered = true;                   // the zero is in the taps

  explicit Filters(const ConvArgs& a)
      : count(a.weight.k), taps(a.weight.n * count), scale(a.weight.n), bias(a.weight.n), zero(a.weight.n) {
    const Packed& w = a.weight;
    for (int64_t n = 0; n < w.n; ++n) bias[n] = Target(a, n).bias(a);
    if (a.act8) load_grids(w, 0, w.n, scale, zero);
    // A zero of whole halves leaves integers of twice the size, and one sum serves.
    for (int64_t n = 0; a.act8 && n < w.n; ++n)
      centered &= zero[n] >= 0 && zero[n] <= 255 && 2 * zero[n] == int(2 * zero[n]);
    parallel_for(w.n, ceil_div(kConvGrain, w.kp), [&](int64_t begin, int64_t end) {
      Buffer<float> room(w.kp), grid(2 * w.groups);
      Buffer<uint8_t> codes(w.kp);
      for (int64_t n = begin; n < end; ++n) {
        float* row = taps + n * count;
        if (!a.act8) {
          scale[n] = 1;
          std::memcpy(row, fp32_block(w, a.floats, n, n + 1, 0, w.kp, room, w.kp, grid).data, count * sizeof(float));
          continue;
        }
        kernels().unpack(w.row(n), w.bits, codes, count);
        for (int64_t k = 0; k < count; ++k) row[k] = centered ? 2 * codes[k] - 2 * zero[n] : codes[k];
        if (centered) scale[n] /= 2;
      }
    });
  }
};

// sums of code * q and of q -> y.
void settle(float* y, const float* total, int64_t count, float scale, float zero, float bias) {
  for (int64_t i = 0; i < count; ++i) y[i] = float(double(scale) * (y[i] - double(zero) * total[i]) + bias);
}

// ---- pixels along vectors ---------------------------------------------------------------------------

// Some rows of one plane, padded with zeros and taken apart into phases: every stride-th row and column from each
// start. What a tap meets at neighbouring results is then contiguous, and every row of results follows the one before
// at the same distance, `span`: a tap is one offset.
struct Band {
  const int64_t out_rows, rows_in, width, steps[2], span, height;
  std::vector<int64_t> offsets;
  Buffer<float> data, line;

  Band(const ConvArgs& a, int64_t wanted)
      : out_rows(wanted),
        rows_in((wanted - 1) * a.stride[0] + (a.kernel[0] - 1) * a.dilation[0] + 1),
        width(a.width + 2 * a.padding[1]),
        steps{std::min(a.stride[0], rows_in), std::min(a.stride[1], width)},
        span(ceil_div(width, a.stride[1])),
        height(ceil_div(rows_in, a.stride[0])),
        data(size() + 2 * kWidest),
        line(a.width) {
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

  // Input rows that results from row y0 on meet; `scale` is that of 8-bit activations.
  void fill(const ConvArgs& a, const float* plane, int64_t y0, int64_t rows, const float* scale) {
    const int64_t top = y0 * a.stride[0] - a.padding[0];
    const int64_t used = (rows - 1) * a.stride[0] + (a.kernel[0] - 1) * a.dilation[0] + 1;
    for (int64_t v = 0; v < used; ++v) {
      const int64_t y = top + v;
      const bool outside = y < 0 || y >= a.height;
      const float* in = plane + y * a.x_stride[2];
      int64_t gap = a.x_stride[3];
      if (scale && !outside) {
        if (gap != 1) kernels().every(in, gap, a.width, line);
        kernels().round_act(gap == 1 ? in : line, a.width, *scale, line);
        in = line, gap = 1;
      }
      for (int64_t x = 0; x < std::min(a.stride[1], a.width); ++x) {
        const int64_t count = ceil_div(a.width - x, a.stride[1]);
        float* out = data + row_at(a, v) + column_at(a, x + a.padding[1]);
        if (outside)
          std::memset(out, 0, count * sizeof(float));
        else
          kernels().every(in + x * gap, gap * a.stride[1], count, out);
      }
    }
  }
};

void by_planes(const ConvArgs& a, const Filters& f, const float* scales) {
  const Packed& w = a.weight;
  const int64_t multiplier = w.n / a.groups, row_floats = a.stride[0] * (a.width + 2 * a.padding[1]);
  const int64_t wanted =
      std::clamp<int64_t>(kBandFloats / row_floats, std::min<int64_t>(a.out_height, a.kernel[0]), a.out_height);
  const int64_t bands = ceil_div(a.out_height, wanted);
  parallel_for(
      a.batch * a.groups, ceil_div(kConvGrain, a.out_height * a.out_width * w.k), [&](int64_t begin, int64_t end) {
        Band band(a, ceil_div(a.out_height, bands));
        const int64_t room = ceil_div(band.out_rows * band.span, kWidest) * kWidest;
        Buffer<float> sums(room), totals(f.centered ? 0 : room), ones(f.count);
        std::fill_n(static_cast<float*>(ones), f.count, 1.0f);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = i / a.groups, channel = i % a.groups;
          const float *plane = a.x + b * a.x_stride[0] + channel * a.x_stride[1], *act = scales ? scales + b : nullptr;
          for (int64_t y0 = 0; y0 < a.out_height; y0 += band.out_rows) {
            const int64_t rows = std::min(band.out_rows, a.out_height - y0),
                          count = (rows - 1) * band.span + a.out_width;
            band.fill(a, plane, y0, rows, act);
            if (!f.centered) kernels().filter_plane(band.data, band.offsets.data(), ones, f.count, 1, 0, totals, count);
            for (int64_t n = channel * multiplier; n < (channel + 1) * multiplier; ++n) {
              const float* taps = f.taps + n * f.count;
              const float scale = act ? f.scale[n] * *act : 1;
              kernels().filter_plane(band.data, band.offsets.data(), taps, f.count, f.centered ? scale : 1,
                                     f.centered ? f.bias[n] : 0, sums, count);
              if (!f.centered) settle(sums, totals, count, scale, f.zero[n], f.bias[n]);
              float* y = Target(a, n).in(a) + b * a.y_stride[0] + y0 * a.y_stride[2];
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

// ---- channels along vectors -------------------------------------------------------------------------

// Weights, scales and biases of `count` channels from c0 on, kLanes at a time, as `filter_row` takes them.
struct Blocks {
  const int64_t taps, blocks;
  Buffer<float> weights, scale, bias, zero;  // weights [block][tap][kLanes]

  Blocks(const Filters& f, int64_t c0, int64_t count)
      : taps(f.count),
        blocks(ceil_div(count, kLanes)),
        weights(blocks * taps * kLanes),
        scale(blocks * kLanes),
        bias(blocks * kLanes),
        zero(blocks * kLanes) {
    for (Buffer<float>* b : {&scale, &bias, &zero}) std::memset(*b, 0, blocks * kLanes * sizeof(float));
    std::memset(weights, 0, blocks * taps * kLanes * sizeof(float));
    std::memcpy(scale, f.scale + c0, count * sizeof(float));
    std::memcpy(bias, f.bias + c0, count * sizeof(float));
    if (!f.centered) std::memcpy(zero, f.zero + c0, count * sizeof(float));
    for (int64_t c = 0; c < count; c += kLanes)
      kernels().transpose(f.taps + (c0 + c) * taps, taps, std::min(kLanes, count - c), taps, weights + c * taps,
                          kLanes);
  }
};

// Images with channels side by side: distances from row to row and from pixel to pixel.
struct Pixels {
  float* data;
  int64_t row, pixel;
};

// Whether rows are copied first, to be rounded, or padded and brought together where taps come back to them often.
bool copies_rows(const ConvArgs& a) {
  const int64_t taps = a.weight.k, strides = a.stride[0] * a.stride[1];  // a pixel meets taps / strides of them
  return a.act8 || a.groups % kLanes || (taps >= 6 * strides && (taps >= kManyTaps || a.out_width <= kNarrow));
}

// Rows of results from rows of pixels, either in place or from a copy in the cache: padded along the row, in blocks
// [row][pixel][kLanes] of channels.
struct Lanes {
  const bool copied;
  const int64_t rows_in, row, block;
  Buffer<float> data, scale, line, totals, ones, zeros;

  Lanes(const ConvArgs& a, bool copy, int64_t channels, int64_t out_rows)
      : copied(copy),
        rows_in(std::min(a.height, (out_rows - 1) * a.stride[0] + (a.kernel[0] - 1) * a.dilation[0] + 1)),
        row((a.width + 2 * a.padding[1]) * kLanes),
        block(rows_in * row),
        data(copied ? ceil_div(channels, kLanes) * block : 0),
        scale(padded_lanes(channels)),
        line(a.out_width * kLanes),
        totals(a.out_width * kLanes),
        ones(a.weight.k * kLanes),
        zeros(kLanes) {
    if (copied) std::memset(data, 0, ceil_div(channels, kLanes) * block * sizeof(float));
    std::memset(zeros, 0, kLanes * sizeof(float));
    std::fill_n(static_cast<float*>(ones), a.weight.k * kLanes, 1.0f);
  }

  // Results' rows first..last of one sample's `channels` from x -> y; `act` is the scale of 8-bit activations.
  void filter(const ConvArgs& a, const Filters& f, const Blocks& b, int64_t channels, const Pixels& x, int64_t first,
              int64_t last, const float* act, const Pixels& y) {
    const int64_t reach = (a.kernel[0] - 1) * a.dilation[0] + 1, gap = a.dilation[0];
    const int64_t y0 = std::clamp<int64_t>(first * a.stride[0] - a.padding[0], 0, a.height);
    const int64_t y1 = std::clamp<int64_t>((last - 1) * a.stride[0] - a.padding[0] + reach, y0, a.height);
    for (int64_t i = y0; copied && i < y1; ++i)
      kernels().spread(x.data + i * x.row, x.pixel, a.width, channels, act,
                       data + (i - y0) * row + a.padding[1] * kLanes, block);
    for (int64_t i = 0; i < padded_lanes(channels); ++i) scale[i] = act ? b.scale[i] * *act : b.scale[i];
    FilterRow r;
    r.x_row = gap * (copied ? row : x.row), r.x_pixel = copied ? kLanes : x.pixel, r.x_block = kLanes;
    r.width = a.width + (copied ? 2 * a.padding[1] : 0), r.padding = copied ? 0 : a.padding[1];
    r.columns = a.kernel[1], r.step = a.stride[1], r.dilation = a.dilation[1], r.w_block = b.taps * kLanes;
    r.out_width = a.out_width, r.channels = copied ? kLanes : channels;
    for (int64_t c = 0; c < channels; c += r.channels) {  // a copied block's rows stay in the level 1 cache
      const float* in = copied ? data + c / kLanes * block - y0 * row : x.data;
      const bool whole = c + r.channels <= channels;
      for (int64_t i = first; i < last; ++i) {
        const int64_t top = i * a.stride[0] - a.padding[0];  // the row of the first taps, some of which lie outside
        const int64_t k0 = top < 0 ? std::min(a.kernel[0], ceil_div(-top, gap)) : 0;
        const int64_t k1 = top >= a.height ? k0 : std::clamp((a.height - 1 - top) / gap + 1, k0, a.kernel[0]);
        float* out = y.data + i * y.row + c;
        r.x = in + (top + k0 * gap) * (copied ? row : x.row), r.rows = k1 - k0;
        r.weights = b.weights + (c * b.taps + k0 * a.kernel[1] * kLanes);
        r.scale = f.centered ? scale + c : ones, r.bias = f.centered ? b.bias + c : zeros;
        r.y = whole ? out : line, r.y_pixel = whole ? y.pixel : kLanes;
        kernels().filter_row(r);
        if (!f.centered) settle_row(a, b, r, c);
        for (int64_t p = 0; !whole && p < a.out_width; ++p)
          std::memcpy(out + p * y.pixel, line + p * kLanes, (channels - c) * sizeof(float));
      }
    }
  }

  // The sums of code * q in r.y -> results, with the sums of q that the ones give.
  void settle_row(const ConvArgs& a, const Blocks& b, FilterRow r, int64_t c) {
    float* sums = r.y;
    const int64_t pixel = r.y_pixel;
    r.weights = ones, r.y = totals, r.y_pixel = kLanes;
    kernels().filter_row(r);
    for (int64_t p = 0; p < a.out_width; ++p)
      for (int64_t j = 0; j < kLanes; ++j)
        settle(sums + p * pixel + j, totals + p * kLanes + j, 1, scale[c + j], b.zero[c + j], b.bias[c + j]);
  }
};

void by_channels(const ConvArgs& a, const Filters& f, const float* scales) {
  const Blocks blocks(f, 0, a.groups);
  const bool copy = copies_rows(a);
  const int64_t row = (a.width + 2 * a.padding[1]) * padded_lanes(a.groups), reach = (a.kernel[0] - 1) * a.dilation[0];
  const int64_t most = copy ? (kRowFloats / row - reach) / a.stride[0] : 1;
  const int64_t bands = ceil_div(a.out_height, std::clamp<int64_t>(most, 1, a.out_height));
  const int64_t rows = ceil_div(a.out_height, bands);
  parallel_for(a.batch * bands, ceil_div(kConvGrain, rows * row * f.count), [&](int64_t begin, int64_t end) {
    Lanes lanes(a, copy, a.groups, rows);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / bands, first = i % bands * rows, last = std::min(a.out_height, first + rows);
      const Pixels x{const_cast<float*>(a.x) + b * a.x_stride[0], a.x_stride[2], a.x_stride[3]};
      const Pixels y{a.y + b * a.y_stride[0], a.y_stride[2], a.y_stride[3]};
      lanes.filter(a, f, blocks, a.groups, x, first, last, scales ? scales + b : nullptr, y);
    }
  });
}

// Small planes: those of kLanes channels are turned, so that the channels lie side by side.
void by_turned_planes(const ConvArgs& a, const Filters& f, const float* scales) {
  const int64_t blocks = ceil_div(a.groups, kLanes), in = a.height * a.width, out = a.out_height * a.out_width;
  parallel_for(blocks, ceil_div(kConvGrain, kLanes * a.batch * out * f.count), [&](int64_t begin, int64_t end) {
    Buffer<float> turned(in * kLanes), results(out * kLanes);
    Lanes lanes(a, true, kLanes, a.out_height);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c0 = i * kLanes, channels = std::min(kLanes, a.groups - c0);
      const Blocks block(f, c0, channels);
      for (int64_t b = 0; b < a.batch; ++b) {
        kernels().transpose(a.x + b * a.x_stride[0] + c0 * a.x_stride[1], a.x_stride[1], channels, in, turned, kLanes);
        lanes.filter(a, f, block, channels, {turned, a.width * kLanes, kLanes}, 0, a.out_height,
                     scales ? scales + b : nullptr, {results, a.out_width * kLanes, kLanes});
        kernels().transpose(results, kLanes, out, channels, a.y + b * a.y_stride[0] + c0 * a.y_stride[1],
                            a.y_stride[1]);
      }
    }
  });
}

}  // namespace

bool takes_depthwise(const ConvArgs& a) {
  return a.groups > 1 && a.in_channels == a.groups && (!a.act8 || (a.weight.groups == 1 && a.weight.k <= kExactTaps));
}

void conv_depthwise(const ConvArgs& a) {
  const Filters filters(a);
  Buffer<float> scales(a.act8 ? a.batch : 0);
  if (a.act8) sample_scales(a, scales);
  const float* act = a.act8 ? static_cast<float*>(scales) : nullptr;
  const bool plain = a.weight.n == a.groups && a.groups >= kWidest;  // one result a channel, a vector of channels
  const bool whole = a.x_stride[3] == 1 && a.x_stride[2] == a.width && a.y_stride[3] == 1;  // planes in one piece
  if (plain && a.x_stride[1] == 1 && a.y_stride[1] == 1) return by_channels(a, filters, act);
  if (plain && whole && a.height * a.width < kSmallPlane) return by_turned_planes(a, filters, act);
  by_planes(a, filters, act);
}

}  // namespace mpq
