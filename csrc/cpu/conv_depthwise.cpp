// conv2d with one input channel a group: its weights, and along what its vectors run.
#include "depthwise.h"

#include <algorithm>
#include <cstring>

#include "block.h"
#include "parallel.h"

namespace mpq {
namespace {

constexpr int64_t kSmallPlane = 256;  // planes of fewer pixels are turned

// Scales and zeros of all weight rows, which are one group each.
void load_grids(const Packed& w, float* scales, float* zeros) {
  const Float type = w.half ? Float::f16 : Float::f32;
  kernels().to_float(w.scales, type, scales, w.n);
  if (w.zero_each) return kernels().to_float(w.zeros, type, zeros, w.n);
  float zero = mid_zero(w.bits);
  if (w.zeros) kernels().to_float(w.zeros, type, &zero, 1);
  std::fill_n(zeros, w.n, zero);
}

}  // namespace

Filters::Filters(const ConvArgs& a)
    : count(a.weight.k), taps(a.weight.n * count), scale(a.weight.n), bias(a.weight.n), zero(a.weight.n) {
  const Packed& w = a.weight;
  for (int64_t n = 0; n < w.n; ++n) bias[n] = Target(a, n).bias(a);
  if (a.act8) load_grids(w, scale, zero);
  // A zero of whole halves leaves integers of twice the size, and one sum serves.
  for (int64_t n = 0; a.act8 && n < w.n; ++n)
    centered &= zero[n] >= 0 && zero[n] <= 255 && 2 * zero[n] == int(2 * zero[n]);
  parallel_for(w.n, ceil_div(kConvGrain, w.kp), [&](int64_t begin, int64_t end) {
    Buffer<float> room(w.kp), grid(2 * w.groups);
    Buffer<uint8_t> codes(w.kp);
    for (int64_t n = begin; n < end; ++n) {
      float* row = taps + n * count;
      if (!a.act8) {
        scale[n] = 1;
        std::memcpy(row, fp32_block(w, a.floats, n, n + 1, 0, w.kp, room, w.kp, grid).data, count * sizeof(float));
        continue;
      }
      kernels().unpack(w.row(n), w.bits, codes, count);
      for (int64_t k = 0; k < count; ++k) row[k] = centered ? 2 * codes[k] - 2 * zero[n] : codes[k];
      if (centered) scale[n] /= 2;
    }
  });
}

bool takes_depthwise(const ConvArgs& a) {
  return a.groups > 1 && a.in_channels == a.groups && (!a.act8 || (a.weight.groups == 1 && a.weight.k <= kExactTaps));
}

void conv_depthwise(const ConvArgs& a) {
  const Filters filters(a);
  Buffer<float> scales(a.act8 ? a.batch : 0);
  if (a.act8) sample_scales(a, scales);
  const float* act = a.act8 ? static_cast<float*>(scales) : nullptr;
  const bool plain = a.weight.n == a.groups && a.groups >= kWidest;  // one result a channel, a vector of channels
  const bool whole = a.x_stride[3] == 1 && a.x_stride[2] == a.width && a.y_stride[3] == 1;  // planes in one piece
  if (plain && a.x_stride[1] == 1 && a.y_stride[1] == 1) return depthwise_channels(a, filters, act);
  if (plain && whole && a.height * a.width < kSmallPlane) return depthwise_turned(a, filters, act);
  depthwise_planes(a, filters, act);
}

}  // namespace mpq
