// Where products with floats find the pixels that a convolution's taps meet.
#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "conv.h"
#include "floats.h"
#include "parallel.h"

namespace mpq {

constexpr int64_t kTurned = 64;  // pixels turned at once

// The input channels last, with its zero padding in place; where it has none and is so already, the input itself.
struct Image {
  const bool in_place;
  const int64_t height, width, pixel, row, sample;  // padded size; distances in floats
  Buffer<float> room;
  const float* data;

  explicit Image(const ConvArgs& a)
      : in_place((a.x_stride[1] == 1 || a.in_channels == 1) && a.padding[0] == 0 && a.padding[1] == 0),
        height(a.height + 2 * a.padding[0]),
        width(a.width + 2 * a.padding[1]),
        pixel(in_place ? a.x_stride[3] : a.in_channels),
        row(in_place ? a.x_stride[2] : width * pixel),
        sample(in_place ? a.x_stride[0] : height * row),
        room(in_place ? 0 : a.batch * sample),
        data(in_place ? a.x : room) {
    if (!in_place) copy(a);
  }

  const float* at(const ConvArgs& a, const Run& run) const {
    return data + run.batch * sample + run.y * a.stride[0] * row + run.x * a.stride[1] * pixel;
  }

 private:
  void copy(const ConvArgs& a) {
    const bool last = a.x_stride[1] == 1 && a.x_stride[3] == a.in_channels;
    parallel_for(a.batch * height, ceil_div(kConvGrain, row), [&](int64_t begin, int64_t end) {
      Buffer<float> line(a.x_stride[3] == 1 ? 0 : a.in_channels * a.width);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t y = i % height - a.padding[0], side = a.padding[1] * pixel, inner = a.width * pixel;
        float* const to = room + i * row;
        if (y < 0 || y >= a.height) {
          std::memset(to, 0, row * sizeof(float));
          continue;
        }
        std::memset(to, 0, side * sizeof(float));
        std::memset(to + side + inner, 0, side * sizeof(float));
        const float* const x = a.x + i / height * a.x_stride[0] + y * a.x_stride[2];
        if (last) {
          std::memcpy(to + side, x, inner * sizeof(float));
          continue;
        }
        for (int64_t c = 0; line && c < a.in_channels; ++c)
          kernels().every(x + c * a.x_stride[1], a.x_stride[3], a.width, line + c * a.width);
        const float* const planes = line ? &line[0] : x;
        for (int64_t p = 0; p < a.width; p += kTurned)
          kernels().transpose(planes + p, line ? a.width : a.x_stride[1], a.in_channels, std::min(kTurned, a.width - p),
                              to + side + p * pixel, pixel);
      }
    });
  }
};

// Where each pixel's patch is: in the image, or copied, where its pieces are short.
struct Places {
  const int64_t channels;
  const bool joined;  // taps that lie side by side make one piece
  const Pieces in_image;
  const bool copied;
  const Pieces pieces;

  Places(const ConvArgs& a, const Image& image)
      : channels(a.in_channels / a.groups),
        joined(a.groups == 1 && a.dilation[1] == 1 && image.pixel == channels),
        in_image(found(a, image)),
        copied(in_image.length < kShortest && in_image.from.size() > 1),
        pieces(copied ? Pieces{a.weight.k, {0}} : in_image) {}

  int64_t copied_floats() const { return copied ? pieces.length : 0; }  // of a pixel

  // at[run.lane + i]: of the channels of one group, for each run's pixels; `room` for those that are copied.
  void find(const ConvArgs& a, const Image& image, int64_t group, const Run* runs, int64_t count, float* room,
            const float** at) const {
    const int64_t next = a.stride[1] * image.pixel, length = in_image.length;
    for (const Run* run = runs; run < runs + count; ++run) {
      const float* from = image.at(a, *run) + group * channels;
      float* to = room + run->lane * copied_floats();
      for (int64_t i = 0; i < run->length; ++i, from += next) {
        at[run->lane + i] = copied ? to : from;
        for (size_t t = 0; copied && t < in_image.from.size(); ++t, to += length) {
          const float* const piece = from + in_image.from[t];
          int64_t j = 0;  // without a call for so few
          for (; j + 4 <= length; j += 4) std::memcpy(to + j, piece + j, 4 * sizeof(float));
          for (; j < length; ++j) to[j] = piece[j];
        }
      }
    }
  }

 private:
  static constexpr int64_t kShortest = 64;  // floats

  Pieces found(const ConvArgs& a, const Image& image) const {
    const int64_t across = joined ? 1 : a.kernel[1];
    Pieces all{joined ? a.kernel[1] * channels : channels, {}};
    for (int64_t i = 0; i < a.kernel[0] * across; ++i)
      all.from.push_back(i / across * a.dilation[0] * image.row + i % across * a.dilation[1] * image.pixel);
    return all;
  }
};

}  // namespace mpq
