// conv2d with one input channel a group: its weights, and along what its vectors run.
#include "depthwise.h"

#include <algorithm>
#include <cstring>

#include "block.h"
#include "parallel.h"

namespace mpq {
namespace {

constexpr int64_t kSmallPlane = 256;  // planes of fewer pixels are turned for floats, too
constexpr int64_t kRowsAtOnce = 64;   // of the weight

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

Filters::Filters(const ConvArgs& a) : count(a.weight.k), scale(a.weight.n), bias(a.weight.n), zero(a.weight.n) {
  const Packed& w = a.weight;
  for (int64_t n = 0; n < w.n; ++n)  // of one variant, rows are channels: no division for each
    bias[n] = a.variants > 1 ? Target(a, n).bias(a) : a.bias ? a.bias[n] : 0;
  if (a.act8) load_grids(w, scale, zero);
  // A zero of whole halves leaves integers of twice the size, and one sum serves.
  for (int64_t n = 0; a.act8 && n < (w.zero_each ? w.n : 1); ++n)
    centered &= zero[n] >= 0 && zero[n] <= 255 && 2 * zero[n] == int(2 * zero[n]);
  if (!a.act8) std::fill_n(static_cast<float*>(scale), w.n, 1.0f);
  for (int64_t n = 0; a.act8 && centered && n < w.n; ++n) {
    scale[n] /= 2;
    most = std::max({most, 2 * zero[n], 2 * (float(max_code(w.bits)) - zero[n])});
  }
}

void Filters::decode(const ConvArgs& a) {
  const Packed& w = a.weight;
  taps.resize(w.n * count);
  parallel_for(ceil_div(w.n, kRowsAtOnce), ceil_div(kConvGrain, kRowsAtOnce * w.kp), [&](int64_t begin, int64_t end) {
    Buffer<float> room(a.act8 || a.floats ? 0 : kRowsAtOnce * w.kp), grid(2 * w.groups);
    Buffer<uint8_t> codes(a.act8 ? kRowsAtOnce * w.kp : 0);
    for (int64_t n0 = begin * kRowsAtOnce; n0 < std::min(w.n, end * kRowsAtOnce); n0 += kRowsAtOnce) {
      const int64_t n1 = std::min(w.n, n0 + kRowsAtOnce);
      if (a.act8) {
        kernels().unpack(w.row(n0), w.bits, codes, (n1 - n0) * w.kp);  // rows follow each other without a gap
        for (int64_t n = n0; n < n1; ++n)
          for (int64_t k = 0; k < count; ++k)
            taps[n * count + k] = float(each() * codes[(n - n0) * w.kp + k] - offset(n));
      } else {
        const Block rows = fp32_block(w, a.floats, n0, n1, 0, w.kp, room, w.kp, grid);
        for (int64_t n = n0; n < n1; ++n)
          std::memcpy(&taps[n * count], rows.data + (n - n0) * rows.ld, count * sizeof(float));
      }
    }
  });
}

bool takes_depthwise(const ConvArgs& a) {
  return a.groups > 1 && a.in_channels == a.groups && (!a.act8 || (a.weight.groups == 1 && a.weight.k <= kExactTaps));
}

namespace {
// One result a channel, and a vector of channels: these may run along vectors.
bool is_plain(const ConvArgs& a) { return a.weight.n == a.groups && a.groups >= kWidest; }
bool is_last(const ConvArgs& a) { return is_plain(a) && a.x_stride[1] == 1 && a.y_stride[1] == 1; }
}  // namespace

bool depthwise_takes_bytes(const ConvArgs& a) { return is_last(a); }

void conv_depthwise(const ConvArgs& a) {
  Filters filters(a);
  const bool plain = is_plain(a), last = is_last(a), quads = plain && takes_quads(a, filters);
  const bool whole = a.x_stride[3] == 1 && a.x_stride[2] == a.width && a.y_stride[3] == 1;  // planes in one piece
  const bool turned = !last && plain && whole && (quads || a.height * a.width < kSmallPlane);
  const int64_t reach = (a.kernel[0] - 1) * a.dilation[0] + 1;
  const int64_t last_row = (a.out_height - 1) * a.stride[0] - a.padding[0] + reach;
  const Scales8 scales(a, a.stride[0] <= reach && last_row >= a.height);
  Spoiled spoiled(a.act8 ? a.batch : 0);
  if (quads && (last || turned)) {
    depthwise_quads(a, filters, turned, scales, spoiled);
  } else {
    filters.decode(a);
    if (last || turned)
      depthwise_floats(a, filters, turned, scales, spoiled);
    else
      depthwise_planes(a, filters, scales, spoiled);
  }
  spoiled.fill(a);
}

}  // namespace mpq
