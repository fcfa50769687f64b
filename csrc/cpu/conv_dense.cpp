// conv2d as an implicit GEMM, channels last: pixels are rows of activations, read where they lie in the input, and
// weights are decoded into panels of 32 output channels.
#include <algorithm>

#include "pixels.h"

namespace mpq {
namespace {

constexpr int64_t kTilePixels = 512;           // that share each decoded weight
constexpr int64_t kCopiedFloats = 128 * 1024;  // of their patches, at the most: 512 KiB, a level 2 cache's worth
constexpr int64_t kImageFloats = 384 * 1024;   // of an image: 1.5 MiB, not much more than such a cache

// results[pixel][kPanel] of weight rows n0..n1 at the pixels p0..p1 -> y.
void store(const ConvArgs& a, bool far, int64_t n0, int64_t n1, int64_t p0, int64_t p1, float* results) {
  const int64_t rows = a.weight.n / (a.groups * a.variants), channels = a.weight.n / a.variants;
  const int64_t plane = a.out_height * a.out_width;
  for (int64_t n = n0, stop; n < n1; results += stop - n, n = stop) {
    stop = std::min(n1, (n / rows + 1) * rows);  // of one variant and channel group
    const Target target(a, n);
    const float* const bias = a.bias ? a.bias + target.channel : nullptr;
    const bool last = a.y_stride[1] == 1;
    float* const to = last ? target.in(a) + p0 * channels : results;
    const int64_t ld = last ? channels : kPanel;
    kernels().finish(results, kPanel, bias, range_of(a.activation), p1 - p0, stop - n, to, ld, last && far);
    if (bends(a.activation)) kernels().activate(a.activation, to, p1 - p0, stop - n, ld);
    for (int64_t p = p0, end; !last && p < p1; p = end) {  // sample by sample
      end = std::min(p1, (p / plane + 1) * plane);
      kernels().transpose_out(results + (p - p0) * kPanel, kPanel, end - p, stop - n,
                              target.in(a) + p / plane * a.y_stride[0] + p % plane, a.y_stride[1], far);
    }
  }
}

// Samples at once: as few as have pixels for a tile a thread, or more while their image stays in the threads' caches.
// All where the results of a variant lie side by side.
int64_t samples_at_once(const ConvArgs& a) {
  if (a.variants > 1) return a.batch;
  const int64_t floats = a.in_channels * (a.height + 2 * a.padding[0]) * (a.width + 2 * a.padding[1]);
  const int64_t pixels = a.out_height * a.out_width, threads = thread_count();
  const int64_t most = std::max(threads * kImageFloats / floats, ceil_div(threads * kTilePixels, pixels));
  return ceil_div(a.batch, ceil_div(a.batch, std::min(a.batch, most)));  // as even as can be
}

// Taps and channels of `floats` in the order of packed weights: [row][tap][channel].
void order_taps(const ConvArgs& a, float* out) {
  const int64_t area = a.kernel[0] * a.kernel[1], channels = a.weight.k / area;
  parallel_for(a.weight.n, ceil_div(kConvGrain, a.weight.k), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      kernels().transpose(a.floats + n * a.weight.k, area, channels, area, out + n * a.weight.k, channels);
  });
}

void convolve(const ConvArgs& a, bool far, const float* floats) {
  const bool asks = a.variants == 1 && a.y_stride[1] == 1 && !far;  // memory, for results before they are there
  const Image image(a);
  const Places places(a, image);
  const int64_t rows = a.weight.n / a.groups, pixels = a.pixels(), panels = panel_count(rows);
  const int64_t wanted =
      std::clamp(kCopiedFloats / std::max<int64_t>(1, places.copied_floats()), FloatPanels::kTogether, kTilePixels);
  const int64_t tile_pixels = ceil_div(pixels, ceil_div(pixels, wanted));  // as even as can be
  const int64_t tiles = ceil_div(pixels, tile_pixels) * a.groups;
  // With few tiles for each thread the output channels are shared out too, and patches copied more than once.
  const int64_t parts = std::min(panels, std::max<int64_t>(1, ceil_div(2 * thread_count(), tiles)));
  parallel_for(tiles * parts, 1, [&](int64_t begin, int64_t end) {
    FloatPanels weights(a.weight, floats);
    Buffer<float> results(tile_pixels * kPanel);
    Buffer<float> copied(places.copied_floats() * tile_pixels);
    Buffer<const float*> at(tile_pixels);
    Buffer<Run> runs(tile_pixels);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = i / parts / a.groups, group = i / parts % a.groups, part = i % parts;
      const int64_t p0 = tile * tile_pixels, p1 = std::min(pixels, p0 + tile_pixels), first = group * rows;
      places.find(a, image, group, runs, split(a, p0, p1, runs), copied, at);
      for (int64_t panel = panels * part / parts; panel < panels * (part + 1) / parts; ++panel) {
        const int64_t n0 = first + panel * kPanel, n1 = std::min(first + rows, n0 + kPanel);
        const auto ask = [&](int64_t p, int64_t stop) {
          for (; asks && p < stop; ++p)
            for (int64_t n = n0; n < n1; n += kWidest) __builtin_prefetch(a.y + (p0 + p) * a.weight.n + n, 1);
        };
        weights.multiply(n0, n1, at, p1 - p0, places.pieces, results, ask, [&](int64_t p, int64_t stop) {
          store(a, far, n0, n1, p0 + p, p0 + stop, results + p * kPanel);
        });
      }
    }
  });
}

}  // namespace

void conv_dense(const ConvArgs& args) {
  ConvArgs a = args;
  if (a.kernel[0] == 1 && a.kernel[1] == 1 && a.padding[0] == 0 && a.padding[1] == 0) {  // only pixels that are used
    a.x_stride[2] *= a.stride[0], a.x_stride[3] *= a.stride[1], a.stride[0] = a.stride[1] = 1;
    a.height = a.out_height, a.width = a.out_width;
  }
  const int64_t step = samples_at_once(a), n = a.weight.n;
  const bool far = a.variants == 1 && (a.y_stride[1] > 1 || !bends(a.activation)) &&
                   goes_far(a.y, a.y_stride[1] == 1 ? n / a.groups : a.y_stride[1], a.pixels() * n);
  const bool orders = a.floats && a.kernel[0] * a.kernel[1] > 1;
  Buffer<float> ordered(orders ? n * a.weight.k : 0);
  if (orders) order_taps(a, ordered);
  for (int64_t b = 0; b < a.batch; b += step) {
    ConvArgs part = a;
    part.batch = std::min(step, a.batch - b);
    part.x += b * a.x_stride[0], part.y += b * a.y_stride[0];
    convolve(part, far, orders ? ordered : a.floats);
  }
}

}  // namespace mpq
