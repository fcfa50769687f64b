// torch.ops.mpqkern.* that look at a model before it is packed, for CPU tensors: from checked arguments to raw
// pointers. Their schemas are in ops.cpp. LibTorch Stable ABI only.
#include <torch/csrc/stable/library.h>

#include "ops_cpu.h"

namespace {

// float64 [L, n, n]
Tensor grams(const char* op, const std::vector<Tensor>& features, bool center) {
  const int64_t n = checked_samples(op, features);
  Tensor out = torch::stable::new_empty(features[0], {int64_t(features.size()), n, n}, ScalarType::Double);
  auto* k = static_cast<double*>(out.mutable_data_ptr());
  for (const Tensor& feature : features) {
    const Tensor x = with_dense_samples(feature);
    mpq::gram({x.const_data_ptr(), float_type(x.scalar_type()), n, x.stride(0)}, x.numel() / n, center, k);
    k += n * n;
  }
  return out;
}

Tensor gram_cpu(std::vector<Tensor> features, bool center) { return grams("mpqkern::gram", features, center); }

Tensor orthogonality_cpu(std::vector<Tensor> features, bool center, bool debiased) {
  const char* op = "mpqkern::orthogonality";
  Tensor k = grams(op, features, center || debiased);
  const int64_t count = k.size(0), n = k.size(1);
  check_debiased(op, n, debiased);
  Tensor out = torch::stable::new_empty(k, {count, count});
  mpq::orthogonality(static_cast<double*>(k.mutable_data_ptr()), count, n, debiased,
                     static_cast<double*>(out.mutable_data_ptr()));
  return out;
}

Tensor probe_errors_cpu(const Tensor& weight, std::vector<int64_t> bits, int64_t group_size, bool symmetric,
                        const Tensor& fractions, std::string scale_dtype) {
  const char* op = "mpqkern::probe_errors";
  const bool half = check_probe_errors(op, weight, bits, fractions, scale_dtype);
  const Tensor w = dense(as_type(weight, ScalarType::Float)), f = dense(fractions);
  check_fractions(op, f);
  const int64_t n = w.size(0), k = w.size(1), kp = mpq::padded(k), group = checked_group(op, group_size, kp);
  Tensor out = torch::stable::new_empty(w, {int64_t(bits.size()), n, mpq::ceil_div(kp, group), f.numel()});
  mpq::ProbeErrorsArgs args;
  args.weight = floats(w);
  args.n = n, args.k = k, args.group = group;
  args.how = {bits.data(), int64_t(bits.size()), floats(f), f.numel(), symmetric, half};
  args.out = new_floats(out);
  check_no_bad_row(op, mpq::probe_errors(args), half);
  return out;
}

// Sizes of a weight that is not packed.
mpq::Packed float_weight(int64_t n, int64_t k) {
  mpq::Packed w;
  w.n = n, w.k = w.kp = k;
  return w;
}

Tensor probe_linear_cpu(const Tensor& x, const Tensor& weights, const OptionalTensor& bias) {
  const char* op = "mpqkern::probe_linear";
  STD_TORCH_CHECK(x.dim() >= 1 && is_float(x.scalar_type()) && x.size(x.dim() - 1) > 0, op, ": x is ", describe(x),
                  "; wanted float32, float16 or bfloat16 [..., K], K at least 1");
  const int64_t k = x.size(x.dim() - 1);
  check_device(op, "weights", weights, "x", x);
  STD_TORCH_CHECK(weights.dim() == 3 && weights.size(2) == k && weights.scalar_type() == x.scalar_type(), op,
                  ": weights is ", describe(weights), "; wanted ", type_name(x.scalar_type()), " [V, N, ", k, "]");
  const int64_t variants = weights.size(0), n = weights.size(1);
  const OptionalTensor b = float_bias(op, x, bias, n);
  const Tensor in = dense(as_type(x, ScalarType::Float)), w = dense(as_type(weights, ScalarType::Float));
  std::vector<int64_t> shape{variants};
  for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
  shape.push_back(n);
  Tensor y = torch::stable::new_empty(x, shape);
  mpq::LinearArgs args;
  args.weight = float_weight(n, k);
  args.x = in.const_data_ptr();
  args.bias = floats(b);
  args.y = y.mutable_data_ptr();
  args.type = float_type(x.scalar_type());
  args.m = in.numel() / k;
  args.floats = floats(w);
  args.variants = variants;
  mpq::probe_linear(args);
  return y;
}

Tensor probe_conv2d_cpu(const Tensor& x, const Tensor& weights, const OptionalTensor& bias, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups) {
  const char* op = "mpqkern::probe_conv2d";
  check_device(op, "weights", weights, "x", x);
  STD_TORCH_CHECK(weights.dim() == 5 && weights.scalar_type() == x.scalar_type(), op, ": weights is ",
                  describe(weights), "; wanted ", type_name(x.scalar_type()),
                  " [V, N, channels of a group, height, width]");
  const int64_t variants = weights.size(0), n = weights.size(1);
  mpq::ConvArgs args = checked_conv(op, x, {weights.size(3), weights.size(4)}, stride, padding, dilation, groups);
  STD_TORCH_CHECK(n % groups == 0, op, ": groups=", groups, "; wanted a divisor of weights' ", n, " rows");
  STD_TORCH_CHECK(weights.size(2) == x.size(1) / groups, op, ": weights is ", describe(weights), "; wanted ",
                  x.size(1) / groups, " channels in dimension 2, for x's ", x.size(1), " in ", groups, " groups");
  const OptionalTensor b = float_bias(op, x, bias, n);
  const Tensor in = as_type(x, ScalarType::Float), w = dense(as_type(weights, ScalarType::Float));
  Tensor y = new_images(x, variants * x.size(0), n, args);
  args.weight = float_weight(n, w.size(2) * w.size(3) * w.size(4));
  args.x = floats(in);
  args.bias = floats(b);
  for (int i = 0; i < 4; ++i) args.x_stride[i] = in.stride(i);
  args.floats = floats(w);
  args.variants = variants;
  mpq::probe_conv2d(args);
  return torch::stable::view(as_type(y, x.scalar_type()), {variants, x.size(0), n, args.out_height, args.out_width});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mpqkern, CPU, m) {
  m.impl("gram", TORCH_BOX(&gram_cpu));
  m.impl("orthogonality", TORCH_BOX(&orthogonality_cpu));
  m.impl("probe_errors", TORCH_BOX(&probe_errors_cpu));
  m.impl("probe_linear", TORCH_BOX(&probe_linear_cpu));
  m.impl("probe_conv2d", TORCH_BOX(&probe_conv2d_cpu));
}
