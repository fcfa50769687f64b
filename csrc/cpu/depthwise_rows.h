// Depthwise convolution by rows of results with channels along vectors: what its two ways, over floats and over quads
// of bytes, share.
#pragma once
#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>
#include <utility>

#include "depthwise.h"
#include "parallel.h"

namespace mpq {

constexpr int64_t kLanes = kWidest;         // channels side by side
constexpr int64_t kCopyBytes = 384 * 1024;  // of copied rows: within a level 2 cache
constexpr int64_t kLineFloats = 4 * 1024;   // of results on their way elsewhere: half a level 1 cache
constexpr int64_t lane_blocks(int64_t channels) { return ceil_div(channels, kLanes); }

// Images with channels side by side, floats or bytes, or planes of floats: distances from row to row, from pixel to
// pixel, and from channel to channel.
struct Input {
  const float* floats;
  const int8_t* bytes;  // or null
  int64_t row, pixel, plane;
};
struct Output {
  float* floats;
  int8_t* bytes;  // or null; without gaps
  int64_t row, pixel, plane;
  bool far;  // floats go past the caches: goes_far
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

// Where rows of results are computed: in place, or in lines of their own that are then rounded, turned into planes, or
// cut to the channels that there are.
class Landing {
 public:
  // `rounds`: who computes them can round them, too.
  Landing(const ConvArgs& a, bool rounds)
      : a_(a),
        rounds_(rounds && !bends(a.activation)),
        most_(lines(a)),
        width_(a.out_width * kLanes),
        lines_(most_ * width_) {}

  // Whether results go straight there, but for a block that has not all its channels.
  bool direct(const Output& y) const { return y.bytes ? rounds_ : y.plane == 1; }

  float* data = nullptr;
  int8_t* bytes = nullptr;  // in place of data, or null
  int64_t row = 0, pixel = 0;
  bool far = false;  // as in Output
  // Whether it helps to ask for the memory of results before there are any.
  bool asks() const { return direct_ && !bytes && !far; }

  // At `rows` rows from i on, `count` channels from c on, of which `used` are there; returns how many rows it will be.
  // Rows of the same channels follow each other, and land before the next ones are aimed at.
  int64_t aim(const Output& y, int64_t i, int64_t rows, int64_t c, int64_t count, int64_t used) {
    y_ = y, count_ = count, used_ = used;
    direct_ = used == count && direct(y);
    if (direct_ || held_ == 0) at_ = i * y.row + c * y.plane;
    if (!direct_ && held_ == 0) full_ = i - i % most_ + most_;
    bytes = direct_ && y.bytes ? y.bytes + at_ : nullptr;
    data = bytes ? nullptr : direct_ ? y.floats + at_ : lines_ + held_ * width_;
    pixel = direct_ ? y.pixel : kLanes;
    row = direct_ ? y.row : width_;
    far = direct_ && y.far;
    rows_ = direct_ ? rows : std::min(rows, full_ - i);
    ends_ = i + rows_ == full_;
    return rows_;
  }
  // The activation, unless the results have been kept within its range, and all that lines hold once they are full or
  // it is the end of these channels; false where one to be rounded is not finite.
  bool land(bool ranged, bool end) {
    if (bytes) return true;
    for (int64_t i = 0; (!ranged || bends(a_.activation)) && i < rows_; ++i)
      kernels().activate(a_.activation, data + i * row, a_.out_width, count_, pixel);
    if (direct_) return true;
    held_ += rows_;
    return !(end || ends_) || unload();
  }

 private:
  // Rows in lines of their own: so many that planes' lines of memory end with them, if there are as many.
  static int64_t lines(const ConvArgs& a) {
    const int64_t fit = kLineFloats / (a.out_width * kLanes), even = kLanes / std::gcd(kLanes, a.out_width);
    return std::clamp<int64_t>(fit < even ? fit : fit / even * even, 1, a.out_height);
  }
  bool unload() {
    const int64_t rows = std::exchange(held_, 0), pixels = rows * a_.out_width;
    if (y_.bytes) return kernels().round_bytes(lines_, kLanes, pixels, used_, a_.y8_scale, y_.bytes + at_, y_.pixel);
    if (y_.plane != 1) {
      kernels().transpose_out(lines_, kLanes, pixels, used_, y_.floats + at_, y_.plane, y_.far);
      return true;
    }
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t p = 0; p < a_.out_width; ++p)
        std::memcpy(y_.floats + at_ + i * y_.row + p * y_.pixel, lines_ + i * width_ + p * kLanes,
                    used_ * sizeof(float));
    return true;
  }

  const ConvArgs& a_;
  const bool rounds_;
  const int64_t most_, width_;  // rows in lines of their own, and floats of one
  Buffer<float> lines_;
  int64_t held_ = 0;  // rows in them
  int64_t full_ = 0;  // with which row they end
  Output y_{};
  int64_t at_ = 0, rows_ = 0, count_ = 0, used_ = 0;
  bool direct_ = false, ends_ = false;
};

// kLanes planes of pixels brought side by side.
class Turned {
 public:
  Turned(const ConvArgs& a, int64_t rows) : a_(a), pixels_(RowsIn::most(a, rows) * a.width * kLanes) {}

  // Bytes for each row.
  static int64_t row_bytes(const ConvArgs& a) { return a.width * kLanes * int64_t(sizeof(float)); }
  // What rows first..last of the results meet, of planes from x on.
  Input in(const float* x, int64_t channels, int64_t first, int64_t last) {
    const RowsIn in(a_, first, last);
    kernels().transpose(x + in.y0 * a_.width, a_.x_stride[1], channels, (in.y1 - in.y0) * a_.width, pixels_, kLanes);
    return {pixels_ - in.y0 * a_.width * kLanes, nullptr, a_.width * kLanes, kLanes, 1};
  }

 private:
  const ConvArgs& a_;
  Buffer<float> pixels_;
};

// In bands of rows, of all channels where they lie side by side, else of kLanes that are turned to do so.
template <class Way>
void by_rows(const ConvArgs& a, const Filters& f, bool turn, const Scales8& scales, Spoiled& spoiled) {
  const typename Way::Weights weights(a, f);
  const int64_t many = turn ? kLanes : a.groups, blocks = ceil_div(a.groups, many);
  const bool brought = turn && !Way::takes_planes(a);
  const int64_t copied = (Way::row_bytes(a, many) + (brought ? Turned::row_bytes(a) : 0)) * a.stride[0];
  // Rows of the input that bands share are worked on for each: a fourth of all, at the most.
  const int64_t shared = (a.kernel[0] - 1) * a.dilation[0] / a.stride[0];
  const int64_t most = copied ? std::max(kCopyBytes / copied - shared, 3 * shared) : 1;
  const int64_t bands = ceil_div(a.out_height, std::clamp<int64_t>(most, 1, a.out_height));
  // Not results that are to be changed once more.
  const bool far =
      !a.y8 && (turn || !bends(a.activation)) && goes_far(a.y, turn ? a.y_stride[1] : a.groups, a.pixels() * a.groups);
  const int64_t rows = ceil_div(a.out_height, bands), work = rows * a.width * many * f.count;
  parallel_for(a.batch * blocks * bands, ceil_div(kConvGrain, work), [&](int64_t begin, int64_t end) {
    Way way(a, many, rows, turn);
    std::optional<Turned> turned;
    if (brought) turned.emplace(a, rows);
    Scales8::Cursor cursor;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / (blocks * bands), c = i / bands % blocks * many, channels = std::min(many, a.groups - c);
      const int64_t first = i % bands * rows, last = std::min(a.out_height, first + rows);
      const int64_t from = b * a.x_stride[0] + c * a.x_stride[1], to = b * a.y_stride[0] + c * a.y_stride[1];
      const float* act = scales.of(b, cursor);
      Input x{a.x8 ? nullptr : a.x + from, a.x8 ? a.x8 + from : nullptr, a.x_stride[2], a.x_stride[3], a.x_stride[1]};
      if (turned) x = turned->in(x.floats, channels, first, last);
      const Output y{
          a.y8 ? nullptr : a.y + to, a.y8 ? a.y8 + to : nullptr, a.y_stride[2], a.y_stride[3], a.y_stride[1], far};
      if (!way.filter(f, weights, c, channels, x, first, last, act, y)) spoiled.mark(b);
    }
  });
}

}  // namespace mpq
