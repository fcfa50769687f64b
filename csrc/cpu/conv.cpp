// conv2d: which way a convolution takes. The choice depends on shapes, the weight and the instruction set, so a result
// never depends on the number of threads.
#include <algorithm>
#include <cstring>
#include <limits>

#include "buffer.h"
#include "conv.h"

namespace mpq {

namespace {

// Floats in place of bytes, for ways that know only those.
void by_floats(ConvArgs a) {
  const int64_t in = a.in_channels * a.height * a.width, out = a.weight.n * a.out_height * a.out_width;
  Buffer<float> x(a.x8 ? a.batch * in : 0), y(a.y8 ? a.batch * out : 0);
  int8_t* const y8 = a.y8;
  if (a.x8) {
    for (int64_t b = 0; b < a.batch; ++b) {
      const bool spoiled = a.x8[b * in] == kSpoiled;
      const float scale = spoiled ? std::numeric_limits<float>::quiet_NaN() : *a.act_scale.values;
      for (int64_t i = b * in; i < (b + 1) * in; ++i) x[i] = scale * a.x8[i];
    }
    a.x = x, a.x8 = nullptr;
  }
  if (y8) a.y = y, a.y8 = nullptr;
  conv2d(a);
  for (int64_t b = 0; y8 && b < a.batch; ++b)
    if (!kernels().round_bytes(y + b * out, out, 1, out, a.y8_scale, y8 + b * out, out))
      std::fill_n(y8 + b * out, out, kSpoiled);
}

}  // namespace

void conv2d(const ConvArgs& a) {
  if (a.pixels() == 0 || a.weight.n == 0) return;
  if (a.bytes() && takes_depthwise(a) && !depthwise_takes_bytes(a)) return by_floats(a);
  if (takes_depthwise(a)) return conv_depthwise(a);
  if (a.act8) return conv_a8(a);
  if (takes_planes(a)) return conv_planes(a);
  conv_dense(a);
}

void probe_conv2d(const ConvArgs& a) {
  ConvArgs all = a;
  all.weight.n = a.variants * a.weight.n;
  const int64_t group = a.weight.n / a.groups * a.weight.k;  // weights of one variant
  Buffer<float> stacked(a.groups > 1 ? all.weight.n * a.weight.k : 0);
  if (a.groups > 1) {  // [variant][group] -> [group][variant]: more rows for each patch
    for (int64_t g = 0; g < a.groups; ++g)
      for (int64_t v = 0; v < a.variants; ++v)
        std::memcpy(stacked + (g * a.variants + v) * group, a.floats + (v * a.groups + g) * group,
                    group * sizeof(float));
    all.floats = stacked;
  }
  conv2d(all);
}

}  // namespace mpq
