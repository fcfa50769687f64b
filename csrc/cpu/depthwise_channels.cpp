// Depthwise convolution with vectors along channels: in place, or over a copy of some rows that stays in the cache.
#include <algorithm>
#include <cstring>

#include "depthwise.h"
#include "parallel.h"

namespace mpq {
namespace {

constexpr int64_t kRowFloats = 96 * 1024;  // of copied rows: within a level 2 cache
constexpr int64_t kLanes = kWidest;        // channels side by side
constexpr int64_t kManyTaps = 25;
constexpr int64_t kNarrow = 16;  // results of a narrow row

int64_t padded_lanes(int64_t channels) { return ceil_div(channels, kLanes) * kLanes; }

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

// Images with channels side by side, floats or bytes: distances from row to row and from pixel to pixel.
struct Input {
  const float* floats;
  const int8_t* bytes;  // or null
  int64_t row, pixel;
};
struct Output {
  float* floats;
  int8_t* bytes;  // or null
  int64_t row, pixel;
};

// As `Kernels::spread`, of what is rounded already. Past the last channel nothing is written.
void spread_bytes(const int8_t* x, int64_t pixel, int64_t pixels, int64_t channels, char* out, int64_t block) {
  const int64_t whole = channels / kLanes * kLanes;
  for (int64_t i = 0; i < pixels; ++i, x += pixel, out += kLanes) {
    for (int64_t c = 0; c < whole; c += kLanes) std::memcpy(out + c / kLanes * block, x + c, kLanes);
    std::memcpy(out + whole / kLanes * block, x + whole, channels - whole);
  }
}

// Whether rows are copied first, to be rounded, or padded and brought together where taps come back to them often.
bool copies_rows(const ConvArgs& a) {
  const int64_t taps = a.weight.k, strides = a.stride[0] * a.stride[1];  // a pixel meets taps / strides of them
  return a.act8 || a.groups % kLanes || (taps >= 6 * strides && (taps >= kManyTaps || a.out_width <= kNarrow));
}

// Rows of results from rows of pixels, either in place or from a copy in the cache: padded along the row, in blocks
// [row][pixel][kLanes] of channels; bytes of rounded activations, else floats.
struct Lanes {
  const bool copied;
  const int64_t size, rows_in, row, block;  // size: bytes of an element of the copy
  Buffer<char> data;
  Buffer<float> scale, line, totals, ones, zeros;

  Lanes(const ConvArgs& a, bool copy, int64_t channels, int64_t out_rows)
      : copied(copy),
        size(a.act8 ? 1 : sizeof(float)),
        rows_in(std::min(a.height, (out_rows - 1) * a.stride[0] + (a.kernel[0] - 1) * a.dilation[0] + 1)),
        row((a.width + 2 * a.padding[1]) * kLanes),
        block(rows_in * row),
        data(copied ? ceil_div(channels, kLanes) * block * size : 0),
        scale(padded_lanes(channels)),
        line(a.out_width * kLanes),
        totals(a.out_width * kLanes),
        ones(a.weight.k * kLanes),
        zeros(kLanes) {
    if (copied) std::memset(data, 0, ceil_div(channels, kLanes) * block * size);
    std::memset(zeros, 0, kLanes * sizeof(float));
    std::fill_n(static_cast<float*>(ones), a.weight.k * kLanes, 1.0f);
  }

  // Results' rows first..last of one sample's `channels` from x -> y; `act` is the scale of 8-bit activations. False
  // where one that is rounded is not finite.
  bool filter(const ConvArgs& a, const Filters& f, const Blocks& b, int64_t channels, const Input& x, int64_t first,
              int64_t last, const float* act, const Output& y) {
    const int64_t reach = (a.kernel[0] - 1) * a.dilation[0] + 1, gap = a.dilation[0];
    const int64_t y0 = std::clamp<int64_t>(first * a.stride[0] - a.padding[0], 0, a.height);
    const int64_t y1 = std::clamp<int64_t>((last - 1) * a.stride[0] - a.padding[0] + reach, y0, a.height);
    bool finite = true;
    for (int64_t i = y0; copied && i < y1; ++i) {
      char* out = data + ((i - y0) * row + a.padding[1] * kLanes) * size;
      if (x.bytes)
        spread_bytes(x.bytes + i * x.row, x.pixel, a.width, channels, out, block);
      else
        finite &= kernels().spread(x.floats + i * x.row, x.pixel, a.width, channels, act, out, block);
    }
    for (int64_t i = 0; i < padded_lanes(channels); ++i) scale[i] = act ? b.scale[i] * *act : b.scale[i];
    FilterRow r;
    r.bytes = act != nullptr;
    r.x_row = gap * (copied ? row : x.row), r.x_pixel = copied ? kLanes : x.pixel, r.x_block = kLanes;
    r.width = a.width + (copied ? 2 * a.padding[1] : 0), r.padding = copied ? 0 : a.padding[1];
    r.columns = a.kernel[1], r.step = a.stride[1], r.dilation = a.dilation[1], r.w_block = b.taps * kLanes;
    r.out_width = a.out_width, r.channels = copied ? kLanes : channels;
    for (int64_t c = 0; c < channels; c += r.channels) {  // a copied block's rows stay in the level 1 cache
      const char* in = copied ? data + (c / kLanes * block - y0 * row) * size : reinterpret_cast<const char*>(x.floats);
      const int64_t used = std::min(r.channels, channels - c);
      const bool direct = used == r.channels && !y.bytes;
      for (int64_t i = first; i < last; ++i) {
        const int64_t top = i * a.stride[0] - a.padding[0];  // the row of the first taps, some of which lie outside
        const int64_t k0 = top < 0 ? std::min(a.kernel[0], ceil_div(-top, gap)) : 0;
        const int64_t k1 = top >= a.height ? k0 : std::clamp((a.height - 1 - top) / gap + 1, k0, a.kernel[0]);
        const int64_t at = i * y.row + c;
        r.x = in + (top + k0 * gap) * (copied ? row * size : x.row * int64_t(sizeof(float))), r.rows = k1 - k0;
        r.weights = b.weights + (c * b.taps + k0 * a.kernel[1] * kLanes);
        r.scale = f.centered ? scale + c : ones, r.bias = f.centered ? b.bias + c : zeros;
        r.range = f.centered ? range_of(a.activation) : Range{};
        r.y = direct ? y.floats + at : line, r.y_pixel = direct ? y.pixel : kLanes;
        kernels().filter_row(r);
        if (!f.centered) settle_row(a, b, r, c);
        if (!f.centered || bends(a.activation))
          kernels().activate(a.activation, r.y, a.out_width, r.channels, r.y_pixel);
        if (y.bytes)
          finite &= kernels().round_bytes(line, kLanes, a.out_width, used, a.y8_scale, y.bytes + at, y.pixel);
        for (int64_t p = 0; !direct && !y.bytes && p < a.out_width; ++p)
          std::memcpy(y.floats + at + p * y.pixel, line + p * kLanes, used * sizeof(float));
      }
    }
    return finite;
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

}  // namespace

void depthwise_channels(const ConvArgs& a, const Filters& f, const Scales8& scales, Spoiled& spoiled) {
  const Blocks blocks(f, 0, a.groups);
  const bool copy = copies_rows(a);
  const int64_t row = (a.width + 2 * a.padding[1]) * padded_lanes(a.groups), reach = (a.kernel[0] - 1) * a.dilation[0];
  const int64_t most = copy ? (kRowFloats / row - reach) / a.stride[0] : 1;
  const int64_t bands = ceil_div(a.out_height, std::clamp<int64_t>(most, 1, a.out_height));
  const int64_t rows = ceil_div(a.out_height, bands);
  parallel_for(a.batch * bands, ceil_div(kConvGrain, rows * row * f.count), [&](int64_t begin, int64_t end) {
    Lanes lanes(a, copy, a.groups, rows);
    Scales8::Cursor cursor;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / bands, first = i % bands * rows, last = std::min(a.out_height, first + rows);
      const int64_t in = b * a.x_stride[0], out = b * a.y_stride[0];
      const Input x{a.x8 ? nullptr : a.x + in, a.x8 ? a.x8 + in : nullptr, a.x_stride[2], a.x_stride[3]};
      const Output y{a.y8 ? nullptr : a.y + out, a.y8 ? a.y8 + out : nullptr, a.y_stride[2], a.y_stride[3]};
      if (!lanes.filter(a, f, blocks, a.groups, x, first, last, scales.of(b, cursor), y)) spoiled.mark(b);
    }
  });
}

// Small planes: those of kLanes channels are turned, so that the channels lie side by side.
void depthwise_turned(const ConvArgs& a, const Filters& f, const Scales8& scales, Spoiled& spoiled) {
  const int64_t blocks = ceil_div(a.groups, kLanes), in = a.height * a.width, out = a.out_height * a.out_width;
  parallel_for(blocks, ceil_div(kConvGrain, kLanes * a.batch * out * f.count), [&](int64_t begin, int64_t end) {
    Buffer<float> turned(in * kLanes), results(out * kLanes);
    Lanes lanes(a, true, kLanes, a.out_height);
    Scales8::Cursor cursor;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c0 = i * kLanes, channels = std::min(kLanes, a.groups - c0);
      const Blocks block(f, c0, channels);
      for (int64_t b = 0; b < a.batch; ++b) {
        kernels().transpose(a.x + b * a.x_stride[0] + c0 * a.x_stride[1], a.x_stride[1], channels, in, turned, kLanes);
        if (!lanes.filter(a, f, block, channels, {turned, nullptr, a.width * kLanes, kLanes}, 0, a.out_height,
                          scales.of(b, cursor), {results, nullptr, a.out_width * kLanes, kLanes}))
          spoiled.mark(b);
        kernels().transpose(results, kLanes, out, channels, a.y + b * a.y_stride[0] + c0 * a.y_stride[1],
                            a.y_stride[1]);
      }
    }
  });
}

}  // namespace mpq
