// conv2d on CUDA: its task, which kernel serves what, and launchers. Host code only.
#pragma once
#include "linear.h"

namespace mpq {

// y = conv2d(x, weight) + bias, sums in fp32. Sizes, padded, are below kMostSide. Strides are in elements, in the order
// batch, channel, row, column.
struct ConvTask {
  Packed weight;
  const void* x = nullptr;
  const float* bias = nullptr;
  void* y = nullptr;
  int64_t batch = 0, in_channels = 0, height = 0, width = 0, out_height = 0, out_width = 0, groups = 1;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t x_stride[4], y_stride[4];
  int type = 0;  // a Type: of x and y

  MPQ_HD int64_t pixels() const { return batch * out_height * out_width; }
};

constexpr int64_t kMostSide = int64_t(1) << 29;

// What serves a convolution. cast: torch's own, on the dequantized weight.
enum class ConvKernel { cast, depthwise, tiles, halves };

// own: not torch's where it can be helped, whose products of fp32 may be TF32.
inline ConvKernel conv_kernel(const ConvTask& a, bool own) {
  for (int i = 0; i < 2; ++i) {
    const int64_t side = i ? a.width : a.height;
    if (side >= kMostSide || a.padding[i] >= kMostSide || a.stride[i] >= kMostSide || a.dilation[i] >= kMostSide)
      return ConvKernel::cast;
  }
  if (a.groups > 1 && a.in_channels == a.groups) return ConvKernel::depthwise;
  // Few results for a weight: it had better not go to memory and back as floats. A model, not a measurement.
  if (!own && a.pixels() > 512) return ConvKernel::cast;
  return Type(a.type) == Type::f32 ? ConvKernel::tiles : ConvKernel::halves;
}

}  // namespace mpq

extern "C" {

// For groups == in_channels; any number of results a channel.
int mpq_conv_depthwise(const mpq::ConvTask& task, void* stream);
// For all convolutions: implicit GEMMs, of fp32 by multiply-adds, and of fp16 and bf16 on tensor cores.
int mpq_conv_tiles(const mpq::ConvTask& task, void* stream);
int mpq_conv_halves(const mpq::ConvTask& task, void* stream);

// out fp32 = what 8-bit activations stand for: each of `batch` samples of `count` values of a Type, rounded to
// -127..127 times its maximum / 127, or times `fixed` where that is not null. `most` holds a number a sample, 0 before.
int mpq_round_images(const void* x, int type, int64_t batch, int64_t count, const float* fixed, uint32_t* most,
                     float* out, void* stream);
}
