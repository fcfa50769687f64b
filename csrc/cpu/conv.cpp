// conv2d: which way a convolution takes. The choice depends on shapes alone, so a result never depends on the number
// of threads.
#include <cstring>

#include "buffer.h"
#include "conv.h"

namespace mpq {

void conv2d(const ConvArgs& a) {
  if (a.pixels() == 0 || a.weight.n == 0) return;
  if (takes_depthwise(a)) return conv_depthwise(a);
  if (a.act8) return conv_a8(a);
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
