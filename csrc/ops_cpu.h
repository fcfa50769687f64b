// What the ops for CPU tensors share, on top of op_checks.h: the way from tensors to csrc/cpu/drivers.h.
#pragma once
#include <vector>

#include "cpu/drivers.h"
#include "op_checks.h"

using torch::headeronly::MemoryFormat;

inline mpq::Float float_type(ScalarType t) {
  return t == ScalarType::Float ? mpq::Float::f32 : t == ScalarType::Half ? mpq::Float::f16 : mpq::Float::bf16;
}

// Scales of 8-bit activations as contiguous fp32 [1] or [groups], or nothing.
inline OptionalTensor checked_scale(const char* op, const char* name, const Tensor& x, const OptionalTensor& scale,
                                    int64_t groups) {
  if (!scale) return {};
  check_device(op, name, *scale, "x", x);
  const int64_t count = scale->dim() == 1 ? scale->size(0) : 0;
  STD_TORCH_CHECK(scale->scalar_type() == ScalarType::Float && (count == 1 || count == groups) && count > 0, op, ": ",
                  name, " is ", describe(*scale), "; wanted float32 [1]",
                  groups > 1 ? " or [" + std::to_string(groups) + "]" : "");
  return dense(*scale);
}

inline OptionalTensor checked_act_scale(const char* op, const Tensor& x, const std::optional<int64_t>& act_bits,
                                        const OptionalTensor& act_scale, int64_t groups) {
  STD_TORCH_CHECK(act_bits || !act_scale, op, ": act_bits=None with an act_scale; wanted 8");
  return checked_scale(op, "act_scale", x, act_scale, groups);
}

inline mpq::FixedScale fixed_scale(const OptionalTensor& t) { return {floats(t), t && t->numel() > 1}; }

// Sizes of a convolution stay far from where their products overflow 64 bits.
constexpr int64_t kMostSize = (int64_t(1) << 31) - 1;
constexpr double kMostElements = 1e15;

inline void check_pair(const char* op, const char* name, const std::vector<int64_t>& v, int64_t least) {
  STD_TORCH_CHECK(v.size() == 2, op, ": ", name, " has ", v.size(), " numbers; wanted 2");
  for (int64_t i : v)
    STD_TORCH_CHECK(i >= least && i <= kMostSize, op, ": ", name, " holds ", i, "; wanted ", least, "..", kMostSize);
}

// Everything about a convolution but its pointers, strides and weight. `bytes`: x may be int8.
inline mpq::ConvArgs checked_conv(const char* op, const Tensor& x, const std::vector<int64_t>& kernel_size,
                                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                  const std::vector<int64_t>& dilation, int64_t groups, bool bytes = false) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(x.dim() == 4 && (bytes ? type == ScalarType::Char || type == ScalarType::Float : is_float(type)), op,
                  ": x is ", describe(x), "; wanted ", bytes ? "int8 or float32" : "float32, float16 or bfloat16",
                  " [batch, channels, height, width]");
  check_pair(op, "kernel_size", kernel_size, 1);
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check_pair(op, "dilation", dilation, 1);
  STD_TORCH_CHECK(groups >= 1 && x.size(1) % groups == 0 && x.size(1) > 0, op, ": groups=", groups,
                  "; wanted a divisor of x's ", x.size(1), " channels");
  STD_TORCH_CHECK(double(kernel_size[0]) * kernel_size[1] * x.size(1) < kMostElements, op,
                  ": kernel_size and x's channels make more than 1e15 weights a row; wanted fewer");
  const double image = (x.size(2) + 2.0 * padding[0]) * (x.size(3) + 2.0 * padding[1]) * x.size(1) * x.size(0);
  STD_TORCH_CHECK(image < kMostElements, op, ": padding makes an input of ", image, " elements; wanted below 1e15");
  STD_TORCH_CHECK(x.size(2) > 0 && x.size(3) > 0, op, ": x is ", describe(x),
                  "; wanted height and width of at least 1");
  mpq::ConvArgs args;
  args.batch = x.size(0), args.in_channels = x.size(1), args.height = x.size(2), args.width = x.size(3);
  args.groups = groups;
  int64_t out[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t span = x.size(2 + i) + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1;
    STD_TORCH_CHECK(span >= 0, op, ": x is ", describe(x), ", padded smaller than the kernel; wanted at least ",
                    dilation[i] * (kernel_size[i] - 1) + 1 - 2 * padding[i], " in dimension ", 2 + i);
    out[i] = span / stride[i] + 1;
    args.kernel[i] = kernel_size[i], args.stride[i] = stride[i];
    args.padding[i] = padding[i], args.dilation[i] = dilation[i];
  }
  args.out_height = out[0], args.out_width = out[1];
  return args;
}

// Channels last in, channels last out; everything else gives the default order.
inline bool channels_last(const Tensor& x) {
  if (x.is_contiguous()) return false;
  int64_t want = 1;
  for (int64_t d : {1, 3, 2, 0}) {
    if (x.size(d) != 1 && x.stride(d) != want) return false;
    want *= x.size(d);
  }
  return true;
}

// Uninitialised fp32 images in the order of x's, whose strides go to args.
inline Tensor new_images(const Tensor& x, int64_t count, int64_t channels, mpq::ConvArgs& args) {
  Tensor y = torch::stable::empty({count, channels, args.out_height, args.out_width}, ScalarType::Float, std::nullopt,
                                  x.device(), std::nullopt,
                                  channels_last(x) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  for (int i = 0; i < 4; ++i) args.y_stride[i] = y.stride(i);
  args.y = new_floats(y);
  return y;
}

// int8 images, channels last.
inline Tensor as_channels_last(const Tensor& x) {
  return channels_last(x) ? x : torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
}
inline Tensor new_byte_images(const Tensor& x, int64_t channels, mpq::ConvArgs& args) {
  Tensor y = torch::stable::empty({x.size(0), channels, args.out_height, args.out_width}, ScalarType::Char,
                                  std::nullopt, x.device(), std::nullopt, MemoryFormat::ChannelsLast);
  for (int i = 0; i < 4; ++i) args.y_stride[i] = y.stride(i);
  args.y8 = static_cast<int8_t*>(y.mutable_data_ptr());
  return y;
}
