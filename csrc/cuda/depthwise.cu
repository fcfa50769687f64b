// Depthwise convolutions, directly: each channel on its own, a thread several results. Weights are dequantized into
// shared memory, up to kTaps of a channel at a time, and lanes run along what lies side by side in memory: pixels of a
// plane, or channels.
#include "convert.cuh"
#include "conv.h"
#include "decode.cuh"
#include "start.cuh"

namespace {

using namespace mpq;

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kEach = 4;  // results of a thread
constexpr int kTaps = 64;

__device__ float weight_at(const Packed& w, const Grid& grid, int64_t n, int64_t k) {
  const int group = int(k / w.group);
  return __fmul_rn(grid.scale(n, group), __fsub_rn(float(get_code(w.row(n), k, w.bits)), grid.zero(n, group)));
}

// An output pixel's first tap in the input, and where its result goes. Far outside for pixels past the last.
struct Pixel {
  int64_t x, y;  // offsets of its sample, and of its result
  int row, column;
  bool real;

  __device__ Pixel(const ConvTask& a, int64_t at) : real(at < a.pixels()) {
    const int64_t line = at / a.out_width, batch = line / a.out_height;
    const int64_t ox = at - line * a.out_width, oy = line - batch * a.out_height;
    row = int(oy * a.stride[0] - a.padding[0]), column = int(ox * a.stride[1] - a.padding[1]);
    x = batch * a.x_stride[0];
    y = batch * a.y_stride[0] + oy * a.y_stride[2] + ox * a.y_stride[3];
  }
  __device__ bool meets(const ConvTask& a, int tap_row, int tap_column) const {
    return real && unsigned(row + tap_row) < unsigned(a.height) && unsigned(column + tap_column) < unsigned(a.width);
  }
  __device__ int64_t offset(const ConvTask& a, int tap_row, int tap_column) const {
    return x + (row + tap_row) * a.x_stride[2] + (column + tap_column) * a.x_stride[3];
  }
};

// sum[j] += weights[t * gap] * x at tap t of pixel j, for taps t0..t1 of the kernel.
template <class T>
__device__ void add_taps(const ConvTask& a, const T* x, const Pixel (&pixel)[kEach], const float* weights, int gap,
                         int64_t t0, int64_t t1, float (&sum)[kEach]) {
  const int columns = int(a.kernel[1]), down = int(a.dilation[0]), right = int(a.dilation[1]);
  int column = int(t0 % columns), tap_row = int(t0 / columns) * down;
  for (int64_t t = t0; t < t1; ++t, weights += gap) {
    const int tap_column = column * right;
    const float w = *weights;
#pragma unroll
    for (int j = 0; j < kEach; ++j)
      if (pixel[j].meets(a, tap_row, tap_column))
        sum[j] = fmaf(w, to_float(x[pixel[j].offset(a, tap_row, tap_column)]), sum[j]);
    if (++column == columns) column = 0, tap_row += down;
  }
}

template <class T>
__device__ void put(const ConvTask& a, const Pixel (&pixel)[kEach], int64_t n, const float (&sum)[kEach]) {
  T* y = static_cast<T*>(a.y) + n * a.y_stride[1];
  const float bias = a.bias ? a.bias[n] : 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j)
    if (pixel[j].real) y[pixel[j].y] = to_type<T>(sum[j] + bias);
}

// A block: kThreads * kEach pixels of one output channel, lanes along pixels.
template <class T>
__global__ void __launch_bounds__(kThreads) planes(const ConvTask a, int64_t tiles) {
  __shared__ float weights[kTaps];
  const Grid grid(a.weight);
  const int64_t rows = a.weight.n / a.groups;  // results of a channel
  for (int64_t task = blockIdx.x; task < tiles * a.weight.n; task += gridDim.x) {
    const int64_t n = task / tiles, first = (task - n * tiles) * kThreads * kEach + threadIdx.x;
    const Pixel pixel[kEach] = {
        {a, first}, {a, first + kThreads}, {a, first + 2 * kThreads}, {a, first + 3 * kThreads}};
    const T* x = static_cast<const T*>(a.x) + n / rows * a.x_stride[1];
    float sum[kEach] = {};
    for (int64_t t = 0; t < a.weight.k; t += kTaps) {
      const int64_t end = t + kTaps < a.weight.k ? t + kTaps : a.weight.k;
      __syncthreads();  // the weights before have been used
      if (t + threadIdx.x < end) weights[threadIdx.x] = weight_at(a.weight, grid, n, t + threadIdx.x);
      __syncthreads();
      add_taps(a, x, pixel, weights, 1, t, end, sum);
    }
    put<T>(a, pixel, n, sum);
  }
}

// A block: kWarps * kEach pixels of 32 channels, one result each; lanes along channels.
template <class T>
__global__ void __launch_bounds__(kThreads) channels(const ConvTask a, int64_t tiles) {
  __shared__ float weights[kTaps][32];
  const Grid grid(a.weight);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t strips = ceil_div(a.weight.n, 32);
  for (int64_t task = blockIdx.x; task < tiles * strips; task += gridDim.x) {
    const int64_t tile = task / strips, n = (task - tile * strips) * 32 + lane;
    const int64_t first = n < a.weight.n ? tile * kWarps * kEach + warp : a.pixels();
    const Pixel pixel[kEach] = {{a, first}, {a, first + kWarps}, {a, first + 2 * kWarps}, {a, first + 3 * kWarps}};
    const T* x = static_cast<const T*>(a.x) + n * a.x_stride[1];
    float sum[kEach] = {};
    for (int64_t t = 0; t < a.weight.k; t += kTaps) {
      const int64_t end = t + kTaps < a.weight.k ? t + kTaps : a.weight.k;
      __syncthreads();  // the weights before have been used
      for (int64_t k = t + warp; k < end; k += kWarps)
        weights[k - t][lane] = n < a.weight.n ? weight_at(a.weight, grid, n, k) : 0;
      __syncthreads();
      add_taps(a, x, pixel, &weights[0][lane], 32, t, end, sum);
    }
    if (n < a.weight.n) put<T>(a, pixel, n, sum);
  }
}

}  // namespace

int mpq_conv_depthwise(const ConvTask& a, void* stream) {
  return with_type(a.type, [&](auto t) {
    using T = decltype(t);
    const bool side_by_side = a.x_stride[1] == 1 && a.y_stride[1] == 1 && a.weight.n == a.groups;
    const int64_t tiles = ceil_div(a.pixels(), (side_by_side ? kWarps : kThreads) * kEach);
    if (side_by_side) return start(channels<T>, tiles * ceil_div(a.weight.n, 32), kThreads, stream, a, tiles);
    return start(planes<T>, tiles * a.weight.n, kThreads, stream, a, tiles);
  });
}
