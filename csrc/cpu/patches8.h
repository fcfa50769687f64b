// Where patches of an image lie, and what products need of each.
#pragma once
#include <algorithm>
#include <cstring>
#include <numeric>

#include "image8.h"

namespace mpq {

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
      start_at[i] = image.blocks ? i % image.blocks * image.block_starts + y * image.row + image.in_row(x) : i * pixels;
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
    if (blocks) acts.starts = image.starts_at(at(a, image, run)), acts.start_at = start_at;
    return acts;
  }
  Acts8 rows(const ConvArgs& a, const Image8& image, int64_t p0, int64_t p) const {
    const int8_t* q = kind == Patch::pixel ? image.data + p * ld : room + (p - p0) * ld;
    const float* its_sums = kind == Patch::pixel && image.summed ? image.sums + p : sums + (p - p0) * spans.count;
    Acts8 acts{q, ld, scales + (p - p0) * a.weight.groups, its_sums, a.weight.kp, kNoJump};
    if (blocks) acts.starts = image.blocks ? image.starts_at(p) : starts + (p - p0), acts.start_at = start_at;
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
