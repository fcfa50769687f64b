// conv2d on CUDA: its task, which kernel serves what, and launchers. No kernels in here.
#pragma once
#include "../spans.h"
#include "linear.h"

namespace mpq {

// y = conv2d(x, weight) + bias, sums in fp32, or of bytes in int32 over spans. Sizes, padded, are below kMostSide.
// Strides are in elements, in the order batch, channel, row, column.
struct ConvTask {
  Packed weight;
  const void* x = nullptr;
  const float* act_scales = nullptr;  // of 8-bit activations, one a sample: then x is int8
  const float* bias = nullptr;
  void* y = nullptr;
  int64_t batch = 0, in_channels = 0, height = 0, width = 0, out_height = 0, out_width = 0, groups = 1;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t x_stride[4], y_stride[4];
  int type = 0;  // a Type: of y, and of x if it is not int8

  MPQ_HD int64_t pixels() const { return batch * out_height * out_width; }
};

constexpr int64_t kMostSide = int64_t(1) << 29;

// What serves a convolution. cast: torch's own, on the dequantized weight.
enum class ConvKernel { cast, depthwise, tiles, halves, bytes };

constexpr int64_t kExactTaps = 256;  // of a depthwise convolution: 255 * 127 * 256 < 2^24, one span

inline ConvKernel conv_kernel(const ConvTask& a, bool act8) {
  for (int i = 0; i < 2; ++i) {
    const int64_t side = i ? a.width : a.height;
    if (side >= kMostSide || a.padding[i] >= kMostSide || a.stride[i] >= kMostSide || a.dilation[i] >= kMostSide)
      return ConvKernel::cast;
  }
  const bool one_span = a.weight.groups == 1 && a.weight.k <= kExactTaps;
  if (a.groups > 1 && a.in_channels == a.groups && (one_span || !act8)) return ConvKernel::depthwise;
  if (act8) return a.weight.kp < kMostSide ? ConvKernel::bytes : ConvKernel::cast;
  // Few results for a weight: it had better not go to memory and back as floats. A model, not a measurement.
  if (a.pixels() > 512) return ConvKernel::cast;
  return Type(a.type) == Type::f32 ? ConvKernel::tiles : ConvKernel::halves;
}

}  // namespace mpq

extern "C" {

// For groups == in_channels; any number of results a channel. With bytes: up to kExactTaps, of one group.
int mpq_conv_depthwise(const mpq::ConvTask& task, void* stream);
// For all convolutions: implicit GEMMs, of fp32 by multiply-adds, and of fp16, bf16 and bytes on tensor cores. Bytes
// lie channels last; codes start on 16 bytes, and so do images whose groups have a multiple of 16 channels.
int mpq_conv_tiles(const mpq::ConvTask& task, void* stream);
int mpq_conv_halves(const mpq::ConvTask& task, void* stream);
int mpq_conv_bytes(const mpq::ConvTask& task, void* stream);

// q = x, each of `batch` samples [channels][pixels] of a Type rounded to -127..127 times its maximum / 127, or times
// `fixed` where that is not null; in the same order, or [pixels][channels] with `turn`. `most` holds a number a
// sample, 0 before. A sample that is not finite gets the scale NaN, and zeros.
int mpq_round_images(const void* x, int type, int64_t batch, int64_t channels, int64_t pixels, bool turn,
                     const float* fixed, uint32_t* most, int8_t* q, float* scales, void* stream);
}
