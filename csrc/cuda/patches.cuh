// What implicit GEMMs share: 64 pixels by 64 output channels a block. Patches are gathered, and weights dequantized, 32
// deep at a time into shared memory; nothing of either is ever whole.
#pragma once
#include "conv.h"
#include "convert.cuh"
#include "decode.cuh"
#include "start.cuh"

namespace mpq {

constexpr int kSquare = 64, kDeep = 32, kGatherers = 256;  // the tile, and its threads
constexpr int kLoads = kSquare * kDeep / kGatherers;       // values of either operand that a thread brings

// Where a pixel's first tap lies in the input, and its result in y.
struct Pixel {
  int64_t x, y;
  int row, column;
};

__device__ inline Pixel pixel_at(const ConvTask& a, int64_t at) {
  const int64_t line = at / a.out_width, batch = line / a.out_height;
  const int64_t ox = at - line * a.out_width, oy = line - batch * a.out_height;
  return {batch * a.x_stride[0], batch * a.y_stride[0] + oy * a.y_stride[2] + ox * a.y_stride[3],
          int(oy * a.stride[0] - a.padding[0]), int(ox * a.stride[1] - a.padding[1])};
}

// What depth k of a patch means: a channel at a tap.
struct Tap {
  int64_t channel;
  int row, column;

  __device__ Tap(const ConvTask& a, int64_t k) {
    const int64_t channels = a.in_channels / a.groups, tap = k / channels;
    const int64_t y = tap / a.kernel[1];
    channel = k - tap * channels;
    row = int(y * a.dilation[0]), column = int((tap - y * a.kernel[1]) * a.dilation[1]);
  }
};

template <class T>
__device__ T gathered(const ConvTask& a, const T* x, const Pixel& p, const Tap& t) {
  const int row = p.row + t.row, column = p.column + t.column;
  if (unsigned(row) >= unsigned(a.height) || unsigned(column) >= unsigned(a.width)) return to_type<T>(0);
  return x[p.x + t.channel * a.x_stride[1] + row * a.x_stride[2] + column * a.x_stride[3]];
}

// Depths k0..k0 + 31 of `count` pixels' patches, 0 past the last pixel and past K, to a tile in shared memory: to.one
// takes a value, to.eight a row's next 8. Lanes run along the depth where channels lie side by side (`last`), else
// along pixels.
template <class T, bool last, class Rows>
__device__ void gather(const ConvTask& a, const T* x, const Pixel* pixels, int count, int64_t k0, const Rows& to) {
  T v[kLoads];
  if constexpr (last) {
    const int d = threadIdx.x % kDeep, m = threadIdx.x / kDeep;
    const Tap tap(a, k0 + d);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int at = m + i * (kGatherers / kDeep);
      v[i] = at < count && k0 + d < a.weight.k ? gathered(a, x, pixels[at], tap) : to_type<T>(0);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) to.one(m + i * (kGatherers / kDeep), d, v[i]);
  } else {
    const int m = threadIdx.x % kSquare, d = threadIdx.x / kSquare * kLoads;
    const Pixel p = pixels[m];
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      v[i] = m < count && k0 + d + i < a.weight.k ? gathered(a, x, p, Tap(a, k0 + d + i)) : to_type<T>(0);
    to.eight(m, d, v);
  }
}

// The same depths of weight rows n0..n0 + count, 0 past the last row.
template <class Rows>
__device__ void dequantize(const Packed& w, const Grid& grid, int64_t n0, int count, int64_t k0, const Rows& to) {
  const int row = threadIdx.x / (kDeep / kLoads), d = threadIdx.x % (kDeep / kLoads) * kLoads;
  const bool real = row < count;
  const int64_t n = real ? n0 + row : n0;
  const int group = int(k0 / w.group);
  const float scale = real ? grid.scale(n, group) : 0, zero = grid.zero(n, group);
  const uint8_t* codes = w.row(n) + packed_bytes(k0 + d, w.bits);
  float v[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) v[i] = __fmul_rn(scale, __fsub_rn(float(get_code(codes, i, w.bits)), zero));
  to.eight(row, d, v);
}

// Which part of y a block makes.
struct Part {
  int64_t n0, m0;  // its first output channel and pixel
  int channels, pixels;
  int64_t x;  // offset of its group's channels

  __device__ Part(const ConvTask& a, int64_t task, int64_t across, int64_t down) {
    const int64_t tile = task / across, group = tile / down, rows = a.weight.n / a.groups;
    const int64_t first = (tile - group * down) * kSquare;
    n0 = group * rows + first, m0 = (task - tile * across) * kSquare;
    channels = rows - first < kSquare ? int(rows - first) : kSquare;
    pixels = a.pixels() - m0 < kSquare ? int(a.pixels() - m0) : kSquare;
    x = group * (a.in_channels / a.groups) * a.x_stride[1];
  }
  template <class T>
  __device__ void store(const ConvTask& a, const Pixel* at, int m, int n, float sum) const {
    if (m < pixels && n < channels)
      static_cast<T*>(a.y)[at[m].y + (n0 + n) * a.y_stride[1]] = to_type<T>(sum + (a.bias ? a.bias[n0 + n] : 0));
  }
};

// kernel(task, tiles across the pixels, tiles down a group's channels)
template <class Kernel>
int start_tiles(const Kernel& kernel, const ConvTask& a, void* stream) {
  if (a.weight.n == 0) return cudaSuccess;
  const int64_t across = ceil_div(a.pixels(), kSquare), down = ceil_div(a.weight.n / a.groups, kSquare);
  return start(kernel, across * down * a.groups, kGatherers, stream, a, across, down);
}

}  // namespace mpq
