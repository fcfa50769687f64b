// conv2d of one tap on planes: these are the columns of a product as they lie in memory, rows of weights meet some of
// them at a time, and nothing is turned.
#include <algorithm>
#include <cstring>

#include "block.h"
#include "buffer.h"
#include "conv.h"
#include "parallel.h"

namespace mpq {
namespace {

constexpr int64_t kDepth = 512;    // k's of a dequantized block
constexpr int64_t kRows = 48;      // its output channels
constexpr int64_t kColumns = 512;  // pixels that share it, whose sums fit the cache, too
constexpr int64_t kFewest = 128;   // pixels of a plane: of fewer too many are beside whole vectors

// sums[row][column] of weight rows n0..n1 at pixels p0..p1 of a sample -> y, with bias and activation; past the caches
// where it is far.
void store(const ConvArgs& a, bool far, int64_t n0, int64_t n1, int64_t sample, int64_t p0, int64_t p1, float* sums) {
  for (int64_t n = n0; n < n1; ++n, sums += kColumns) {
    const Target target(a, n);
    float* const y = target.in(a) + sample * a.y_stride[0] + p0;
    float* const to = far ? sums : y;
    kernels().add(sums, target.bias(a), p1 - p0, to);
    kernels().activate(a.activation, to, 1, p1 - p0, p1 - p0);
    if (far) kernels().copy_far(sums, p1 - p0, y);
  }
}

}  // namespace

bool takes_planes(const ConvArgs& a) {
  const bool one_tap = a.kernel[0] == 1 && a.kernel[1] == 1 && a.padding[0] == 0 && a.padding[1] == 0;
  const bool planes = a.x_stride[1] > 1 && a.x_stride[2] == a.width && a.x_stride[3] == 1 && a.y_stride[1] > 1;
  return one_tap && planes && a.stride[0] == 1 && a.stride[1] == 1 && a.height * a.width >= kFewest;
}

void conv_planes(const ConvArgs& a) {
  const Packed& w = a.weight;
  const int64_t rows = w.n / a.groups, plane = a.height * a.width, ld = a.x_stride[1];
  const int64_t per_plane = ceil_div(plane, kColumns), tiles = per_plane * a.batch * a.groups;
  const bool far = a.variants == 1 && goes_far(a.y, a.y_stride[1], a.pixels() * w.n);
  // With fewer tiles than threads the output channels are shared out too.
  const int64_t parts = std::min(ceil_div(rows, kRows), std::max<int64_t>(1, ceil_div(2 * thread_count(), tiles)));
  const int64_t part_rows = ceil_div(rows, parts), block_rows = ceil_div(part_rows, ceil_div(part_rows, kRows));
  const int64_t columns = ceil_div(ceil_div(plane, per_plane), kPanel) * kPanel;  // as even as can be
  parallel_for(tiles * parts, 1, [&](int64_t begin, int64_t end) {
    Buffer<float> room(a.floats ? 0 : kRows * kDepth), grid(2 * w.groups), sums(kRows * kColumns), rest(w.k * kPanel);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i % parts, group = i / parts % a.groups, tile = i / parts / a.groups;
      const int64_t sample = tile / per_plane, p0 = tile % per_plane * columns, p1 = std::min(plane, p0 + columns);
      if (p0 >= p1) continue;
      const float* const x = a.x + sample * a.x_stride[0] + group * w.k * ld;
      // What is left beside whole panels, where vectors would reach past the input.
      const int64_t whole = p0 + (p1 - p0) / kPanel * kPanel;
      for (int64_t k = 0; whole < p1 && k < w.k; ++k) {
        float* const to = rest + k * kPanel;
        std::memset(to, 0, kPanel * sizeof(float));
        std::memcpy(to, x + k * ld + whole, (p1 - whole) * sizeof(float));
      }
      const int64_t first = group * rows, stop = first + std::min(rows, (part + 1) * part_rows);
      for (int64_t n0 = first + part * part_rows; n0 < stop; n0 += block_rows) {
        const int64_t n1 = std::min(stop, n0 + block_rows);
        for (int64_t k0 = 0; k0 < w.k; k0 += kDepth) {
          const int64_t k1 = std::min(w.kp, k0 + kDepth), depth = std::min(w.k, k1) - k0;
          const Block block = fp32_block(w, a.floats, n0, n1, k0, k1, room, kDepth, grid);
          for (int64_t p = p0; p < whole; p += kPanel)
            kernels().gemm_at(block.data, block.ld, n1 - n0, x + k0 * ld + p, ld, kPanel, depth, sums + p - p0,
                              kColumns, k0 == 0);
          if (whole < p1)
            kernels().gemm(block.data, block.ld, n1 - n0, rest + k0 * kPanel, p1 - whole, depth, sums + whole - p0,
                           kColumns, k0 == 0);
        }
        store(a, far, n0, n1, sample, p0, p1, sums);
      }
    }
  });
}

}  // namespace mpq
