// torch.ops.mpqkern.* that look at a model before it is packed, for CUDA tensors: the way from checked arguments to
// csrc/cuda/launch.h. LibTorch Stable ABI only; loads without CUDA, as ops_cuda.cpp does.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops_cuda.h"

namespace {

Tensor on_cpu(const Tensor& t) { return torch::stable::to(t, torch::stable::Device(torch::stable::DeviceType::CPU)); }

// The first row of a weight that a kernel found to be bad. To say so, an op has to wait for the GPU.
struct FirstBad {
  Tensor row;
  int64_t n;

  explicit FirstBad(const Tensor& w) : row(torch::stable::new_empty(w, {1}, ScalarType::Long)), n(w.size(0)) {
    torch::stable::fill_(row, double(n));
  }
  int64_t* pointer() { return static_cast<int64_t*>(row.mutable_data_ptr()); }
  void check(const char* op, bool half) const {
    const Tensor here = on_cpu(row);
    const int64_t bad = *static_cast<const int64_t*>(here.const_data_ptr());
    check_no_bad_row(op, bad < n ? bad : -1, half);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_cuda(const Tensor& weight, int64_t bits, int64_t group_size,
                                                         bool symmetric, std::string search, std::string scale_dtype) {
  const char* op = "mpqkern::quantize";
  check_bits(op, bits);
  const bool half = check_quantize(op, weight, scale_dtype);
  check_search(op, search);
  const int64_t n = weight.size(0), k = weight.size(1), kp = mpq::padded(k);
  const int64_t group = checked_group(op, group_size, kp), groups = mpq::ceil_div(kp, group);
  check_cuda(op, "weight", weight);
  const DeviceGuard guard(weight.get_device_index());
  const Tensor w = dense(as_type(weight, ScalarType::Float));
  const ScalarType type = half ? ScalarType::Half : ScalarType::Float;
  Tensor packed = torch::stable::new_empty(w, {n, mpq::packed_bytes(kp, int(bits))}, ScalarType::Byte);
  Tensor scales = torch::stable::new_empty(w, {n, groups}, type);
  Tensor zeros = symmetric ? torch::stable::new_empty(w, {1}, type) : torch::stable::new_empty(w, {n, groups}, type);
  Tensor errors = torch::stable::new_empty(w, {n, groups}, ScalarType::Float);
  FirstBad bad(w);
  check_launch(op, mpq_quantize(floats(w), n, k, group, int(bits), symmetric, search == "mse", half,
                                static_cast<uint8_t*>(packed.mutable_data_ptr()), scales.mutable_data_ptr(),
                                zeros.mutable_data_ptr(), new_floats(errors), bad.pointer(), current_stream(w)));
  bad.check(op, half);
  return {packed, scales, zeros, errors};
}

Tensor probe_errors_cuda(const Tensor& weight, std::vector<int64_t> bits, int64_t group_size, bool symmetric,
                         const Tensor& fractions, std::string scale_dtype) {
  const char* op = "mpqkern::probe_errors";
  const bool half = check_probe_errors(op, weight, bits, fractions, scale_dtype);
  const int64_t n = weight.size(0), k = weight.size(1), kp = mpq::padded(k);
  const int64_t group = checked_group(op, group_size, kp), count = fractions.size(0), widths = int64_t(bits.size());
  check_cuda(op, "weight", weight);
  const DeviceGuard guard(weight.get_device_index());
  const Tensor w = dense(as_type(weight, ScalarType::Float)), f = dense(fractions);
  check_fractions(op, on_cpu(f));
  Tensor out = torch::stable::new_empty(w, {widths, n, mpq::ceil_div(kp, group), count});
  FirstBad bad(w);
  check_launch(op, mpq_probe_errors(floats(w), n, k, group, bits.data(), widths, floats(f), count, symmetric, half,
                                    new_floats(out), bad.pointer(), current_stream(w)));
  bad.check(op, half);
  return out;
}

// float64 [L, n, n]. The device of features[0] is guarded. Neighbours of one type share launches.
Tensor grams(const char* op, const std::vector<Tensor>& features, int64_t n, bool center) {
  Tensor out = torch::stable::new_empty(features[0], {int64_t(features.size()), n, n}, ScalarType::Double);
  auto* k = static_cast<double*>(out.mutable_data_ptr());
  for (size_t i = 0; i < features.size();) {
    const ScalarType type = features[i].scalar_type();
    std::vector<Tensor> held;  // copies are kept until the launches are under way
    std::vector<mpq::GramFeature> list;
    for (; i < features.size() && features[i].scalar_type() == type; ++i) {
      held.push_back(with_dense_samples(features[i]));
      const Tensor& x = held.back();
      list.push_back({x.const_data_ptr(), x.numel() / n, x.stride(0)});
    }
    const int64_t count = int64_t(list.size());
    Tensor workspace = torch::stable::new_empty(out, {mpq_gram_workspace(list.data(), count, n, 0)});
    check_launch(op, mpq_gram(list.data(), count, int(kernel_type(type)), n, center, 0,
                              static_cast<double*>(workspace.mutable_data_ptr()), k, current_stream(out)));
    k += count * n * n;
  }
  return out;
}

Tensor gram_cuda(std::vector<Tensor> features, bool center) {
  const char* op = "mpqkern::gram";
  const int64_t n = checked_samples(op, features);
  check_cuda(op, "features[0]", features[0]);
  const DeviceGuard guard(features[0].get_device_index());
  return grams(op, features, n, center);
}

Tensor orthogonality_cuda(std::vector<Tensor> features, bool center, bool debiased) {
  const char* op = "mpqkern::orthogonality";
  const int64_t n = checked_samples(op, features), count = int64_t(features.size());
  check_debiased(op, n, debiased);
  check_cuda(op, "features[0]", features[0]);
  const DeviceGuard guard(features[0].get_device_index());
  Tensor k = grams(op, features, n, center || debiased);
  Tensor out = torch::stable::new_empty(k, {count, count}), inner = torch::stable::new_empty(k, {count, count});
  check_launch(op, mpq_orthogonality(static_cast<double*>(k.mutable_data_ptr()), count, n, debiased,
                                     static_cast<double*>(inner.mutable_data_ptr()),
                                     static_cast<double*>(out.mutable_data_ptr()), current_stream(k)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mpqkern, CUDA, m) {
  m.impl("quantize", TORCH_BOX(&quantize_cuda));
  m.impl("probe_errors", TORCH_BOX(&probe_errors_cuda));
  m.impl("gram", TORCH_BOX(&gram_cuda));
  m.impl("orthogonality", TORCH_BOX(&orthogonality_cuda));
}
