// Depthwise convolutions, directly: each channel on its own, a thread several results. Weights are dequantized into
// shared memory, up to kTaps of a channel at a time, and lanes run along what lies side by side in memory: pixels of a
// plane, or channels. 8-bit activations meet codes as integers, and scales and zeros come in at the end.
#include <type_traits>

#include "conv.h"
#include "convert.cuh"
#include "decode.cuh"
#include "start.cuh"

namespace {

using namespace mpq;

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kEach = 4;  // results of a thread
constexpr int kTaps = 64;

template <class X>
constexpr bool kBytes = std::is_same<X, int8_t>::value;
template <class X>
using Sum = std::conditional_t<kBytes<X>, int, float>;

template <class X>
__device__ Sum<X> weight_at(const Packed& w, const Grid& grid, int64_t n, int64_t k) {
  const int code = get_code(w.row(n), k, w.bits);
  if constexpr (kBytes<X>) {
    return code;
  } else {
    const int group = int(k / w.group);
    return __fmul_rn(grid.scale(n, group), __fsub_rn(float(code), grid.zero(n, group)));
  }
}

// What a thread knows of its results: sums of products, and of bytes alone.
template <class X>
struct Sums {
  Sum<X> products[kEach] = {};
  int bytes[kEach] = {};

  __device__ void add(int j, Sum<X> w, X x) {
    if constexpr (kBytes<X>) {
      products[j] += w * x;
      bytes[j] += x;
    } else {
      products[j] = fmaf(w, to_float(x), products[j]);
    }
  }
};

// An output pixel's first tap in the input, and where its result goes. Far outside for pixels past the last.
struct Pixel {
  int64_t x, y;  // offsets of its sample, and of its result
  int row, column;
  bool real;
  float act_scale;  // of 8-bit activations

  __device__ Pixel(const ConvTask& a, int64_t at) : real(at < a.pixels()) {
    const int64_t line = at / a.out_width, batch = line / a.out_height;
    const int64_t ox = at - line * a.out_width, oy = line - batch * a.out_height;
    row = int(oy * a.stride[0] - a.padding[0]), column = int(ox * a.stride[1] - a.padding[1]);
    x = batch * a.x_stride[0];
    y = batch * a.y_stride[0] + oy * a.y_stride[2] + ox * a.y_stride[3];
    act_scale = a.act_scales && real ? a.act_scales[batch] : 0;
  }
  __device__ bool meets(const ConvTask& a, int tap_row, int tap_column) const {
    return real && unsigned(row + tap_row) < unsigned(a.height) && unsigned(column + tap_column) < unsigned(a.width);
  }
  __device__ int64_t offset(const ConvTask& a, int tap_row, int tap_column) const {
    return x + (row + tap_row) * a.x_stride[2] + (column + tap_column) * a.x_stride[3];
  }
};

// Adds weights[t * gap] * x at tap t of pixel j, for taps t0..t1 of the kernel.
template <class X>
__device__ void add_taps(const ConvTask& a, const X* x, const Pixel (&pixel)[kEach], const Sum<X>* weights, int gap,
                         int64_t t0, int64_t t1, Sums<X>& sums) {
  const int columns = int(a.kernel[1]), down = int(a.dilation[0]), right = int(a.dilation[1]);
  int column = int(t0 % columns), tap_row = int(t0 / columns) * down;
  for (int64_t t = t0; t < t1; ++t, weights += gap) {
    const int tap_column = column * right;
    const Sum<X> w = *weights;
#pragma unroll
    for (int j = 0; j < kEach; ++j)
      if (pixel[j].meets(a, tap_row, tap_column)) sums.add(j, w, x[pixel[j].offset(a, tap_row, tap_column)]);
    if (++column == columns) column = 0, tap_row += down;
  }
}

template <class X, class Y>
__device__ void put(const ConvTask& a, const Grid& grid, const Pixel (&pixel)[kEach], int64_t n, const Sums<X>& sums) {
  Y* y = static_cast<Y*>(a.y) + n * a.y_stride[1];
  const float bias = a.bias ? a.bias[n] : 0, scale = kBytes<X> ? grid.scale(n, 0) : 0;
  const float zero = kBytes<X> ? grid.zero(n, 0) : 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    float result = float(sums.products[j]);
    if constexpr (kBytes<X>)
      result = fmaf(__fmul_rn(scale, pixel[j].act_scale), fmaf(-zero, float(sums.bytes[j]), result), bias);
    else
      result += bias;
    if (pixel[j].real) y[pixel[j].y] = to_type<Y>(result);
  }
}

// A block: kThreads * kEach pixels of one output channel, lanes along pixels.
template <class X, class Y>
__global__ void __launch_bounds__(kThreads) planes(const ConvTask a, int64_t tiles) {
  __shared__ Sum<X> weights[kTaps];
  const Grid grid(a.weight);
  const int64_t rows = a.weight.n / a.groups;  // results of a channel
  for (int64_t task = blockIdx.x; task < tiles * a.weight.n; task += gridDim.x) {
    const int64_t n = task / tiles, first = (task - n * tiles) * kThreads * kEach + threadIdx.x;
    const Pixel pixel[kEach] = {
        {a, first}, {a, first + kThreads}, {a, first + 2 * kThreads}, {a, first + 3 * kThreads}};
    const X* x = static_cast<const X*>(a.x) + n / rows * a.x_stride[1];
    Sums<X> sums;
    for (int64_t t = 0; t < a.weight.k; t += kTaps) {
      const int64_t end = t + kTaps < a.weight.k ? t + kTaps : a.weight.k;
      __syncthreads();  // the weights before have been used
      if (t + threadIdx.x < end) weights[threadIdx.x] = weight_at<X>(a.weight, grid, n, t + threadIdx.x);
      __syncthreads();
      add_taps(a, x, pixel, weights, 1, t, end, sums);
    }
    put<X, Y>(a, grid, pixel, n, sums);
  }
}

// A block: kWarps * kEach pixels of 32 channels, one result each; lanes along channels.
template <class X, class Y>
__global__ void __launch_bounds__(kThreads) channels(const ConvTask a, int64_t tiles) {
  __shared__ Sum<X> weights[kTaps][32];
  const Grid grid(a.weight);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t strips = ceil_div(a.weight.n, 32);
  for (int64_t task = blockIdx.x; task < tiles * strips; task += gridDim.x) {
    const int64_t tile = task / strips, n = (task - tile * strips) * 32 + lane;
    const int64_t first = n < a.weight.n ? tile * kWarps * kEach + warp : a.pixels();
    const Pixel pixel[kEach] = {{a, first}, {a, first + kWarps}, {a, first + 2 * kWarps}, {a, first + 3 * kWarps}};
    const X* x = static_cast<const X*>(a.x) + n * a.x_stride[1];
    Sums<X> sums;
    for (int64_t t = 0; t < a.weight.k; t += kTaps) {
      const int64_t end = t + kTaps < a.weight.k ? t + kTaps : a.weight.k;
      __syncthreads();  // the weights before have been used
      for (int64_t k = t + warp; k < end; k += kWarps)
        weights[k - t][lane] = n < a.weight.n ? weight_at<X>(a.weight, grid, n, k) : 0;
      __syncthreads();
      add_taps(a, x, pixel, &weights[0][lane], 32, t, end, sums);
    }
    if (n < a.weight.n) put<X, Y>(a, grid, pixel, n, sums);
  }
}

template <class X, class Y>
int start_depthwise(const ConvTask& a, void* stream) {
  const bool side_by_side = a.x_stride[1] == 1 && a.y_stride[1] == 1 && a.weight.n == a.groups;
  const int64_t tiles = ceil_div(a.pixels(), (side_by_side ? kWarps : kThreads) * kEach);
  if (side_by_side) return start(channels<X, Y>, tiles * ceil_div(a.weight.n, 32), kThreads, stream, a, tiles);
  return start(planes<X, Y>, tiles * a.weight.n, kThreads, stream, a, tiles);
}

}  // namespace

int mpq_conv_depthwise(const ConvTask& a, void* stream) {
  if (a.act_scales && (a.weight.groups > 1 || a.weight.k > kExactTaps)) return cudaErrorInvalidValue;
  return with_type(a.type, [&](auto t) {
    using Y = decltype(t);
    return a.act_scales ? start_depthwise<int8_t, Y>(a, stream) : start_depthwise<Y, Y>(a, stream);
  });
}
