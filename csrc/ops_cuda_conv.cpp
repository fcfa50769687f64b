// torch.ops.mpqkern.conv2d for CUDA tensors: the way from checked arguments to csrc/cuda/conv.h. LibTorch Stable ABI
// only; loads without CUDA, as ops_cuda.cpp does.
#include "cuda/conv.h"

#include <torch/csrc/stable/library.h>

#include <array>

#include "ops_cpu.h"
#include "ops_cuda.h"

namespace {

using mpq::ConvKernel;
using mpq::ConvTask;

MemoryFormat form_of(const Tensor& x) {
  return channels_last(x) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// Uninitialised images in the order of x's.
Tensor empty_images(const Tensor& x, int64_t channels, int64_t height, int64_t width, ScalarType type) {
  return torch::stable::empty({x.size(0), channels, height, width}, type, std::nullopt, x.device(), std::nullopt,
                              form_of(x));
}

// 8-bit activations: int8 [batch, channels, height, width], and a scale for each sample.
struct Rounded {
  Tensor q, scales;
};

// In x's order, or channels last wherever that is wanted.
Rounded rounded(const char* op, const Tensor& x, const OptionalTensor& fixed, bool last) {
  const Tensor in = x.is_contiguous() || channels_last(x) ? x : torch::stable::contiguous(x);
  const int64_t batch = in.size(0), channels = in.size(1), height = in.size(2), width = in.size(3);
  const MemoryFormat form = last ? MemoryFormat::ChannelsLast : form_of(in);
  Rounded made{torch::stable::empty({batch, channels, height, width}, ScalarType::Char, std::nullopt, in.device(),
                                    std::nullopt, form),
               torch::stable::new_empty(in, {batch}, ScalarType::Float)};
  Tensor most = torch::stable::new_zeros(in, {batch}, ScalarType::Int);
  const bool turn = last && !channels_last(in);
  check_launch(op, mpq_round_images(
                       in.const_data_ptr(), int(kernel_type(in.scalar_type())), batch, channels, height * width, turn,
                       floats(fixed), static_cast<uint32_t*>(most.mutable_data_ptr()),
                       static_cast<int8_t*>(made.q.mutable_data_ptr()), new_floats(made.scales), current_stream(in)));
  return made;
}

// What they stand for.
Tensor values_of(const Rounded& r) {
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(as_type(r.q, ScalarType::Float)),
                                    from(torch::stable::view(r.scales, {r.scales.size(0), 1, 1, 1}))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul", "Tensor", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

ConvTask task_of(const mpq::ConvArgs& a, const mpq::Packed& w, const Tensor& x, const OptionalTensor& bias) {
  ConvTask task;
  task.weight = w;
  task.bias = floats(bias), task.type = int(kernel_type(x.scalar_type()));
  task.batch = a.batch, task.in_channels = a.in_channels, task.height = a.height, task.width = a.width;
  task.out_height = a.out_height, task.out_width = a.out_width, task.groups = a.groups;
  for (int i = 0; i < 2; ++i) {
    task.kernel[i] = a.kernel[i], task.stride[i] = a.stride[i];
    task.padding[i] = a.padding[i], task.dilation[i] = a.dilation[i];
  }
  return task;
}

// torch's own convolution on the dequantized weight.
Tensor cast_conv2d(const char* op, const ConvTask& task, const Tensor& x, const OptionalTensor& bias) {
  const mpq::Packed& w = task.weight;
  Tensor rows = torch::stable::new_empty(x, {w.n, w.k}, ScalarType::Float);
  check_launch(op, mpq_dequantize(w, new_floats(rows), current_stream(x)));
  // [N][row][column][channel] seen as [N][channel][row][column]
  Tensor weight = torch::stable::view(as_type(rows, x.scalar_type()),
                                      {w.n, task.kernel[0], task.kernel[1], task.in_channels / task.groups});
  weight = torch::stable::transpose(torch::stable::transpose(weight, 1, 3), 2, 3);
  OptionalTensor b;
  if (bias) b = as_type(*bias, x.scalar_type());
  auto pair = [](const int64_t* p) { return std::vector<int64_t>{p[0], p[1]}; };
  using torch::stable::detail::from;
  std::array<StableIValue, 7> stack{from(x),
                                    from(weight),
                                    from(b),
                                    from(pair(task.stride)),
                                    from(pair(task.padding)),
                                    from(pair(task.dilation)),
                                    from(task.groups)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::conv2d", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0]), form_of(x));
}

Tensor conv2d_cuda(const Tensor& x, const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros,
                   const OptionalTensor& bias, int64_t bits, int64_t group_size, std::vector<int64_t> kernel_size,
                   std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                   int64_t groups, std::optional<int64_t> act_bits, const OptionalTensor& act_scale) {
  const char* op = "mpqkern::conv2d";
  check_act_bits(op, act_bits);
  const mpq::ConvArgs sizes = checked_conv(op, x, kernel_size, stride, padding, dilation, groups);
  check_cuda(op, "x", x);
  const DeviceGuard guard(x.get_device_index());
  const int64_t k = kernel_size[0] * kernel_size[1] * (x.size(1) / groups);
  const HeldWeight w = packed_weight(op, "x", x, qweight, scales, zeros, bits, group_size, k);
  STD_TORCH_CHECK(w.view.n % groups == 0, op, ": groups=", groups, "; wanted a divisor of qweight's ", w.view.n,
                  " rows");
  const OptionalTensor b = float_bias(op, x, bias, w.view.n);
  const OptionalTensor fixed = checked_act_scale(op, x, act_bits, act_scale, 1);
  ConvTask task = task_of(sizes, w.view, x, b);
  const ConvKernel kernel = mpq::conv_kernel(task, act_bits.has_value());
  const bool bytes = kernel == ConvKernel::bytes, cast = kernel == ConvKernel::cast;
  Tensor in = x, codes = w.codes;
  std::optional<Rounded> acts;
  if (act_bits) {
    acts = rounded(op, x, fixed, bytes);
    in = cast ? values_of(*acts) : acts->q;
    task.act_scales = floats(acts->scales);
  }
  if (cast) return as_type(cast_conv2d(op, task, in, b), x.scalar_type());
  if (bytes && reinterpret_cast<uintptr_t>(codes.const_data_ptr()) % 16) {  // a part of some larger tensor
    codes = torch::stable::clone(codes);
    task.weight.codes = static_cast<const uint8_t*>(codes.const_data_ptr());
  }
  Tensor y = empty_images(x, w.view.n, task.out_height, task.out_width, x.scalar_type());
  task.x = in.const_data_ptr(), task.y = y.mutable_data_ptr();
  for (int i = 0; i < 4; ++i) task.x_stride[i] = in.stride(i), task.y_stride[i] = y.stride(i);
  if (bytes) {  // torch may name any stride for a dimension of size 1
    const int64_t channels = in.size(1), row = in.size(3) * channels;
    const int64_t last[] = {in.size(2) * row, 1, row, channels};
    std::copy_n(last, 4, task.x_stride);
  }
  const auto launch = bytes                             ? mpq_conv_bytes
                      : kernel == ConvKernel::depthwise ? mpq_conv_depthwise
                      : kernel == ConvKernel::tiles     ? mpq_conv_tiles
                                                        : mpq_conv_halves;
  check_launch(op, launch(task, current_stream(x)));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mpqkern, CUDA, m) { m.impl("conv2d", TORCH_BOX(&conv2d_cuda)); }
