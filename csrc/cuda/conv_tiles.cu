// conv2d as an implicit GEMM: 64 pixels by 64 output channels a block. Patches are gathered, and weights dequantized,
// 32 deep at a time into shared memory; nothing of either is ever whole.
#include "conv.h"
#include "convert.cuh"
#include "decode.cuh"
#include "start.cuh"
#include "tile.cuh"

namespace {

using namespace mpq;

constexpr int kTile = 64, kThreads = tile_threads(kTile);
constexpr int kLoads = kTile * kDepth / kThreads;  // values of a patch tile that a thread gathers

// Where a pixel's first tap lies in the input, and its result in y.
struct Pixel {
  int64_t x, y;
  int row, column;
};

struct Shared {
  float patches[kTile][kTileRow], weights[kTile][kTileRow];
  Pixel pixels[kTile];
};

__device__ Pixel pixel_at(const ConvTask& a, int64_t at) {
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
__device__ float gathered(const ConvTask& a, const T* x, const Pixel& p, const Tap& t) {
  const int row = p.row + t.row, column = p.column + t.column;
  if (unsigned(row) >= unsigned(a.height) || unsigned(column) >= unsigned(a.width)) return 0;
  return to_float(x[p.x + t.channel * a.x_stride[1] + row * a.x_stride[2] + column * a.x_stride[3]]);
}

// Depths k0..k0 + 31 of `count` pixels' patches; zeros past the last pixel and past K. Lanes run along the depth where
// channels lie side by side, else along pixels.
template <class T, bool last>
__device__ void gather(Shared& s, const ConvTask& a, const T* x, int count, int64_t k0) {
  if constexpr (last) {
    const int d = threadIdx.x % kDepth;
    const Tap tap(a, k0 + d);
    float v[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int m = threadIdx.x / kDepth + i * (kThreads / kDepth);
      v[i] = m < count && k0 + d < a.weight.k ? gathered(a, x, s.pixels[m], tap) : 0;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) s.patches[threadIdx.x / kDepth + i * (kThreads / kDepth)][d] = v[i];
  } else {
    const int m = threadIdx.x % kTile;
    const Pixel p = s.pixels[m];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int d = threadIdx.x / kTile + i * (kThreads / kTile);
      s.patches[m][d] = m < count && k0 + d < a.weight.k ? gathered(a, x, p, Tap(a, k0 + d)) : 0;
    }
  }
}

// The same depths of weight rows n0..n0 + count, 8 codes a thread; zeros past the last row.
__device__ void dequantize(Shared& s, const Packed& w, const Grid& grid, int64_t n0, int count, int64_t k0) {
  constexpr int kCodes = kTile * kDepth / kThreads;
  const int row = threadIdx.x / (kDepth / kCodes), d = threadIdx.x % (kDepth / kCodes) * kCodes;
  const bool real = row < count;
  const int64_t n = real ? n0 + row : n0;
  const int group = int(k0 / w.group);
  const float scale = real ? grid.scale(n, group) : 0, zero = grid.zero(n, group);
  const uint8_t* codes = w.row(n) + packed_bytes(k0 + d, w.bits);
  float v[kCodes];
#pragma unroll
  for (int i = 0; i < kCodes; ++i) v[i] = __fmul_rn(scale, __fsub_rn(float(get_code(codes, i, w.bits)), zero));
#pragma unroll
  for (int i = 0; i < kCodes; i += 4)
    *reinterpret_cast<float4*>(&s.weights[row][d + i]) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
}

// last: channels lie side by side, in x and y, and so do the columns of a tile; else pixels do.
template <class T, bool last>
__global__ void __launch_bounds__(kThreads, 2) tiles(const ConvTask a, int64_t across, int64_t down) {
  constexpr int kSide = kTile / kEach;
  __shared__ __align__(16) Shared s;
  const Grid grid(a.weight);
  const int64_t rows = a.weight.n / a.groups;  // of a group
  for (int64_t task = blockIdx.x; task < across * down * a.groups; task += gridDim.x) {
    const int64_t tile = task / across, group = tile / down;
    const int64_t first = (tile - group * down) * kTile, m0 = (task - tile * across) * kTile;
    const int64_t n0 = group * rows + first;
    const int channels = rows - first < kTile ? int(rows - first) : kTile;
    const int pixels = a.pixels() - m0 < kTile ? int(a.pixels() - m0) : kTile;
    const T* x = static_cast<const T*>(a.x) + group * (a.in_channels / a.groups) * a.x_stride[1];
    __syncthreads();  // the tile before is done
    if (threadIdx.x < kTile) s.pixels[threadIdx.x] = pixel_at(a, m0 + threadIdx.x);
    float sum[kEach][kEach] = {};
    for (int64_t k = 0; k < a.weight.k; k += kDepth) {
      __syncthreads();  // the chunk before has been used, the pixels are there
      gather<T, last>(s, a, x, pixels, k);
      dequantize(s, a.weight, grid, n0, channels, k);
      __syncthreads();
      multiply<kTile>(last ? s.patches : s.weights, last ? s.weights : s.patches, sum);
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i)
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int r = threadIdx.x / kSide + i * kSide, c = threadIdx.x % kSide + j * kSide;
        const int m = last ? r : c, n = last ? c : r;
        if (m < pixels && n < channels)
          static_cast<T*>(a.y)[s.pixels[m].y + (n0 + n) * a.y_stride[1]] =
              to_type<T>(sum[i][j] + (a.bias ? a.bias[n0 + n] : 0));
      }
  }
}

}  // namespace

int mpq_conv_tiles(const ConvTask& a, void* stream) {
  if (a.weight.n == 0) return cudaSuccess;
  const int64_t across = ceil_div(a.pixels(), kTile), down = ceil_div(a.weight.n / a.groups, kTile);
  return with_type(a.type, [&](auto t) {
    using T = decltype(t);
    const auto kernel = a.x_stride[1] == 1 ? tiles<T, true> : tiles<T, false>;
    return start(kernel, across * down * a.groups, kThreads, stream, a, across, down);
  });
}
