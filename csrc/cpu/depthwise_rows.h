// Depthwise convolution by rows of results with channels along vectors: what its two ways, over floats and over quads
// of bytes, share.
#pragma once
#include <algorithm>
#include <cstring>
#include <optional>

#include "depthwise.h"
#include "parallel.h"

namespace mpq {

constexpr int64_t kLanes = kWidest;         // channels side by side
constexpr int64_t kCopyBytes = 384 * 1024;  // of copied rows: within a level 2 cache
constexpr int64_t kLineFloats = 4 * 1024;   // of results on their way elsewhere: half a level 1 cache
constexpr int64_t lane_blocks(int64_t channels) { return ceil_div(channels, kLanes); }

// Images with channels side by side, floats or bytes, or planes of floats for who takes them: distances from row to row
// and from pixel to pixel.
struct Input {
  const float* floats;
  const int8_t* bytes;  // or null
  int64_t row, pixel;
  int64_t plane = 1;  // from channel to channel of floats
};
struct Output {
  float* floats;
  int8_t* bytes;  // or null; without gaps
  int64_t row, pixel;
  bool far = false;  // floats go past the caches: goes_far
};

// Rows of the input, y0..y1, that rows first..last of the results meet.
struct RowsIn {
  int64_t y0, y1;

  RowsIn(const ConvArgs& a, int64_t first, int64_t last) {
    const int64_t reach = (a.kernel[0] - 1) * a.dilation[0] + 1;
    y0 = std::clamp<int64_t>(first * a.stride[0] - a.padding[0], 0, a.height);
    y1 = std::clamp<int64_t>((last - 1) * a.stride[0] - a.padding[0] + reach, y0, a.height);
  }
  // Of so many rows of results, at the most.
  static int64_t most(const ConvArgs& a, int64_t rows) {
    return std::min(a.height, (rows - 1) * a.stride[0] + (a.kernel[0] - 1) * a.dilation[0] + 1);
  }
};

// Rows of taps, k0..k1, that meet the input at row i of the results; k0 meets row y of it.
struct TapRows {
  int64_t k0, k1, y;

  TapRows(const ConvArgs& a, int64_t i) {
    const int64_t top = i * a.stride[0] - a.padding[0], gap = a.dilation[0];
    k0 = top < 0 ? std::min(a.kernel[0], ceil_div(-top, gap)) : 0;
    k1 = top >= a.height ? k0 : std::clamp((a.height - 1 - top) / gap + 1, k0, a.kernel[0]);
    y = top + k0 * gap;
  }
};

// Where rows of results are computed: in place, or in lines of their own that are then rounded, or cut to the channels
// that there are.
class Landing {
 public:
  // `rounds`: who computes them can round them, too.
  Landing(const ConvArgs& a, bool rounds)
      : a_(a),
        rounds_(rounds && !bends(a.activation)),
        most_(std::clamp<int64_t>(kLineFloats / (a.out_width * kLanes), 1, a.out_height)),
        lines_(most_ * a.out_width * kLanes) {}

  // Whether results go straight there, but for a block that has not all its channels.
  bool direct(const Output& y) const { return !y.bytes || rounds_; }

  float* data = nullptr;
  int8_t* bytes = nullptr;  // in place of data, or null
  int64_t row = 0, pixel = 0;
  bool far = false;  // data is

  // `rows` rows from i on, `count` channels from c on, of which `used` are there. Returns how many rows it will be.
  int64_t aim(const Output& y, int64_t i, int64_t rows, int64_t c, int64_t count, int64_t used) {
    y_ = y, at_ = i * y.row + c, count_ = count, used_ = used;
    direct_ = used == count && direct(y);
    bytes = direct_ && y.bytes ? y.bytes + at_ : nullptr;
    data = bytes ? nullptr : direct_ ? y.floats + at_ : lines_;
    pixel = direct_ ? y.pixel : kLanes;
    row = direct_ ? y.row : a_.out_width * kLanes;
    far = direct_ && y.far;
    return rows_ = direct_ ? rows : std::min(rows, most_);
  }
  // The activation, unless the results have been kept within its range; false where one to be rounded is not finite.
  bool land(bool ranged) {
    if (bytes) return true;
    for (int64_t i = 0; (!ranged || bends(a_.activation)) && i < rows_; ++i)
      kernels().activate(a_.activation, data + i * row, a_.out_width, count_, pixel);
    if (y_.bytes)
      return kernels().round_bytes(lines_, kLanes, rows_ * a_.out_width, used_, a_.y8_scale, y_.bytes + at_, y_.pixel);
    for (int64_t i = 0; !direct_ && i < rows_; ++i)
      for (int64_t p = 0; p < a_.out_width; ++p)
        std::memcpy(y_.floats + at_ + i * y_.row + p * y_.pixel, lines_ + i * row + p * kLanes, used_ * sizeof(float));
    return true;
  }

 private:
  const ConvArgs& a_;
  const bool rounds_;
  const int64_t most_;  // rows in lines of their own
  Buffer<float> lines_;
  Output y_{};
  int64_t at_ = 0, rows_ = 0, count_ = 0, used_ = 0;
  bool direct_ = false;
};

// kLanes planes brought side by side, pixel after pixel, unless their pixels are taken as they lie, and results brought
// back.
class Turned {
 public:
  Turned(const ConvArgs& a, int64_t rows, bool pixels)
      : a_(a), pixels_(pixels ? RowsIn::most(a, rows) * a.width * kLanes : 0), results_(rows * a.out_width * kLanes) {}

  // Bytes for each row of results.
  static int64_t row_bytes(const ConvArgs& a, bool pixels) {
    return ((pixels ? a.stride[0] * a.width : 0) + a.out_width) * kLanes * int64_t(sizeof(float));
  }
  // What rows first..last of the results meet, of planes from x on.
  Input in(const float* x, int64_t channels, int64_t first, int64_t last) {
    if (!pixels_) return {x, nullptr, a_.width, 1, a_.x_stride[1]};  // as they lie
    const RowsIn in(a_, first, last);
    kernels().transpose(x + in.y0 * a_.width, a_.x_stride[1], channels, (in.y1 - in.y0) * a_.width, pixels_, kLanes);
    return {pixels_ - in.y0 * a_.width * kLanes, nullptr, a_.width * kLanes, kLanes};
  }
  // Where they go first, and from there into planes from y on.
  Output out(int64_t first) {
    return {results_ - first * a_.out_width * kLanes, nullptr, a_.out_width * kLanes, kLanes};
  }
  void put(float* y, int64_t channels, int64_t first, int64_t last) const {
    kernels().transpose(results_, kLanes, (last - first) * a_.out_width, channels, y + first * a_.out_width,
                        a_.y_stride[1]);
  }

 private:
  const ConvArgs& a_;
  Buffer<float> pixels_, results_;
};

// In bands of rows, of all channels where they lie side by side, else of kLanes that are turned to do so.
template <class Way>
void by_rows(const ConvArgs& a, const Filters& f, bool turn, const Scales8& scales, Spoiled& spoiled) {
  const typename Way::Weights weights(a, f);
  const int64_t many = turn ? kLanes : a.groups, blocks = ceil_div(a.groups, many);
  const bool planes = turn && Way::takes_planes(a);
  const int64_t copied = Way::row_bytes(a, many) * a.stride[0] + (turn ? Turned::row_bytes(a, !planes) : 0);
  // Rows of the input that bands share are worked on for each: a fourth of all, at the most.
  const int64_t shared = (a.kernel[0] - 1) * a.dilation[0] / a.stride[0];
  const int64_t most = copied ? std::max(kCopyBytes / copied - shared, 3 * shared) : 1;
  const int64_t bands = ceil_div(a.out_height, std::clamp<int64_t>(most, 1, a.out_height));
  // Results that are to be changed once more are not.
  const bool far = !turn && !a.y8 && !bends(a.activation) && goes_far(a.y, a.groups, a.pixels() * a.groups);
  const int64_t rows = ceil_div(a.out_height, bands), work = rows * a.width * many * f.count;
  parallel_for(a.batch * blocks * bands, ceil_div(kConvGrain, work), [&](int64_t begin, int64_t end) {
    Way way(a, many, rows, turn);
    std::optional<Turned> turned;
    if (turn) turned.emplace(a, rows, !planes);
    Scales8::Cursor cursor;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / (blocks * bands), c = i / bands % blocks * many, channels = std::min(many, a.groups - c);
      const int64_t first = i % bands * rows, last = std::min(a.out_height, first + rows);
      const int64_t from = b * a.x_stride[0] + c * a.x_stride[1], to = b * a.y_stride[0] + c * a.y_stride[1];
      const float* act = scales.of(b, cursor);
      bool finite;
      if (turn) {
        finite = way.filter(f, weights, c, channels, turned->in(a.x + from, channels, first, last), first, last, act,
                            turned->out(first));
        turned->put(a.y + to, channels, first, last);
      } else {
        const Input x{a.x8 ? nullptr : a.x + from, a.x8 ? a.x8 + from : nullptr, a.x_stride[2], a.x_stride[3]};
        const Output y{a.y8 ? nullptr : a.y + to, a.y8 ? a.y8 + to : nullptr, a.y_stride[2], a.y_stride[3], far};
        finite = way.filter(f, weights, c, channels, x, first, last, act, y);
      }
      if (!finite) spoiled.mark(b);
    }
  });
}

}  // namespace mpq
