// What conv_a8 multiplies: the input as bytes, and where patches of it lie.
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>

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

// Blocks of a pixel that are to have starts, or 0: those of patches must lie side by side, too, in every block.
inline int64_t pixel_blocks(const ConvArgs& a, Patch patch) {
  const int64_t taps = a.kernel[0] * a.kernel[1], all = started_blocks(a.weight, a.weight.n * taps);
  const bool whole = a.groups == 1 && a.stride[1] == 1 && a.in_channels % kStartCodes == 0;
  return patch == Patch::pixel ? all : patch == Patch::in_image && whole ? all / taps : 0;
}

// The input as bytes with its zero padding in place, channels last: [batch][height][width][pixel], a pixel being its
// channels, and zeros up to the packed length of a row where a patch is just one pixel.
struct Image8 {
  const int64_t height, width, pixel;
  const bool ordered;          // as `order_a8` does, so that patches need not be
  const bool summed;           // where the sum of a patch is that of whole pixels
  Buffer<float> scales, sums;  // of samples; of pixels
  const int64_t blocks;        // of a pixel, that have starts
  Buffer<int32_t> starts;      // [block][pixel]
  Buffer<int8_t> data;

  Image8(const ConvArgs& a, Patch patch)
      : height(a.height + 2 * a.padding[0]),
        width(a.width + 2 * a.padding[1]),
        pixel(patch == Patch::pixel ? a.weight.kp : a.in_channels),
        ordered(a.in_channels / a.groups % kTaken == 0 || patch == Patch::pixel),
        summed(ordered && a.groups == 1 && Spans(a.weight).count == 1),
        scales(a.batch),
        sums(summed ? pixels(a) : 0),
        blocks(pixel_blocks(a, patch)),
        starts(blocks * pixels(a)),
        data(padded(a.batch * sample()) + kSlack) {
    const int64_t bytes = a.batch * sample();
    std::memset(data + bytes, 0, padded(bytes) + kSlack - bytes);
    for (int64_t b = 0; b < a.batch; ++b) pad(a, b);
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

  int64_t pixels(const ConvArgs& a) const { return a.batch * height * width; }
  int64_t sample() const { return height * width * pixel; }
  int64_t index(int64_t b, int64_t y, int64_t x) const { return (b * height + y) * width + x; }
  int64_t at(int64_t b, int64_t y, int64_t x) const { return index(b, y, x) * pixel; }

  // Zeros around sample b: between its rows, and before and behind them.
  void pad(const ConvArgs& a, int64_t b) {
    const int64_t across = 2 * a.padding[1], around = a.padding[0] * width + a.padding[1];
    if (around == 0) return;
    int64_t to = index(b, 0, 0), count = around;  // in pixels
    for (int64_t y = 0; y <= a.height; ++y) {
      std::memset(data + to * pixel, 0, count * pixel);
      if (summed) std::memset(sums + to, 0, count * sizeof(float));
      for (int64_t i = 0; i < blocks; ++i) std::memset(starts + i * pixels(a) + to, 0, count * sizeof(int32_t));
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
    if (blocks) kernels().start_a8(data + to * pixel, pixel, pixels, pixel, starts + to, this->pixels(a));
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

// Sums of an image's bytes over so many channels that those over each span of a patch are made of them: exact.
struct Atoms {
  const int64_t size, row;  // channels of one; atoms of a pixel
  Buffer<float> found;
  const float* sums;  // [pixel][row]

  Atoms(const ConvArgs& a, const Image8& image)
      : size(size_for(a)),
        row(a.in_channels / size),
        found(image.summed ? 0 : a.batch * image.height * image.width * row),
        sums(image.summed ? image.sums : found) {
    if (image.summed) return;
    const int64_t pixels = a.batch * image.height * image.width;
    parallel_for(pixels, ceil_div(kConvGrain, a.in_channels), [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < row; ++i)
        kernels().sum_a8(image.data + begin * image.pixel + i * size, image.pixel, end - begin, size,
                         found + begin * row + i, row);
    });
  }

  static int64_t size_for(const ConvArgs& a) {
    const Spans spans(a.weight);
    const int64_t channels = a.in_channels / a.groups;
    return spans.count == 1 ? channels : std::gcd(std::gcd(channels, spans.group), spans.length);
  }
};

// Rows of 8-bit patches for the pixels p0..p1 and one channel group, with their scales and sums.
struct Patches {
  const Spans spans;
  const Patch kind;
  const bool joined;                        // taps that lie side by side make one piece
  const int64_t most, channels, piece, ld;  // most: patches at a time
  const int64_t blocks;                     // of a patch, that have starts
  Buffer<int64_t> jumps, start_at;
  Buffer<int8_t> room;
  Buffer<float> scales, sums, line;
  Buffer<int32_t> starts;  // of patches that are copied

  // So many at a time, each of which meets so many rows of the weight.
  Patches(const ConvArgs& a, const Image8& image, Patch patch, int64_t pixels, int64_t meetings)
      : spans(a.weight),
        kind(patch),
        joined(a.groups == 1 && a.dilation[1] == 1),
        most(pixels),
        channels(a.in_channels / a.groups),
        piece(joined ? a.kernel[1] * channels : channels),
        ld(patch == Patch::pixel      ? image.pixel
           : patch == Patch::in_image ? a.stride[1] * image.pixel
                                      : a.weight.kp + kBlock),
        blocks(image.blocks             ? ceil_div(a.weight.kp, kStartCodes)
               : patch == Patch::copied ? started_blocks(a.weight, meetings)
                                        : 0),
        jumps(a.kernel[0] * a.kernel[1]),
        start_at(blocks),
        room(patch == Patch::copied ? pixels * ld + kSlack : 0),
        scales(pixels * a.weight.groups),
        sums(pixels * spans.count),
        line(pixels),
        starts(image.blocks ? 0 : blocks * pixels) {
    const int64_t down = a.dilation[0] * image.width * image.pixel, right = a.dilation[1] * image.pixel;
    const int64_t across = joined ? 1 : a.kernel[1];  // pieces of a row of taps
    for (int64_t i = 0; i < a.kernel[0] * across; ++i)
      jumps[i] = ((i + 1) % across ? right : down - (across - 1) * right) - piece;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t k = i * kStartCodes, tap = patch == Patch::in_image ? k / channels : 0;
      const int64_t y = tap / a.kernel[1] * a.dilation[0], x = tap % a.kernel[1] * a.dilation[1];
      start_at[i] = image.blocks ? i % image.blocks * image.pixels(a) + y * image.width + x : i * pixels;
    }
  }

  void gather(const ConvArgs& a, const Image8& image, const Atoms* atoms, int64_t group, int64_t p0, int64_t p1,
              const Run* runs, int64_t count) {
    const Packed& w = a.weight;
    for (int64_t i = 0; i < count; ++i) {
      std::fill_n(scales + runs[i].lane * w.groups, runs[i].length * w.groups, image.scales[runs[i].batch]);
      if (kind == Patch::copied) copy(a, image, group, runs[i]);
      if (kind == Patch::in_image) sum_atoms(a, image, *atoms, group, runs[i]);
    }
    if (kind == Patch::in_image || (kind == Patch::pixel && image.summed)) return;
    const bool one = !image.ordered && spans.count == 1;
    if (!image.ordered) kernels().order_a8(w.bits, room, ld, p1 - p0, w.kp, room, ld, w.kp, one ? &sums[0] : nullptr);
    if (starts) kernels().start_a8(room, ld, p1 - p0, w.kp, starts, most);
    if (one) return;
    const int8_t* rows = kind == Patch::pixel ? image.data + p0 * ld : room;
    for (int64_t s = 0; s < spans.count; ++s)
      kernels().sum_a8(rows + spans.begin(s), ld, p1 - p0, spans.end(s) - spans.begin(s), sums + s, spans.count);
  }

  // Of a run where it lies in the image; and of the pixels from p on, which p0 begins.
  Acts8 rows(const ConvArgs& a, const Image8& image, int64_t group, const Run& run) const {
    const int64_t lane = run.lane;
    Acts8 acts{first(a, image, group, run), ld,    scales + lane * a.weight.groups,
               sums + lane * spans.count,   piece, jumps};
    if (blocks) acts.starts = image.starts + at(a, image, run), acts.start_at = start_at;
    return acts;
  }
  Acts8 rows(const ConvArgs& a, const Image8& image, int64_t p0, int64_t p) const {
    const int8_t* q = kind == Patch::pixel ? image.data + p * ld : room + (p - p0) * ld;
    const float* its_sums = kind == Patch::pixel && image.summed ? image.sums + p : sums + (p - p0) * spans.count;
    Acts8 acts{q, ld, scales + (p - p0) * a.weight.groups, its_sums, a.weight.kp, kNoJump};
    if (blocks) acts.starts = image.blocks ? image.starts + p : starts + (p - p0), acts.start_at = start_at;
    return acts;
  }

  // The first pixel that a run meets, and its bytes.
  static int64_t at(const ConvArgs& a, const Image8& image, const Run& run) {
    return image.index(run.batch, run.y * a.stride[0], run.x * a.stride[1]);
  }
  const int8_t* first(const ConvArgs& a, const Image8& image, int64_t group, const Run& run) const {
    return image.data + at(a, image, run) * image.pixel + group * channels;
  }

  // The run's sums, from those of atoms in the order of taps.
  void sum_atoms(const ConvArgs& a, const Image8& image, const Atoms& atoms, int64_t group, const Run& run) {
    const int64_t each = channels / atoms.size, gap = a.stride[1] * atoms.row;
    int64_t s = 0, k = 0, end = spans.end(0);
    std::fill_n(static_cast<float*>(line), run.length, 0.0f);
    for (int64_t tap = 0; tap < a.kernel[0] * a.kernel[1]; ++tap) {
      const int64_t y = run.y * a.stride[0] + tap / a.kernel[1] * a.dilation[0];
      const int64_t x = run.x * a.stride[1] + tap % a.kernel[1] * a.dilation[1];
      const float* from = atoms.sums + image.at(run.batch, y, x) / image.pixel * atoms.row + group * each;
      for (int64_t i = 0; i < each; ++i, ++from) {
        if (gap == 1)
          for (int64_t j = 0; j < run.length; ++j) line[j] += from[j];
        else
          for (int64_t j = 0; j < run.length; ++j) line[j] += from[j * gap];
        k += atoms.size;
        if (k < end && k < a.weight.k) continue;
        for (int64_t j = 0; j < run.length; ++j) sums[(run.lane + j) * spans.count + s] = line[j];
        std::fill_n(static_cast<float*>(line), run.length, 0.0f);
        end = spans.end(++s);
      }
    }
  }

  void copy(const ConvArgs& a, const Image8& image, int64_t group, const Run& run) {
    // Whole lines are copied: what is too much is overwritten by the next piece.
    if (piece <= 16)
      copy_pieces<16>(a, image, first(a, image, group, run), run);
    else
      copy_pieces<kSlack>(a, image, first(a, image, group, run), run);
  }

  template <int64_t kBytes>
  void copy_pieces(const ConvArgs& a, const Image8& image, const int8_t* from, const Run& run) {
    const int64_t next = a.stride[1] * image.pixel, pieces = a.weight.k / piece;
    for (int64_t j = 0; j < run.length; ++j, from += next) {
      int8_t* out = room + (run.lane + j) * ld;
      const int8_t* in = from;
      for (int64_t t = 0; t < pieces; in += piece + jumps[t++], out += piece)
        for (int64_t i = 0; i < piece; i += kBytes) std::memcpy(out + i, in + i, kBytes);
      std::memset(out, 0, kBlock);  // up to kp and more: there is as much room between rows
    }
  }
};

}  // namespace mpq
