// conv2d as an implicit GEMM: weights that are dequantized a block at a time meet the input where it lies, row after
// row of a plane, or, where rows are short, patches that are gathered tile by tile into panels.
#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "block.h"
#include "buffer.h"
#include "conv.h"
#include "parallel.h"

namespace mpq {
namespace {

constexpr int64_t kDepth = 512;               // k's of a dequantized block
constexpr int64_t kRows = 48;                 // its output channels
constexpr int64_t kImageFloats = 384 * 1024;  // of an image: 1.5 MiB, not much more than such a cache
constexpr int64_t kTileFloats = 128 * 1024;   // patches of a tile: 512 KiB, a level 2 cache's worth
constexpr int64_t kMinPanels = 8;             // but at least 256 pixels share each decoded weight,
constexpr int64_t kMaxPanels = 16;            // and the sums of 512 fit the cache, too
constexpr int64_t kGatherRows = 16;           // weight rows whose products take as long as to gather what they meet

// Where patches are read: planes [batch][channel][...] in which taps differ by a constant offset and what one tap meets
// at neighbouring output pixels is contiguous. That is the input itself where it has no padding and is walked pixel by
// pixel. Else it is copied with its zeros in place and taken apart into phases: every stride-th row and column from
// each start. The rows of a phase follow each other, so that what a tap meets at the next row of results lies `line`
// floats on; where there is one phase of columns, the zeros that end a row also begin the next.
struct Image {
  const bool in_place;
  const int64_t height, width, steps[2];  // padded; up to so many phases of rows and columns
  const int64_t shared;                   // zeros between two rows that belong to both
  const int64_t span, tall;               // floats in a row of a phase, and its rows
  const int64_t line, plane, sample;      // distances
  Buffer<float> room;
  const float *data, *end;

  explicit Image(const ConvArgs& a)
      : in_place(a.padding[0] == 0 && a.padding[1] == 0 && a.stride[1] == 1 && a.x_stride[3] == 1),
        height(a.height + 2 * a.padding[0]),
        width(a.width + 2 * a.padding[1]),
        steps{std::min(a.stride[0], height), std::min(a.stride[1], width)},
        shared(a.stride[1] == 1 ? a.padding[1] : 0),
        span(ceil_div(width - shared, a.stride[1])),
        tall(ceil_div(height, a.stride[0])),
        line(in_place ? a.stride[0] * a.x_stride[2] : span),
        plane(in_place ? a.x_stride[1] : steps[0] * steps[1] * tall * span + shared),
        sample(in_place ? a.x_stride[0] : a.in_channels * plane),
        room(in_place ? 0 : a.batch * sample + kPanel),
        data(in_place ? a.x : room),
        end(in_place
                ? data + (a.batch - 1) * sample + (a.in_channels - 1) * plane + (height - 1) * a.x_stride[2] + width
                : data + a.batch * sample + kPanel) {
    if (!in_place) copy(a);
  }

  int64_t at(const ConvArgs& a, int64_t y, int64_t x) const {
    if (in_place) return y * a.x_stride[2] + x;
    return ((y % a.stride[0] * steps[1] + x % a.stride[1]) * tall + y / a.stride[0]) * span + x / a.stride[1];
  }

  void copy(const ConvArgs& a) {
    const int64_t planes = a.batch * a.in_channels;
    const bool last = a.x_stride[1] == 1 && a.in_channels > 1;  // channels last
    parallel_for(planes, ceil_div(kConvGrain, plane), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (plane > a.height * a.width) std::memset(room + i * plane, 0, plane * sizeof(float));
        if (!last) fill(a, i / a.in_channels, i % a.in_channels, 1, 0, a.height);
      }
    });
    if (last)
      parallel_for(a.batch * a.height, ceil_div(kConvGrain, a.width * a.in_channels), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) fill(a, i / a.height, 0, a.in_channels, i % a.height, i % a.height + 1);
      });
  }

  // Rows y0..y1 of some channels of a sample, phase by phase.
  void fill(const ConvArgs& a, int64_t b, int64_t channel, int64_t channels, int64_t y0, int64_t y1) {
    const float* x = a.x + b * a.x_stride[0] + channel * a.x_stride[1];
    float* out = room + b * sample + channel * plane;
    for (int64_t py = y0; py < std::min(y0 + a.stride[0], y1); ++py)
      for (int64_t px = 0; px < std::min(a.stride[1], a.width); ++px) {
        const int64_t count = ceil_div(a.width - px, a.stride[1]), gap = a.stride[1] * a.x_stride[3];
        const float* in = x + py * a.x_stride[2] + px * a.x_stride[3];
        float* to = out + at(a, py + a.padding[0], px + a.padding[1]);
        for (int64_t y = py; y < y1; y += a.stride[0], in += a.stride[0] * a.x_stride[2], to += span)
          if (channels > 1)
            kernels().transpose(in, gap, count, channels, to, plane);
          else
            kernels().every(in, gap, count, to);
      }
  }

  // Where the weights of a row meet the input, from the first pixel on, in their order.
  std::vector<int64_t> taps(const ConvArgs& a) const {
    std::vector<int64_t> found;
    const int64_t channels = a.in_channels / a.groups, area = a.kernel[0] * a.kernel[1];
    for (int64_t k = 0; k < channels * area; ++k) {
      const int64_t c = a.floats ? k / area : k % channels, tap = a.floats ? k % area : k / channels;
      found.push_back(c * plane + at(a, tap / a.kernel[1] * a.dilation[0], tap % a.kernel[1] * a.dilation[1]));
    }
    return found;
  }
};

// Channels-last pixels that are patches themselves, and need but be turned.
bool pixels_are_patches(const ConvArgs& a) {
  return a.x_stride[1] == 1 && a.in_channels > 1 && a.height == 1 && a.out_width == a.width && a.padding[0] == 0 &&
         a.padding[1] == 0 && a.weight.k == a.in_channels / a.groups;
}

// Results that lie side by side in a plane of y, at `lane` of their tile.
struct Stretch {
  int64_t lane, length, batch, pixel;
};

// How results are numbered as lanes, which panels take 32 at a time. In place: along the planes of the image, sample by
// sample, those between two rows of results being dropped. Else: over (batch, row, column).
struct Numbering {
  const bool in_place;
  const int64_t line, samples, lanes;  // lanes in each sample, or in all

  Numbering(const ConvArgs& a, const Image* image)
      : in_place(image && image->line >= a.out_width &&
                 spare(a, *image) * (a.weight.n / a.groups) <= kGatherRows * a.pixels()),
        line(in_place ? image->line : a.out_height * a.out_width),
        samples(in_place ? a.batch : 1),
        lanes(in_place ? along(a, *image) : a.pixels()) {}

  static int64_t along(const ConvArgs& a, const Image& image) { return (a.out_height - 1) * image.line + a.out_width; }
  // Lanes that would be dropped.
  static int64_t spare(const ConvArgs& a, const Image& image) {
    return a.batch * ceil_div(along(a, image), kPanel) * kPanel - a.pixels();
  }

  void stretches(const ConvArgs& a, int64_t sample, int64_t p0, int64_t p1, std::vector<Stretch>& found) const {
    const int64_t length = in_place ? a.out_width : line;  // of results, then come lanes to drop
    found.clear();
    for (int64_t p = p0, stop; p < p1; p = stop) {
      const int64_t row = p / line, x = p % line;
      stop = std::min(p1, (row + 1) * line);
      if (x >= length) continue;
      const int64_t count = std::min(stop - p, length - x);
      found.push_back(in_place ? Stretch{p - p0, count, sample, row * a.out_width + x}
                               : Stretch{p - p0, count, row, x});
    }
  }
};

// panel[k][lane] = the input that weight k of a channel group meets at each of up to 32 pixels. May write
// up to kWidest floats past the panel.
void fill_panel(const ConvArgs& a, const Image* image, const std::vector<int64_t>& taps, int64_t group, int64_t p0,
                int64_t p1, float* panel) {
  const int64_t channels = a.in_channels / a.groups;
  Run runs[kPanel];
  const int64_t count = split(a, p0, p1, runs);
  if (p1 - p0 < kPanel) std::memset(panel, 0, a.weight.k * kPanel * sizeof(float));
  if (!image) {
    for (int64_t i = 0; i < count; ++i)
      kernels().transpose(a.x + runs[i].batch * a.x_stride[0] + group * channels + runs[i].x * a.x_stride[3],
                          a.x_stride[3], runs[i].length, channels, panel + runs[i].lane, kPanel);
  } else {
    Piece pieces[kPanel];
    for (int64_t i = 0; i < count; ++i)
      pieces[i] = {runs[i].lane, runs[i].length, runs[i].batch * image->sample + runs[i].y * image->line + runs[i].x};
    kernels().gather(image->data + group * channels * image->plane, image->end, taps.data(), a.weight.k, pieces, count,
                     panel);
  }
}

// sums[row][lane] of weight rows n0..n1 -> y, with bias and activation; past the caches where it is far.
void store_planes(const ConvArgs& a, bool far, int64_t n0, int64_t n1, const std::vector<Stretch>& stretches,
                  float* sums, int64_t ld) {
  for (int64_t n = n0; n < n1; ++n, sums += ld) {
    const Target target(a, n);
    for (const Stretch& s : stretches) {
      float *const from = sums + s.lane, *const y = target.in(a) + s.batch * a.y_stride[0] + s.pixel;
      float* const to = far ? from : y;
      kernels().add(from, target.bias(a), s.length, to);
      kernels().activate(a.activation, to, 1, s.length, s.length);
      if (far) kernels().copy_far(from, s.length, y);
    }
  }
}

// The same where channels run fastest: the sums are turned.
void store_last(const ConvArgs& a, bool far, int64_t n0, int64_t n1, const std::vector<Stretch>& stretches, float* sums,
                int64_t ld) {
  const int64_t rows = a.weight.n / (a.groups * a.variants), channels = a.weight.n / a.variants;
  for (int64_t n = n0, stop; n < n1; sums += (stop - n) * ld, n = stop) {
    stop = std::min(n1, (n / rows + 1) * rows);  // of one variant and channel group
    for (int64_t i = n; i < stop; ++i) {
      float* row = sums + (i - n) * ld;
      if (a.bias) kernels().add(row, Target(a, i).bias(a), ld, row);
      kernels().activate(a.activation, row, 1, ld, ld);
    }
    for (const Stretch& s : stretches)
      kernels().transpose_out(sums + s.lane, ld, stop - n, s.length,
                              Target(a, n).in(a) + s.batch * a.y_stride[0] + s.pixel * channels, channels, far);
  }
}

// Samples at once: as few as have pixels for a tile a thread, or more while their image stays in the threads' caches.
// All where the results of a variant lie side by side.
int64_t samples_at_once(const ConvArgs& a) {
  if (a.variants > 1) return a.batch;
  const int64_t floats = a.in_channels * (a.height + 2 * a.padding[0]) * (a.width + 2 * a.padding[1]);
  const int64_t pixels = a.out_height * a.out_width, threads = thread_count();
  const int64_t most = std::max(threads * kImageFloats / floats, ceil_div(threads * kMaxPanels * kPanel, pixels));
  return ceil_div(a.batch, ceil_div(a.batch, std::min(a.batch, most)));  // as even as can be
}

void convolve(ConvArgs a, bool far) {
  const Packed& w = a.weight;
  if (a.kernel[0] == 1 && a.kernel[1] == 1 && a.padding[0] == 0 && a.padding[1] == 0) {  // only pixels that are used
    a.x_stride[2] *= a.stride[0], a.x_stride[3] *= a.stride[1], a.stride[0] = a.stride[1] = 1;
    a.height = a.out_height, a.width = a.out_width;
    if (a.x_stride[2] == a.width * a.x_stride[3]) {  // a plane is one row
      a.width = a.out_width = a.height * a.width;
      a.height = a.out_height = 1, a.x_stride[2] = a.width * a.x_stride[3];
    }
  }
  const std::optional<Image> image =
      pixels_are_patches(a) ? std::optional<Image>() : std::optional<Image>(std::in_place, a);
  const std::vector<int64_t> taps = image ? image->taps(a) : std::vector<int64_t>();
  const Image* const whole = image ? &*image : nullptr;
  const Numbering numbering(a, whole);
  const int64_t rows = w.n / a.groups, channels = a.in_channels / a.groups, lanes = numbering.lanes;
  const int64_t reach = taps.empty() ? 0 : *std::max_element(taps.begin(), taps.end()) + kPanel;
  const int64_t wanted =
      numbering.in_place ? kMaxPanels : std::clamp(kTileFloats / (kPanel * w.k), kMinPanels, kMaxPanels);
  const int64_t per_sample = ceil_div(lanes, wanted * kPanel);
  const int64_t panels = ceil_div(ceil_div(lanes, kPanel), per_sample), tile_lanes = panels * kPanel;
  const int64_t tiles = per_sample * numbering.samples * a.groups;
  // With fewer tiles than threads the output channels are shared out too, and patches gathered twice.
  const int64_t parts = std::min(ceil_div(rows, kRows), std::max<int64_t>(1, ceil_div(2 * thread_count(), tiles)));
  const int64_t part_rows = ceil_div(rows, parts), block_rows = ceil_div(part_rows, ceil_div(part_rows, kRows));
  parallel_for(tiles * parts, 1, [&](int64_t begin, int64_t end) {
    Buffer<float> patches((numbering.in_place ? 1 : panels) * kPanel * w.k + kWidest),
        room(a.floats ? 0 : kRows * kDepth), sums(kRows * tile_lanes), grid(2 * w.groups);
    std::vector<Stretch> stretches;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = i / parts / a.groups, group = i / parts % a.groups, part = i % parts;
      const int64_t sample = tile / per_sample, p0 = tile % per_sample * tile_lanes;
      const int64_t p1 = std::min(lanes, p0 + tile_lanes), used = ceil_div(p1 - p0, kPanel), ld = used * kPanel;
      if (p0 >= p1) continue;
      numbering.stretches(a, sample, p0, p1, stretches);
      const int64_t first = group * rows, stop = first + std::min(rows, (part + 1) * part_rows);
      const float* x =
          numbering.in_place ? whole->data + sample * whole->sample + group * channels * whole->plane + p0 : nullptr;
      // Panels that may be read where they lie; of a tile's others the last ends before the input does.
      const int64_t direct = x ? std::clamp<int64_t>((whole->end - x - reach + kPanel) / kPanel, 0, used) : 0;
      for (int64_t p = direct; (part == 0 || i == begin) && p < used; ++p) {
        const int64_t at = p * kPanel, count = std::min(kPanel, p1 - p0 - at);
        const Piece piece{0, count, at};
        if (x)
          kernels().gather(x, whole->end, taps.data(), w.k, &piece, 1, patches);
        else
          fill_panel(a, whole, taps, group, p0 + at, p0 + at + count, patches + at * w.k);
      }
      for (int64_t n0 = first + part * part_rows; n0 < stop; n0 += block_rows) {
        const int64_t n1 = std::min(stop, n0 + block_rows);
        for (int64_t k0 = 0; k0 < w.k; k0 += kDepth) {
          const int64_t k1 = std::min(w.kp, k0 + kDepth), depth = std::min(w.k, k1) - k0;
          const Block block = fp32_block(w, a.floats, n0, n1, k0, k1, room, kDepth, grid);
          for (int64_t p = 0; p < used; ++p) {
            const int64_t at = p * kPanel, count = p1 - p0 - at;
            if (p < direct)
              kernels().gemm_at(block.data, block.ld, n1 - n0, x + at, taps.data() + k0, count, depth, sums + at, ld,
                                k0 == 0);
            else
              kernels().gemm(block.data, block.ld, n1 - n0, patches + ((x ? 0 : at) * w.k + k0 * kPanel), count, depth,
                             sums + at, ld, k0 == 0);
          }
        }
        if (a.y_stride[1] == 1)
          store_last(a, far, n0, n1, stretches, sums, ld);
        else
          store_planes(a, far, n0, n1, stretches, sums, ld);
      }
    }
  });
}

}  // namespace

void conv_dense(const ConvArgs& a) {
  const int64_t step = samples_at_once(a), n = a.weight.n;
  const bool far = a.variants == 1 && goes_far(a.y, a.y_stride[1] == 1 ? n : a.y_stride[1], a.pixels() * n);
  for (int64_t b = 0; b < a.batch; b += step) {
    ConvArgs part = a;
    part.batch = std::min(step, a.batch - b);
    part.x += b * a.x_stride[0], part.y += b * a.y_stride[0];
    convolve(part, far);
  }
}

}  // namespace mpq
