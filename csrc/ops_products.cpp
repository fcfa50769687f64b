// torch.ops.mpqkern.linear and conv2d in all their forms, for CPU tensors: from checked arguments to raw pointers.
// Their schemas are in ops.cpp. LibTorch Stable ABI only.
#include <torch/csrc/stable/library.h>

#include <array>

#include "ops_cpu.h"

namespace {

// Where torch's own product on the dequantized weight is faster than any kernel here: bf16 on processors
// that multiply bf16 themselves, and weights so small that decoding them costs nothing.
bool dense_wins(ScalarType type, int64_t m, const mpq::Packed& w) {
  if (type == ScalarType::BFloat16 && mpq::multiplies_bf16()) return m >= 16;
  return m >= 64 && w.n * w.kp <= 2048;
}

Tensor dense_linear(const Tensor& x, const mpq::Packed& w, const OptionalTensor& bias) {
  const ScalarType type = x.scalar_type();
  Tensor weight = torch::stable::new_empty(x, {w.n, w.k}, ScalarType::Float);
  mpq::dequantize(w, static_cast<float*>(weight.mutable_data_ptr()));
  weight = as_type(weight, type);
  OptionalTensor b;
  if (bias) b = as_type(*bias, type);
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(b)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Codes in the order in which products with 8-bit activations read them.
Tensor fragments_cpu(const Tensor& qweight, int64_t bits, int64_t k) {
  const char* op = "mpqkern::fragments";
  check_qweight(op, qweight, bits, k);
  const Tensor q = dense(qweight);
  mpq::Packed w;
  w.codes = static_cast<const uint8_t*>(q.const_data_ptr());
  w.bits = int(bits), w.n = q.size(0), w.k = k, w.kp = mpq::padded(k);
  Tensor out = torch::stable::new_empty(q, {mpq::panel_bytes(w) / 4}, ScalarType::Int);
  mpq::code_panels(w, static_cast<uint8_t*>(out.mutable_data_ptr()));
  return out;
}

// Of use with 8-bit activations alone; otherwise null.
const uint8_t* checked_panels(const char* op, const Tensor& x, const Tensor* fragments, const mpq::Packed& w,
                              const std::optional<int64_t>& act_bits) {
  if (!fragments) return nullptr;
  check_device(op, "fragments", *fragments, "x", x);
  const int64_t words = mpq::panel_bytes(w) / 4;
  STD_TORCH_CHECK(fragments->scalar_type() == ScalarType::Int && fragments->dim() == 1 && fragments->size(0) == words &&
                      fragments->is_contiguous(),
                  op, ": fragments is ", describe(*fragments), "; wanted contiguous int32 [", words, "]");
  return act_bits ? static_cast<const uint8_t*>(fragments->const_data_ptr()) : nullptr;
}

mpq::Activation checked_activation(const char* op, const std::string& name) {
  constexpr std::pair<const char*, mpq::Activation> kNames[] = {{"relu", mpq::Activation::relu},
                                                                {"relu6", mpq::Activation::relu6},
                                                                {"silu", mpq::Activation::silu},
                                                                {"gelu", mpq::Activation::gelu}};
  for (const auto& [known, activation] : kNames)
    if (name == known) return activation;
  STD_TORCH_CHECK(false, op, ": activation='", name, "'; wanted 'relu', 'relu6', 'silu' or 'gelu'");
}

Tensor multiply(const char* op, const Tensor& x, const Tensor& qweight, const Tensor& scales,
                const OptionalTensor& zeros, const OptionalTensor& bias, int64_t bits, int64_t group_size,
                std::optional<int64_t> act_bits, const OptionalTensor& act_scale, const Tensor* fragments,
                mpq::Activation activation) {
  check_act_bits(op, act_bits);
  STD_TORCH_CHECK(x.dim() >= 1 && is_float(x.scalar_type()), op, ": x is ", describe(x),
                  "; wanted float32, float16 or bfloat16 [..., K]");
  const int64_t k = x.size(x.dim() - 1);
  const HeldWeight w = packed_weight(op, "x", x, qweight, scales, zeros, bits, group_size, k);
  const OptionalTensor b = float_bias(op, x, bias, w.view.n);
  const OptionalTensor fixed = checked_act_scale(op, x, act_bits, act_scale, w.view.groups);
  const Tensor rows = dense(x);
  std::vector<int64_t> shape(x.dim());
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) m *= shape[i] = x.size(i);
  shape.back() = w.view.n;
  if (!act_bits && dense_wins(x.scalar_type(), m, w.view)) {
    Tensor y = dense_linear(rows, w.view, b);
    if (activation != mpq::Activation::none)
      mpq::activate(activation, y.mutable_data_ptr(), float_type(y.scalar_type()), y.numel());
    return y;
  }
  Tensor y = torch::stable::new_empty(rows, shape);
  mpq::LinearArgs args;
  args.weight = w.view;
  args.x = rows.const_data_ptr();
  args.bias = floats(b);
  args.y = y.mutable_data_ptr();
  args.type = float_type(x.scalar_type());
  args.m = m;
  args.act8 = act_bits.has_value();
  args.act_scale = fixed_scale(fixed);
  args.activation = activation;
  args.panels = checked_panels(op, x, fragments, w.view, act_bits);
  mpq::linear(args);
  return y;
}

Tensor linear_cpu(const Tensor& x, const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros,
                  const OptionalTensor& bias, int64_t bits, int64_t group_size, std::optional<int64_t> act_bits,
                  const OptionalTensor& act_scale) {
  return multiply("mpqkern::linear", x, qweight, scales, zeros, bias, bits, group_size, act_bits, act_scale, nullptr,
                  mpq::Activation::none);
}

Tensor linear_fragments_cpu(const Tensor& x, const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros,
                            const OptionalTensor& bias, int64_t bits, int64_t group_size,
                            std::optional<int64_t> act_bits, const OptionalTensor& act_scale, const Tensor& fragments) {
  return multiply("mpqkern::linear_fragments", x, qweight, scales, zeros, bias, bits, group_size, act_bits, act_scale,
                  &fragments, mpq::Activation::none);
}

Tensor linear_activated_cpu(const Tensor& x, const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros,
                            const OptionalTensor& bias, int64_t bits, int64_t group_size,
                            std::optional<int64_t> act_bits, const OptionalTensor& act_scale,
                            const OptionalTensor& fragments, std::string activation) {
  const char* op = "mpqkern::linear_activated";
  return multiply(op, x, qweight, scales, zeros, bias, bits, group_size, act_bits, act_scale,
                  fragments ? &*fragments : nullptr, checked_activation(op, activation));
}

// What a convolution does besides.
struct Besides {
  const Tensor* fragments = nullptr;
  mpq::Activation activation = mpq::Activation::none;
  bool bytes = false;                 // x may be
  const Tensor* out_scale = nullptr;  // results are
};

Tensor convolve(const char* op, const Tensor& x, const Tensor& qweight, const Tensor& scales,
                const OptionalTensor& zeros, const OptionalTensor& bias, int64_t bits, int64_t group_size,
                const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
                std::optional<int64_t> act_bits, const OptionalTensor& act_scale, const Besides& besides) {
  check_act_bits(op, act_bits);
  mpq::ConvArgs args = checked_conv(op, x, kernel_size, stride, padding, dilation, groups, besides.bytes);
  const int64_t k = kernel_size[0] * kernel_size[1] * (x.size(1) / groups);
  const HeldWeight w = packed_weight(op, "x", x, qweight, scales, zeros, bits, group_size, k);
  STD_TORCH_CHECK(w.view.n % groups == 0, op, ": groups=", groups, "; wanted a divisor of qweight's ", w.view.n,
                  " rows");
  const OptionalTensor b = float_bias(op, x, bias, w.view.n);
  const OptionalTensor fixed = checked_act_scale(op, x, act_bits, act_scale, 1);
  const bool bytes = x.scalar_type() == ScalarType::Char;
  const Tensor in = bytes ? as_channels_last(x) : as_type(x, ScalarType::Float);
  if (bytes)
    args.x8 = static_cast<const int8_t*>(in.const_data_ptr());
  else
    args.x = floats(in);
  for (int i = 0; i < 4; ++i) args.x_stride[i] = in.stride(i);
  Tensor y = besides.out_scale ? new_byte_images(x, w.view.n, args) : new_images(in, x.size(0), w.view.n, args);
  if (besides.out_scale) args.y8_scale = *floats(*besides.out_scale);
  args.weight = w.view;
  args.bias = floats(b);
  args.act8 = act_bits.has_value();
  args.act_scale = fixed_scale(fixed);
  args.activation = besides.activation;
  args.panels = checked_panels(op, x, besides.fragments, w.view, act_bits);
  mpq::conv2d(args);
  return bytes || besides.out_scale ? y : as_type(y, x.scalar_type());
}

Tensor conv2d_cpu(const Tensor& x, const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros,
                  const OptionalTensor& bias, int64_t bits, int64_t group_size, std::vector<int64_t> kernel_size,
                  std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                  int64_t groups, std::optional<int64_t> act_bits, const OptionalTensor& act_scale) {
  return convolve("mpqkern::conv2d", x, qweight, scales, zeros, bias, bits, group_size, kernel_size, stride, padding,
                  dilation, groups, act_bits, act_scale, {});
}

Tensor conv2d_fragments_cpu(const Tensor& x, const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros,
                            const OptionalTensor& bias, int64_t bits, int64_t group_size,
                            std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                            std::vector<int64_t> dilation, int64_t groups, std::optional<int64_t> act_bits,
                            const OptionalTensor& act_scale, const Tensor& fragments) {
  return convolve("mpqkern::conv2d_fragments", x, qweight, scales, zeros, bias, bits, group_size, kernel_size, stride,
                  padding, dilation, groups, act_bits, act_scale, {&fragments});
}

Tensor conv2d_activated_cpu(const Tensor& x, const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros,
                            const OptionalTensor& bias, int64_t bits, int64_t group_size,
                            std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                            std::vector<int64_t> dilation, int64_t groups, std::optional<int64_t> act_bits,
                            const OptionalTensor& act_scale, const OptionalTensor& fragments, std::string activation) {
  const char* op = "mpqkern::conv2d_activated";
  return convolve(op, x, qweight, scales, zeros, bias, bits, group_size, kernel_size, stride, padding, dilation, groups,
                  act_bits, act_scale, {fragments ? &*fragments : nullptr, checked_activation(op, activation)});
}

Tensor conv2d_bytes_cpu(const Tensor& x, const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros,
                        const OptionalTensor& bias, int64_t bits, int64_t group_size, std::vector<int64_t> kernel_size,
                        std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                        int64_t groups, const Tensor& act_scale, const OptionalTensor& fragments,
                        std::optional<std::string> activation, const OptionalTensor& out_scale) {
  const char* op = "mpqkern::conv2d_bytes";
  Besides besides{fragments ? &*fragments : nullptr, mpq::Activation::none, true};
  if (activation) besides.activation = checked_activation(op, *activation);
  const OptionalTensor scale = checked_scale(op, "out_scale", x, out_scale, 1);
  if (scale) besides.out_scale = &*scale;
  return convolve(op, x, qweight, scales, zeros, bias, bits, group_size, kernel_size, stride, padding, dilation, groups,
                  8, act_scale, besides);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mpqkern, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear_cpu));
  m.impl("fragments", TORCH_BOX(&fragments_cpu));
  m.impl("linear_fragments", TORCH_BOX(&linear_fragments_cpu));
  m.impl("conv2d", TORCH_BOX(&conv2d_cpu));
  m.impl("conv2d_fragments", TORCH_BOX(&conv2d_fragments_cpu));
  m.impl("linear_activated", TORCH_BOX(&linear_activated_cpu));
  m.impl("conv2d_activated", TORCH_BOX(&conv2d_activated_cpu));
  m.impl("conv2d_bytes", TORCH_BOX(&conv2d_bytes_cpu));
}
