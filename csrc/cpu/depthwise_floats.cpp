// Depthwise convolution from floats with vectors along channels: any layer's, in place or over a copy of some rows that
// stays in the cache.
#include "depthwise_rows.h"

namespace mpq {
namespace {

constexpr int64_t kManyTaps = 25;
constexpr int64_t kNarrow = 16;      // results of a narrow row
constexpr int64_t kPixelsEarly = 8;  // as many as `filter_row` computes together

// Weights, scales and biases, kLanes channels at a time, as `filter_row` takes them.
struct FloatFilters {
  const int64_t taps, blocks;
  Buffer<float> weights, scale, bias, zero;  // weights [block][tap][kLanes]

  FloatFilters(const ConvArgs& a, const Filters& f)
      : taps(f.count),
        blocks(lane_blocks(a.groups)),
        weights(blocks * taps * kLanes),
        scale(blocks * kLanes),
        bias(blocks * kLanes),
        zero(blocks * kLanes) {
    for (Buffer<float>* b : {&scale, &bias, &zero}) std::memset(*b, 0, blocks * kLanes * sizeof(float));
    std::memset(weights, 0, blocks * taps * kLanes * sizeof(float));
    std::memcpy(scale, f.scale, a.groups * sizeof(float));
    std::memcpy(bias, f.bias, a.groups * sizeof(float));
    if (!f.centered) std::memcpy(zero, f.zero, a.groups * sizeof(float));
    for (int64_t c = 0; c < a.groups; c += kLanes)
      kernels().transpose(&f.taps[c * taps], taps, std::min(kLanes, a.groups - c), taps, weights + c * taps, kLanes);
  }
};

// Rows of results from rows of pixels, either in place or from a copy: rounded where activations are 8 bits, padded
// along the row, in blocks [row][pixel][kLanes] of channels.
struct FloatRows {
  using Weights = FloatFilters;
  static bool takes_planes(const ConvArgs&) { return false; }

  const ConvArgs& a;
  const bool copied;
  const int64_t row, block;
  Buffer<float> data, scale, totals, ones, zeros;
  Landing landing;

  // Whether rows are copied first, to be rounded, or padded and brought together where taps come back to them often.
  static bool copies(const ConvArgs& a) {
    const int64_t taps = a.weight.k, strides = a.stride[0] * a.stride[1];  // a pixel meets taps / strides of them
    return a.act8 || a.groups % kLanes || (taps >= 6 * strides && (taps >= kManyTaps || a.out_width <= kNarrow));
  }
  // Bytes of a copied row of so many channels, 0 if there is none.
  static int64_t row_bytes(const ConvArgs& a, int64_t channels) {
    return copies(a) ? (a.width + 2 * a.padding[1]) * lane_blocks(channels) * kLanes * int64_t(sizeof(float)) : 0;
  }

  // turned: x is a copy already, of a block of channels.
  FloatRows(const ConvArgs& args, int64_t channels, int64_t out_rows, bool turned)
      : a(args),
        copied(turned || copies(a)),
        row((a.width + 2 * a.padding[1]) * kLanes),
        block(RowsIn::most(a, out_rows) * row),
        data(copied ? lane_blocks(channels) * block : 0),
        scale(lane_blocks(channels) * kLanes),
        totals(a.out_width * kLanes),
        ones(a.weight.k * kLanes),
        zeros(kLanes),
        landing(a, false) {
    if (copied) std::memset(data, 0, lane_blocks(channels) * block * sizeof(float));
    std::memset(zeros, 0, kLanes * sizeof(float));
    std::fill_n(static_cast<float*>(ones), a.weight.k * kLanes, 1.0f);
  }

  // Results' rows first..last of one sample's `channels` from x -> y; `act` is the scale of 8-bit activations. False
  // where one that is rounded is not finite.
  bool filter(const Filters& f, const FloatFilters& w, int64_t c0, int64_t channels, const Input& x, int64_t first,
              int64_t last, const float* act, const Output& y) {
    const RowsIn in(a, first, last);
    bool finite = true;
    for (int64_t i = in.y0; copied && i < in.y1; ++i) {
      float* out = data + (i - in.y0) * row + a.padding[1] * kLanes;
      if (x.bytes)
        widen(x.bytes + i * x.row, x.pixel, channels, out);
      else
        finite &= kernels().spread(x.floats + i * x.row, x.pixel, a.width, channels, act, out, block);
    }
    for (int64_t i = 0; i < lane_blocks(channels) * kLanes; ++i)
      scale[i] = act ? w.scale[c0 + i] * *act : w.scale[c0 + i];
    FilterRow r;
    r.x_row = a.dilation[0] * (copied ? row : x.row), r.x_pixel = copied ? kLanes : x.pixel, r.x_block = kLanes;
    r.width = a.width + (copied ? 2 * a.padding[1] : 0), r.padding = copied ? 0 : a.padding[1];
    r.columns = a.kernel[1], r.step = a.stride[1], r.dilation = a.dilation[1], r.w_block = w.taps * kLanes;
    r.out_width = a.out_width, r.channels = copied ? kLanes : channels;
    for (int64_t c = 0; c < channels; c += r.channels) {  // a copied block's rows stay in the level 1 cache
      const float* pixels = copied ? data + (c / kLanes * block - in.y0 * row) : x.floats;
      for (int64_t i = first; i < last; ++i) {
        const TapRows taps(a, i);
        landing.aim(y, i, 1, c, r.channels, std::min(r.channels, channels - c));
        r.x = pixels + taps.y * (copied ? row : x.row), r.rows = taps.k1 - taps.k0;
        r.weights = w.weights + ((c0 + c) * w.taps + taps.k0 * a.kernel[1] * kLanes);
        r.scale = f.centered ? scale + c : ones, r.bias = f.centered ? w.bias + c0 + c : zeros;
        r.range = f.centered ? range_of(a.activation) : Range{};
        r.y = landing.data, r.y_pixel = landing.pixel, r.far = landing.far && f.centered;
        r.soon = landing.asks() ? kPixelsEarly * landing.pixel : 0;
        kernels().filter_row(r);
        if (!f.centered) settle_row(w, r, c0, c);
        finite &= landing.land(f.centered, i + 1 == last);
      }
    }
    return finite;
  }

 private:
  // As `Kernels::spread`, of what is rounded already. Past the last channel nothing is written.
  void widen(const int8_t* x, int64_t pixel, int64_t channels, float* out) const {
    for (int64_t c = 0; c < channels; c += kLanes, out += block)
      for (int64_t i = 0; i < a.width; ++i)
        if (const int8_t* from = x + i * pixel + c; c + kLanes <= channels)
          for (int64_t j = 0; j < kLanes; ++j) out[i * kLanes + j] = from[j];
        else
          for (int64_t j = 0; j < channels - c; ++j) out[i * kLanes + j] = from[j];
  }

  // The sums of code * q in r.y -> results, with the sums of q that the ones give.
  void settle_row(const FloatFilters& w, FilterRow r, int64_t c0, int64_t c) {
    float* sums = r.y;
    const int64_t pixel = r.y_pixel;
    r.weights = ones, r.y = totals, r.y_pixel = kLanes, r.soon = 0;
    kernels().filter_row(r);
    for (int64_t p = 0; p < a.out_width; ++p)
      for (int64_t j = 0; j < kLanes; ++j)
        settle(sums + p * pixel + j, totals + p * kLanes + j, 1, scale[c + j], w.zero[c0 + c + j], w.bias[c0 + c + j]);
  }
};

}  // namespace

void depthwise_floats(const ConvArgs& a, const Filters& f, bool turn, const Scales8& scales, Spoiled& spoiled) {
  by_rows<FloatRows>(a, f, turn, scales, spoiled);
}

}  // namespace mpq
