// What the ops of every device do with their arguments before a kernel sees them: check them, and turn
// tensors into pointers. LibTorch Stable ABI only; included by the files that bind ops.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>

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
