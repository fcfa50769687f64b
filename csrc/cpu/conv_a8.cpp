// conv2d with 8-bit activations: the input is rounded once, channels last, and patches of it meet panels of codes.
#include <cstring>
#include <optional>

#include "panels8.h"
#include "patches8.h"

namespace mpq {
namespace {

constexpr int64_t kTileBytes = 256 * 1024;  // patches of a tile, part of a level 2 cache
constexpr int64_t kMinPixels = 128;         // that share each panel
constexpr int64_t kMaxPixels = 256;

// results[pixel][kPanel] of weight rows n0..n1 at the pixels p0..p1 -> y8; `spoiled` learns of samples that are not
// finite.
void store_bytes(const ConvArgs& a, int64_t n0, int64_t n1, int64_t p0, int64_t p1, const float* results,
                 Spoiled& spoiled) {
  const int64_t plane = a.out_height * a.out_width;
  for (int64_t p = p0, stop; p < p1; p = stop) {  // sample by sample
    stop = std::min(p1, (p / plane + 1) * plane);
    if (!kernels().round_bytes(results + (p - p0) * kPanel, kPanel, stop - p, n1 - n0, a.y8_scale,
                               a.y8 + p * a.weight.n + n0, a.weight.n))
      spoiled.mark(p / plane);
  }
}

// The same -> y, or past the caches where it is far.
void store(const ConvArgs& a, bool far, int64_t n0, int64_t n1, int64_t p0, int64_t p1, const float* results) {
  const int64_t plane = a.out_height * a.out_width, columns = n1 - n0;
  if (a.y_stride[1] == 1) {
    for (int64_t p = p0; p < p1; ++p, results += kPanel) {
      float* y = a.y + p * a.weight.n + n0;
      int64_t i = 0;
      for (; i + 8 <= columns; i += 8) std::memcpy(y + i, results + i, 8 * sizeof(float));
      for (; i < columns; ++i) y[i] = results[i];
    }
    return;
  }
  for (int64_t p = p0, stop; p < p1; p = stop) {  // sample by sample
    stop = std::min(p1, (p / plane + 1) * plane);
    kernels().transpose_out(results + (p - p0) * kPanel, kPanel, stop - p, columns,
                            a.y + p / plane * a.y_stride[0] + n0 * a.y_stride[1] + p % plane, a.y_stride[1], far);
  }
}

}  // namespace

void conv_a8(const ConvArgs& a) {
  const Packed& w = a.weight;
  Spoiled spoiled(a.y8 ? a.batch : 0);
  const Patch kind = kind_of_patch(a);
  const Image8 image(a, kind);
  std::optional<Atoms> atoms;
  if (kind == Patch::in_image) atoms.emplace(a, image);
  const int64_t rows = w.n / a.groups, pixels = a.pixels(), plane = a.out_height * a.out_width;
  const bool rounds = a.y8 && !bends(a.activation);  // products do
  const bool direct = !a.y8 && a.y_stride[1] == 1;
  const bool far = !a.y8 && (!direct || !bends(a.activation)) &&  // not what is to be changed once more
                   goes_far(a.y, direct ? rows : plane, pixels * w.n);
  const ByteGrid grid = rounds ? byte_grid(a) : ByteGrid();
  const int64_t wanted = std::min(pixels, std::clamp(kTileBytes / w.kp, kMinPixels, kMaxPixels));
  // As even as can be, of whole output rows, or even parts of them, where these are multiplied by themselves.
  const int64_t unit = kind == Patch::in_image ? ceil_div(a.out_width, ceil_div(a.out_width, kMaxPixels)) : 8;
  const int64_t tile_pixels = ceil_div(ceil_div(pixels, ceil_div(pixels, wanted)), unit) * unit;
  const int64_t tiles = ceil_div(pixels, tile_pixels) * a.groups, panels = panel_count(rows);
  const uint8_t* made = a.groups == 1 || rows % kPanel == 0 ? a.panels : nullptr;
  // With few tiles for each thread the output channels are shared out too, and patches gathered more than once.
  const int64_t parts = std::min(panels, std::max<int64_t>(1, ceil_div(2 * thread_count(), tiles)));
  parallel_for(tiles * parts, 1, [&](int64_t begin, int64_t end) {
    Patches patches(a, image, kind, tile_pixels, rows / parts);
    Panels8 all(w, made, a.bias, a.activation);
    Buffer<float> results(tile_pixels * kPanel);
    Buffer<Run> runs(tile_pixels);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = i / parts / a.groups, group = i / parts % a.groups, part = i % parts;
      const int64_t p0 = tile * tile_pixels, p1 = std::min(pixels, p0 + tile_pixels), first = group * rows;
      const int64_t count = split(a, p0, p1, runs);
      patches.gather(a, image, atoms ? &*atoms : nullptr, group, p0, p1, runs, count);
      for (int64_t panel = panels * part / parts; panel < panels * (part + 1) / parts; ++panel) {
        const int64_t n0 = first + panel * kPanel, n1 = std::min(first + rows, n0 + kPanel);
        Panel8 here = all.at(n0, n1);
        // Memory is asked for the next one during the first product.
        if (made && n1 < w.n) here.ahead = kPanel * packed_bytes(w.kp, w.bits);
        if (rounds) {
          // Samples are told apart only where something is not finite.
          auto multiply = [&](const Acts8& acts, int64_t p, int64_t length) {
            const bool told = kernels().gemm_a8_bytes(w, here, acts, length, grid, a.y8 + p * w.n + n0, w.n);
            here.ahead = 0;
            return told;
          };
          if (kind == Patch::in_image) {
            for (const Run* run = runs; run < runs + count; ++run)
              if (!multiply(patches.rows(a, image, group, *run), p0 + run->lane, run->length)) spoiled.mark(run->batch);
          } else if (!multiply(patches.rows(a, image, p0, p0), p0, p1 - p0)) {
            for (int64_t p = p0, stop; p < p1; p = stop) {
              stop = std::min(p1, (p / plane + 1) * plane);
              if (!multiply(patches.rows(a, image, p0, p), p, stop - p)) spoiled.mark(p / plane);
            }
          }
          continue;
        }
        const bool in_place = direct && (n1 - n0) % kWidest == 0;
        float* y = in_place ? a.y + p0 * w.n + n0 : results;
        const int64_t ldy = in_place ? w.n : kPanel;
        here.far = in_place && far;
        if (kind != Patch::in_image) {
          here.next = kPanel;
          kernels().gemm_a8(w, here, patches.rows(a, image, p0, p0), p1 - p0, y, ldy);
        } else {
          for (const Run* run = runs; run < runs + count; ++run, here.ahead = 0) {
            here.next = run + 1 < runs + count ? run->length * ldy : kPanel - run->lane * ldy;
            kernels().gemm_a8(w, here, patches.rows(a, image, group, *run), run->length, y + run->lane * ldy, ldy);
          }
        }
        if (bends(a.activation)) kernels().activate(a.activation, y, p1 - p0, n1 - n0, ldy);
        if (a.y8)
          store_bytes(a, n0, n1, p0, p1, results, spoiled);
        else if (!in_place)
          store(a, far, n0, n1, p0, p1, results);
      }
    }
  });
  spoiled.fill(a);
}

}  // namespace mpq
