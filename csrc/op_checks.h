// What the ops of every device do with their arguments before a kernel sees them: check them, and turn
// tensors into pointers. LibTorch Stable ABI only; included by the files that bind ops.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "packed.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline const char* type_name(ScalarType t) {
  switch (t) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another type";
  }
}

// The dispatcher costs about a microsecond a call: ask it only for what is not already so.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
inline Tensor as_type(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

inline bool is_float(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Half || t == ScalarType::BFloat16;
}

inline const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
inline const float* floats(const OptionalTensor& t) { return t ? floats(*t) : nullptr; }
inline float* new_floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// Type and shape, as in "float32 [2, 3]".
inline std::string describe(const Tensor& t) {
  std::string s = std::string(type_name(t.scalar_type())) + " [";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

inline std::string device_of(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "another device:") + std::to_string(t.get_device_index());
}

inline void check_device(const char* op, const char* name, const Tensor& t, const char* home_name, const Tensor& home) {
  STD_TORCH_CHECK(t.device() == home.device(), op, ": ", name, " is on ", device_of(t), "; wanted ", device_of(home),
                  ", where ", home_name, " is");
}

inline void check_bits(const char* op, int64_t bits) {
  STD_TORCH_CHECK(bits == 2 || bits == 4 || bits == 8, op, ": bits=", bits, "; wanted 2, 4 or 8");
}

inline void check_act_bits(const char* op, const std::optional<int64_t>& act_bits) {
  STD_TORCH_CHECK(!act_bits || *act_bits == 8, op, ": act_bits=", act_bits.value_or(0), "; wanted None or 8");
}

inline int64_t checked_group(const char* op, int64_t group_size, int64_t kp) {
  STD_TORCH_CHECK(group_size >= 0 && group_size % mpq::kBlock == 0, op, ": group_size=", group_size,
                  "; wanted a multiple of 32, or 0 for the whole row");
  return group_size ? group_size : kp;
}

inline void check_codes(const char* op, const Tensor& codes, int64_t bits) {
  check_bits(op, bits);
  STD_TORCH_CHECK(codes.dim() == 2 && codes.scalar_type() == ScalarType::Byte && codes.size(1) > 0, op, ": codes is ",
                  describe(codes), "; wanted uint8 [N, K], K at least 1");
}

inline void check_qweight(const char* op, const Tensor& qweight, int64_t bits, int64_t k) {
  check_bits(op, bits);
  STD_TORCH_CHECK(k > 0, op, ": k=", k, "; wanted at least 1");
  const int64_t bytes = mpq::packed_bytes(mpq::padded(k), int(bits));
  STD_TORCH_CHECK(qweight.dim() == 2 && qweight.scalar_type() == ScalarType::Byte && qweight.size(1) == bytes, op,
                  ": qweight is ", describe(qweight), "; wanted uint8 [N, ", bytes, "] for k=", k, " at bits=", bits);
}

// The bias as contiguous fp32, or nothing.
inline OptionalTensor float_bias(const char* op, const Tensor& x, const OptionalTensor& bias, int64_t n) {
  if (!bias) return {};
  check_device(op, "bias", *bias, "x", x);
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, op, ": bias is ", describe(*bias), "; wanted [", n, "]");
  STD_TORCH_CHECK(is_float(bias->scalar_type()) || bias->scalar_type() == ScalarType::Double, op,
                  ": bias is not of a float type; wanted floats");
  return dense(as_type(*bias, ScalarType::Float));
}

// A packed weight held by tensors: keeps contiguous copies alive while kernels use the pointers.
struct HeldWeight {
  Tensor codes, scales;
  OptionalTensor zeros;
  mpq::Packed view;
};

// Everything must be where `home` is, the argument called `home_name`.
inline HeldWeight packed_weight(const char* op, const char* home_name, const Tensor& home, const Tensor& qweight,
                                const Tensor& scales, const OptionalTensor& zeros, int64_t bits, int64_t group_size,
                                int64_t k) {
  check_device(op, "qweight", qweight, home_name, home);
  check_device(op, "scales", scales, home_name, home);
  check_qweight(op, qweight, bits, k);
  mpq::Packed w;
  w.bits = int(bits);
  w.k = k;
  w.kp = mpq::padded(k);
  w.n = qweight.size(0);
  w.group = checked_group(op, group_size, w.kp);
  w.groups = mpq::ceil_div(w.kp, w.group);
  const ScalarType type = scales.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::Float, op,
                  ": scales are neither float16 nor float32");
  STD_TORCH_CHECK(scales.dim() == 2 && scales.size(0) == w.n && scales.size(1) == w.groups, op, ": scales is ",
                  describe(scales), "; wanted [", w.n, ", ", w.groups, "] for k=", k, ", group_size=", group_size);
  HeldWeight held{dense(qweight), dense(scales), {}, w};
  held.view.half = type == ScalarType::Half;
  if (zeros) {
    check_device(op, "zeros", *zeros, home_name, home);
    held.view.zero_each = zeros->numel() != 1;
    STD_TORCH_CHECK(zeros->scalar_type() == type, op, ": zeros and scales differ in dtype; wanted the same");
    STD_TORCH_CHECK(!held.view.zero_each || (zeros->dim() == 2 && zeros->size(0) == w.n && zeros->size(1) == w.groups),
                    op, ": zeros is ", describe(*zeros), "; wanted [1] or [", w.n, ", ", w.groups, "]");
    held.zeros = dense(*zeros);
    held.view.zeros = held.zeros->const_data_ptr();
  }
  held.view.codes = static_cast<const uint8_t*>(held.codes.const_data_ptr());
  held.view.scales = held.scales.const_data_ptr();
  return held;
}

// ---- ops that look at a model before it is packed

// A weight and the number type of its scales, as quantize takes them; whether that is fp16.
inline bool check_quantize(const char* op, const Tensor& weight, const std::string& scale_dtype) {
  STD_TORCH_CHECK(weight.dim() == 2 && is_float(weight.scalar_type()) && weight.size(1) > 0, op, ": weight is ",
                  describe(weight), "; wanted float32, float16 or bfloat16 [N, K], K at least 1");
  STD_TORCH_CHECK(scale_dtype == "float16" || scale_dtype == "float32", op, ": scale_dtype='", scale_dtype,
                  "'; wanted 'float16' or 'float32'");
  return scale_dtype == "float16";
}

inline void check_search(const char* op, const std::string& search) {
  STD_TORCH_CHECK(search == "minmax" || search == "mse", op, ": search='", search, "'; wanted 'minmax' or 'mse'");
}

inline void check_no_bad_row(const char* op, int64_t bad, bool half) {
  STD_TORCH_CHECK(bad < 0, op, ": row ", bad, " of weight is not finite or too large for ",
                  half ? "float16" : "float32", " scales; wanted finite weights",
                  half ? " (scale_dtype='float32' allows larger ones)" : "");
}

// Everything about probe_errors but the values of its fractions; whether scales are fp16.
inline bool check_probe_errors(const char* op, const Tensor& weight, const std::vector<int64_t>& bits,
                               const Tensor& fractions, const std::string& scale_dtype) {
  const bool half = check_quantize(op, weight, scale_dtype);
  for (int64_t b : bits) STD_TORCH_CHECK(b >= 1 && b <= 8, op, ": bits holds ", b, "; wanted 1..8");
  check_device(op, "fractions", fractions, "weight", weight);
  STD_TORCH_CHECK(fractions.dim() == 1 && fractions.scalar_type() == ScalarType::Float, op, ": fractions is ",
                  describe(fractions), "; wanted float32 [F]");
  return half;
}

// `f` is dense and on the CPU.
inline void check_fractions(const char* op, const Tensor& f) {
  for (int64_t i = 0; i < f.numel(); ++i)
    STD_TORCH_CHECK(floats(f)[i] > 0 && floats(f)[i] <= 1, op, ": fractions holds ", floats(f)[i],
                    "; wanted above 0, at most 1");
}

// Features of the same samples, whose number it returns.
inline int64_t checked_samples(const char* op, const std::vector<Tensor>& features) {
  constexpr int64_t kMostSamples = 1024;
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
  return n;
}

inline void check_debiased(const char* op, int64_t n, bool debiased) {
  STD_TORCH_CHECK(!debiased || n >= 4, op, ": features hold ", n, " samples; wanted at least 4 with debiased=True");
}

// A feature whose samples are each one dense block, in whatever order their dimensions run: a Gram matrix does not
// depend on it. Copied only where it is not.
inline Tensor with_dense_samples(const Tensor& x) {
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
