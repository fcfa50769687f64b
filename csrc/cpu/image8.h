// What conv_a8 multiplies: the input as bytes, with all that is known of its pixels.
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>

#include "buffer.h"
#include "conv.h"
#include "parallel.h"

namespace mpq {

constexpr int64_t kTurned = 64;  // pixels turned at once
constexpr int64_t kSlack = 64;   // bytes that may be read or written past what is needed
constexpr int64_t kTaken = 16;   // bytes that products take at once, so that channels are to be a multiple of it
constexpr int64_t kShort = 4;    // pixels of an output row that are too few for products of their own

enum class Patch {
  pixel,     // one pixel of the image, and all patches follow each other
  in_image,  // taps are read where they lie: patches of one output row are as far apart as their pixels
  copied
};

inline Patch kind_of_patch(const ConvArgs& a) {
  const bool apart = a.stride[0] > 1 || a.stride[1] > 1 || a.padding[0] > 0 || a.padding[1] > 0;
  if (a.groups == 1 && a.weight.k == a.in_channels && !apart) return Patch::pixel;
  return a.in_channels / a.groups % kTaken == 0 && a.out_width > kShort ? Patch::in_image : Patch::copied;
}

// Blocks of a pixel that are to have starts, or 0.
inline int64_t pixel_blocks(const ConvArgs& a, Patch patch) {
  const int64_t taps = a.kernel[0] * a.kernel[1];
  const int64_t all = started_blocks(a.weight, a.weight.n * taps / (a.stride[0] * a.stride[1]));
  const bool whole = a.groups == 1 && a.in_channels % kStartCodes == 0;
  return patch == Patch::pixel ? all : patch == Patch::in_image && whole ? all / taps : 0;
}

// The input as bytes with its zero padding in place, channels last: [batch][height][width][pixel], a pixel being its
// channels, and zeros up to the packed length of a row where a patch is just one pixel.
struct Image8 {
  const int64_t height, width, pixel;
  const bool ordered;          // as `order_a8` does, so that patches need not be
  const bool summed;           // where the sum of a patch is that of whole pixels
  Buffer<float> scales, sums;  // of samples; of pixels
  // Of a pixel's blocks: [block][batch][height][row]. In a row pixels whose patches follow each other, `stride` apart,
  // lie side by side.
  const int64_t blocks, stride, row, block_starts;
  Buffer<int32_t> starts;
  Buffer<int8_t> data;

  Image8(const ConvArgs& a, Patch patch)
      : height(a.height + 2 * a.padding[0]),
        width(a.width + 2 * a.padding[1]),
        pixel(patch == Patch::pixel ? a.weight.kp : a.in_channels),
        ordered(a.in_channels / a.groups % kTaken == 0 || patch == Patch::pixel),
        summed(ordered && a.groups == 1 && Spans(a.weight).count == 1),
        scales(a.batch),
        sums(summed ? a.batch * height * width : 0),
        blocks(pixel_blocks(a, patch)),
        stride(a.stride[1]),
        row(ceil_div(width, stride) * stride),
        block_starts(a.batch * height * row),
        starts(blocks * block_starts),
        data(padded(a.batch * sample()) + kSlack) {
    const int64_t bytes = a.batch * sample();
    std::memset(data + bytes, 0, padded(bytes) + kSlack - bytes);
    for (int64_t b = 0; b < a.batch; ++b) pad(a, b);
    const bool pads = width > a.width || height > a.height;
    if (blocks && pads) std::memset(starts, 0, blocks * block_starts * sizeof(int32_t));
    const Scales8 found(a);
    Spoiled spoiled(a.batch);
    const bool last = a.x8 || (a.x_stride[1] == 1 && a.in_channels > 1);
    // Pixels that lie in one piece: a whole plane, or a row.
    const int64_t piece = a.x_stride[2] == a.width * a.x_stride[3] ? a.height * a.width : a.width;
    const int64_t step = last ? a.width : kTurned, parts = ceil_div(piece, step), pieces = a.height * a.width / piece;
    parallel_for(a.batch * pieces * parts, ceil_div(kConvGrain, step * a.in_channels), [&](int64_t begin, int64_t end) {
      Buffer<float> turned(last ? 0 : kTurned * a.in_channels), line(last ? 0 : kTurned);
      Scales8::Cursor cursor;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / (pieces * parts), p0 = i / parts % pieces * piece + i % parts * step;
        const int64_t p1 = std::min(p0 + step, (i / parts % pieces + 1) * piece);
        const float scale = *found.of(b, cursor);
        if (i % (pieces * parts) == 0) scales[b] = scale;
        if (a.x8) {
          copy(a, b, p0, p1);
          continue;
        }
        const float* x = a.x + b * a.x_stride[0] + p0 / a.width * a.x_stride[2] + p0 % a.width * a.x_stride[3];
        if (!last && a.x_stride[3] == 1) {
          kernels().transpose(x, a.x_stride[1], a.in_channels, p1 - p0, turned, a.in_channels);
        } else if (!last) {
          for (int64_t c = 0; c < a.in_channels; ++c) {
            kernels().every(x + c * a.x_stride[1], a.x_stride[3], p1 - p0, line);
            for (int64_t p = 0; p < p1 - p0; ++p) turned[p * a.in_channels + c] = line[p];
          }
        }
        if (!round(a, b, p0, p1, last ? x : turned, last ? a.x_stride[3] : a.in_channels, scale)) spoiled.mark(b);
      }
    });
    for (int64_t b = 0; b < a.batch; ++b)
      if (spoiled.at(b)) scales[b] = std::numeric_limits<float>::quiet_NaN();
  }

  int64_t sample() const { return height * width * pixel; }
  int64_t index(int64_t b, int64_t y, int64_t x) const { return (b * height + y) * width + x; }
  int64_t at(int64_t b, int64_t y, int64_t x) const { return index(b, y, x) * pixel; }
  int64_t in_row(int64_t x) const { return x % stride * (row / stride) + x / stride; }
  int32_t* starts_at(int64_t p) const { return starts + p / width * row + in_row(p % width); }

  // Zeros around sample b: between its rows, and before and behind them.
  void pad(const ConvArgs& a, int64_t b) {
    const int64_t across = 2 * a.padding[1], around = a.padding[0] * width + a.padding[1];
    if (around == 0) return;
    int64_t to = index(b, 0, 0), count = around;  // in pixels
    for (int64_t y = 0; y <= a.height; ++y) {
      std::memset(data + to * pixel, 0, count * pixel);
      if (summed) std::memset(sums + to, 0, count * sizeof(float));
      to += count + a.width;
      count = y + 1 < a.height ? across : around;
    }
  }

  // Pixels p0..p1 of sample b, rounded already.
  void copy(const ConvArgs& a, int64_t b, int64_t p0, int64_t p1) {
    const int8_t* x = a.x8 + b * a.x_stride[0] + p0 * a.in_channels;
    for (int64_t p = p0, stop; p < p1; x += (stop - p) * a.in_channels, p = stop) {
      stop = std::min(p1, (p / a.width + 1) * a.width);
      const int64_t to = index(b, p / a.width + a.padding[0], p % a.width + a.padding[1]);
      if (ordered)
        order(a, x, a.in_channels, stop - p, to);
      else
        std::memcpy(data + to * pixel, x, (stop - p) * pixel);
    }
  }

  // So many pixels from x on, `gap` bytes apart, where they belong.
  void order(const ConvArgs& a, const int8_t* x, int64_t gap, int64_t pixels, int64_t to) {
    kernels().order_a8(a.weight.bits, x, gap, pixels, a.in_channels, data + to * pixel, pixel, pixel,
                       summed ? sums + to : nullptr);
    for (int64_t i = 0; blocks && i < std::min(stride, pixels); ++i)
      kernels().start_a8(data + (to + i) * pixel, stride * pixel, ceil_div(pixels - i, stride), pixel,
                         starts_at(to + i), block_starts);
  }

  // Pixels p0..p1 of sample b from x, `gap` floats apart. False where one is not finite.
  bool round(const ConvArgs& a, int64_t b, int64_t p0, int64_t p1, const float* x, int64_t gap, float scale) {
    bool finite = true;
    for (int64_t p = p0, stop; p < p1; x += (stop - p) * gap, p = stop) {
      stop = std::min(p1, (p / a.width + 1) * a.width);
      const int64_t to = index(b, p / a.width + a.padding[0], p % a.width + a.padding[1]);
      finite &= kernels().round_bytes(x, gap, stop - p, a.in_channels, scale, data + to * pixel, pixel);
      if (ordered) order(a, data + to * pixel, pixel, stop - p, to);
    }
    return finite;
  }
};

}  // namespace mpq
