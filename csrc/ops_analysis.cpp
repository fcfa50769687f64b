// torch.ops.mpqkern.* that look at a model before it is packed, for CPU tensors: from checked arguments to raw
// pointers. Their schemas are in ops.cpp. LibTorch Stable ABI only.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "ops_cpu.h"

namespace {

constexpr int64_t kMostSamples = 1024;

// A feature whose samples are each one dense block, in whatever order their dimensions run: a Gram matrix does not
// depend on it. Copied only where it is not.
Tensor with_dense_samples(const Tensor& x) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 1; d < x.dim(); ++d) {
    if (x.size(d) == 0) return x;
    if (x.size(d) != 1) dims.emplace_back(x.stride(d), x.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t want = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != want) return torch::stable::contiguous(x);
    want *= size;
  }
  return x;
}

// float64 [L, n, n]
Tensor grams(const char* op, const std::vector<Tensor>& features, bool center) {
  STD_TORCH_CHECK(!features.empty(), op, ": features is empty; wanted at least one tensor");
  const int64_t n = features[0].dim() > 0 ? features[0].size(0) : 0;
  STD_TORCH_CHECK(n >= 1 && n <= kMostSamples, op, ": features[0] is ", describe(features[0]),
                  "; wanted 1..1024 samples in dimension 0");
  for (size_t i = 0; i < features.size(); ++i) {
    const Tensor& x = features[i];
    const std::string name = "features[" + std::to_string(i) + "]";
    check_device(op, name.c_str(), x, "features[0]", features[0]);
    STD_TORCH_CHECK(is_float(x.scalar_type()) && x.dim() > 0 && x.size(0) == n, op, ": ", name, " is ", describe(x),
                    "; wanted float32, float16 or bfloat16 [", n, ", ...]");
  }
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
  STD_TORCH_CHECK(!debiased || n >= 4, op, ": features hold ", n, " samples; wanted at least 4 with debiased=True");
  Tensor out = torch::stable::new_empty(k, {count, count});
  mpq::orthogonality(static_cast<double*>(k.mutable_data_ptr()), count, n, debiased,
                     static_cast<double*>(out.mutable_data_ptr()));
  return out;
}

Tensor probe_errors_cpu(const Tensor& weight, std::vector<int64_t> bits, int64_t group_size, bool symmetric,
                        const Tensor& fractions, std::string scale_dtype) {
  const char* op = "mpqkern::probe_errors";
  const bool half = check_quantize(op, weight, scale_dtype);
  for (int64_t b : bits) STD_TORCH_CHECK(b >= 1 && b <= 8, op, ": bits holds ", b, "; wanted 1..8");
  check_device(op, "fractions", fractions, "weight", weight);
  STD_TORCH_CHECK(fractions.dim() == 1 && fractions.scalar_type() == ScalarType::Float, op, ": fractions is ",
                  describe(fractions), "; wanted float32 [F]");
  const Tensor w = dense(as_type(weight, ScalarType::Float)), f = dense(fractions);
  for (int64_t i = 0; i < f.numel(); ++i)
    STD_TORCH_CHECK(floats(f)[i] > 0 && floats(f)[i] <= 1, op, ": fractions holds ", floats(f)[i],
                    "; wanted above 0, at most 1");
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mpqkern, CPU, m) {
  m.impl("gram", TORCH_BOX(&gram_cpu));
  m.impl("orthogonality", TORCH_BOX(&orthogonality_cpu));
  m.impl("probe_errors", TORCH_BOX(&probe_errors_cpu));
}
