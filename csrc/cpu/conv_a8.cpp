// conv2d with 8-bit activations: the input is rounded once, channels last, so that a patch is a few copies.
#include <algorithm>
#include <cstring>

#include "buffer.h"
#include "conv.h"
#include "parallel.h"

namespace mpq {
namespace {

constexpr int64_t kTileBytes = 256 * 1024;  // patches of a tile, part of a level 2 cache
constexpr int64_t kMinPixels = 128;         // that share each unpacked weight
constexpr int64_t kMaxPixels = 256;
constexpr int64_t kTurned = 64;  // pixels turned at once
constexpr int64_t kSlack = 64;   // bytes that may be read or written past what is needed

// The input as bytes with its zero padding in place, channels last: [batch][height][width][pixel], a pixel being its
// channels, and zeros up to the packed length of a row where a patch is just one pixel.
struct Image8 {
  const int64_t height, width, pixel;
  const bool ordered;  // as `order_a8` does, so that patches need not be
  Buffer<float> scales;
  Buffer<int8_t> data;

  Image8(const ConvArgs& a, bool patches_are_pixels)
      : height(a.height + 2 * a.padding[0]),
        width(a.width + 2 * a.padding[1]),
        pixel(patches_are_pixels ? a.weight.kp : a.in_channels),
        ordered(a.in_channels / a.groups % 16 == 0 || patches_are_pixels),
        scales(a.batch),
        data(padded(a.batch * sample()) + kSlack) {
    const int64_t bytes = padded(a.batch * sample());
    sample_scales(a, scales);
    if (height * width > a.height * a.width || pixel > a.in_channels) std::memset(data, 0, bytes);
    std::memset(data + bytes - kBlock, 0, kBlock + kSlack);
    const bool last = a.x_stride[1] == 1 && a.in_channels > 1;
    // Pixels that lie in one piece: a whole plane, or a row.
    const int64_t piece = a.x_stride[2] == a.width * a.x_stride[3] ? a.height * a.width : a.width;
    const int64_t step = last ? a.width : kTurned, parts = ceil_div(piece, step), pieces = a.height * a.width / piece;
    parallel_for(a.batch * pieces * parts, ceil_div(kConvGrain, step * a.in_channels), [&](int64_t begin, int64_t end) {
      Buffer<float> turned(last ? 0 : kTurned * a.in_channels), line(last ? 0 : kTurned);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / (pieces * parts), p0 = i / parts % pieces * piece + i % parts * step;
        const int64_t p1 = std::min(p0 + step, (i / parts % pieces + 1) * piece);
        const float* x = a.x + b * a.x_stride[0] + p0 / a.width * a.x_stride[2] + p0 % a.width * a.x_stride[3];
        if (last) {
          round(a, b, p0, p1, x, a.x_stride[3]);
          continue;
        }
        if (a.x_stride[3] == 1) {
          kernels().transpose(x, a.x_stride[1], a.in_channels, p1 - p0, turned, a.in_channels);
        } else {
          for (int64_t c = 0; c < a.in_channels; ++c) {
            kernels().every(x + c * a.x_stride[1], a.x_stride[3], p1 - p0, line);
            for (int64_t p = 0; p < p1 - p0; ++p) turned[p * a.in_channels + c] = line[p];
          }
        }
        round(a, b, p0, p1, turned, a.in_channels);
      }
    });
    if (ordered && a.weight.bits < 8)
      parallel_for(bytes / kBlock, kConvGrain, [&](int64_t begin, int64_t end) {
        kernels().order_a8(a.weight.bits, data + begin * kBlock, (end - begin) * kBlock);
      });
  }

  int64_t sample() const { return height * width * pixel; }
  int64_t at(int64_t b, int64_t y, int64_t x) const { return ((b * height + y) * width + x) * pixel; }

  // Pixels p0..p1 of sample b from x, `gap` floats apart.
  void round(const ConvArgs& a, int64_t b, int64_t p0, int64_t p1, const float* x, int64_t gap) {
    for (int64_t p = p0, stop; p < p1; x += (stop - p) * gap, p = stop) {
      stop = std::min(p1, (p / a.width + 1) * a.width);
      kernels().round_bytes(x, gap, stop - p, a.in_channels, scales[b],
                            data + at(b, p / a.width + a.padding[0], p % a.width + a.padding[1]), pixel);
    }
  }
};

// Rows of 8-bit patches for the pixels p0..p1 and one channel group, with their scales and sums.
struct Patches {
  const int64_t spans, ld;
  Buffer<int8_t> room;
  Buffer<float> scales, sums;

  Patches(const ConvArgs& a, int64_t pixels, bool direct)
      : spans(Spans(a.weight).count),
        ld(a.weight.kp + kSlack),
        room(direct ? 0 : pixels * ld + kSlack),
        scales(pixels * a.weight.groups),
        sums(pixels * spans) {}

  Acts8 gather(const ConvArgs& a, const Image8& image, int64_t group, int64_t p0, int64_t p1, const Run* runs,
               int64_t count, bool direct) {
    const Packed& w = a.weight;
    for (int64_t i = 0; i < count; ++i)
      std::fill_n(scales + runs[i].lane * w.groups, runs[i].length * w.groups, image.scales[runs[i].batch]);
    const int8_t* rows = direct ? image.data + p0 * image.pixel : room;
    const int64_t step = direct ? image.pixel : ld;
    if (!direct) {
      for (int64_t i = 0; i < count; ++i) copy(a, image, group, runs[i]);
      if (!image.ordered) kernels().order_a8(w.bits, room, (p1 - p0) * ld);
    }
    kernels().sum_a8(w, rows, step, p1 - p0, sums);
    return {rows, step, scales, sums};
  }

  void copy(const ConvArgs& a, const Image8& image, int64_t group, const Run& run) {
    // Taps that lie side by side are copied together, in whole pieces: what is too much is overwritten by the next.
    const int64_t channels = a.in_channels / a.groups;
    const bool joined = a.groups == 1 && a.dilation[1] == 1;
    const int64_t copies = joined ? 1 : a.kernel[1], bytes = joined ? a.kernel[1] * channels : channels;
    const int8_t* first = image.data + image.at(run.batch, run.y * a.stride[0], run.x * a.stride[1]) + group * channels;
    if (bytes <= 16)
      copy_pieces<16>(a, image, first, run, copies, bytes);
    else
      copy_pieces<kSlack>(a, image, first, run, copies, bytes);
  }

  template <int64_t kPiece>
  void copy_pieces(const ConvArgs& a, const Image8& image, const int8_t* first, const Run& run, int64_t copies,
                   int64_t bytes) {
    const int64_t down = a.dilation[0] * image.width * image.pixel, right = a.dilation[1] * image.pixel;
    const int64_t next = a.stride[1] * image.pixel, rows = a.kernel[0];
    for (int64_t j = 0; j < run.length; ++j, first += next) {
      int8_t* out = room + (run.lane + j) * ld;
      const int8_t* line = first;
      for (int64_t ky = 0; ky < rows; ++ky, line += down) {
        const int8_t* in = line;
        for (int64_t kx = 0; kx < copies; ++kx, in += right, out += bytes)
          for (int64_t i = 0; i < bytes; i += kPiece) std::memcpy(out + i, in + i, kPiece);
      }
      std::memset(out, 0, kBlock);  // up to kp and more: there is as much room between rows
    }
  }
};

// results[pixel][kPanel] of weight rows n0..n1 at the pixels p0..p1 -> y.
void store(const ConvArgs& a, int64_t n0, int64_t n1, int64_t p0, int64_t p1, const float* results) {
  const int64_t plane = a.out_height * a.out_width, columns = n1 - n0;
  if (a.y_stride[1] == 1) {
    for (int64_t p = p0; p < p1; ++p) std::copy_n(results + (p - p0) * kPanel, columns, a.y + p * a.weight.n + n0);
    return;
  }
  for (int64_t p = p0, stop; p < p1; p = stop) {  // sample by sample
    stop = std::min(p1, (p / plane + 1) * plane);
    kernels().transpose(results + (p - p0) * kPanel, kPanel, stop - p, columns,
                        a.y + p / plane * a.y_stride[0] + n0 * a.y_stride[1] + p % plane, a.y_stride[1]);
  }
}

}  // namespace

void sample_scales(const ConvArgs& a, float* scales) {
  // Whole samples in one piece, or else the longest stretches there are.
  const bool planar = a.x_stride[3] == 1 && a.x_stride[2] == a.width && a.x_stride[1] == a.height * a.width;
  const bool last = a.x_stride[1] == 1 && a.x_stride[3] == a.in_channels && a.x_stride[2] == a.width * a.in_channels;
  const int64_t pieces = a.height, row = a.width * a.in_channels;
  Buffer<float> tops(a.batch * pieces);
  parallel_for(a.batch * pieces, ceil_div(kConvGrain, row), [&](int64_t begin, int64_t end) {
    Buffer<float> line(a.width);
    for (int64_t i = begin; i < end; ++i) {
      const float* x = a.x + i / pieces * a.x_stride[0];
      const int64_t y = i % pieces;
      if (planar || last) {
        tops[i] = kernels().largest(x + y * row, row);  // some row's worth, whatever lies there
        continue;
      }
      float top = 0;
      for (int64_t c = 0; c < a.in_channels; ++c) {
        kernels().every(x + c * a.x_stride[1] + y * a.x_stride[2], a.x_stride[3], a.width, line);
        const float t = kernels().largest(line, a.width);
        top = top >= t ? top : t;  // a NaN stays
        if (t != t) break;
      }
      tops[i] = top;
    }
  });
  for (int64_t b = 0; b < a.batch; ++b) {
    float top = 0;
    for (int64_t i = 0; i < pieces && top == top; ++i) top = top >= tops[b * pieces + i] ? top : tops[b * pieces + i];
    scales[b] = top != top ? top : a.act_scale.values ? a.act_scale.values[0] : top / 127.0f;
  }
}

void conv_a8(const ConvArgs& a) {
  const Packed& w = a.weight;
  const bool direct = a.groups == 1 && w.k == a.in_channels && a.stride[0] == 1 && a.stride[1] == 1 &&
                      a.padding[0] == 0 && a.padding[1] == 0;  // a patch is a pixel, and they follow each other
  const Image8 image(a, direct);
  const int64_t rows = w.n / a.groups, pixels = a.pixels();
  const int64_t wanted = std::min(pixels, std::clamp(kTileBytes / w.kp, kMinPixels, kMaxPixels));
  const int64_t per_group = ceil_div(pixels, wanted), tile_pixels = ceil_div(ceil_div(pixels, per_group), 8) * 8;
  const int64_t tiles = per_group * a.groups, panels = panel_count(rows), bytes = kPanel * packed_bytes(w.kp, w.bits);
  const uint8_t* made = a.groups == 1 || rows % kPanel == 0 ? a.panels : nullptr;
  // With fewer tiles than threads the output channels are shared out too, and patches gathered twice.
  const int64_t parts = std::min(panels, std::max<int64_t>(1, ceil_div(2 * thread_count(), tiles)));
  parallel_for(tiles * parts, 1, [&](int64_t begin, int64_t end) {
    Patches patches(a, tile_pixels, direct);
    Buffer<uint8_t> codes(made ? 0 : bytes);
    Buffer<float> results(tile_pixels * kPanel), w_scales(kPanel * w.groups), w_zeros(kPanel * w.groups),
        scratch(kPanel * w.groups);
    Buffer<Run> runs(tile_pixels);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = i / parts / a.groups, group = i / parts % a.groups, part = i % parts;
      const int64_t p0 = tile * tile_pixels, p1 = std::min(pixels, p0 + tile_pixels), first = group * rows;
      if (p0 >= p1) continue;
      const int64_t count = split(a, p0, p1, runs);
      const Acts8 acts = patches.gather(a, image, group, p0, p1, runs, count, direct);
      for (int64_t panel = panels * part / parts; panel < panels * (part + 1) / parts; ++panel) {
        const int64_t n0 = first + panel * kPanel, n1 = std::min(first + rows, n0 + kPanel);
        kernels().grid_a8(w, n0, n1, w_scales, w_zeros, scratch);
        if (!made) kernels().panel_a8(w, n0, n1, codes);
        float bias[kPanel] = {};
        if (a.bias) std::copy(a.bias + n0, a.bias + n1, bias);
        const Panel8 here{made ? made + n0 / kPanel * bytes : codes, w_scales, w_zeros, a.bias ? bias : nullptr,
                          nullptr};
        if (a.y_stride[1] == 1 && n1 - n0 == kPanel) {
          kernels().gemm_a8(w, here, acts, p1 - p0, a.y + p0 * w.n + n0, w.n);
        } else {
          kernels().gemm_a8(w, here, acts, p1 - p0, results, kPanel);
          store(a, n0, n1, p0, p1, results);
        }
      }
    }
  });
}

}  // namespace mpq
