// `linear` for CUDA tensors: which kernels run, on what memory. The layout that they take is made anew in each call of
// `linear`; `linear_fragments` is given it, and modules keep it. An infinity among a token's activations makes all its
// results NaN here, since codes and zeros meet activations apart from each other.
#include <torch/csrc/stable/library.h>

#include <array>

#include "ops_cpu.h"
#include "ops_cuda.h"

namespace {

using mpq::LinearPlan;
using mpq::LinearTask;

Tensor fragments_of(const char* op, const Tensor& codes, int bits, int64_t kp) {
  const int64_t words = mpq::fragment_words(codes.size(0), kp, bits);
  Tensor out = torch::stable::new_empty(codes, {words}, ScalarType::Int);
  check_launch(op, mpq_to_fragments(static_cast<const uint8_t*>(codes.const_data_ptr()), codes.size(0), kp, bits,
                                    out.mutable_data_ptr(), current_stream(codes)));
  return out;
}

Tensor fragments_cuda(const Tensor& qweight, int64_t bits, int64_t k) {
  const char* op = "mpqkern::fragments";
  check_qweight(op, qweight, bits, k);
  const DeviceGuard guard(qweight.get_device_index());
  return fragments_of(op, dense(qweight), int(bits), mpq::padded(k));
}

Tensor dense_linear(const char* op, const Tensor& x, const mpq::Packed& w, const OptionalTensor& bias) {
  Tensor weight = torch::stable::new_empty(x, {w.n, w.k}, ScalarType::Float);
  check_launch(op, mpq_dequantize(w, static_cast<float*>(weight.mutable_data_ptr()), current_stream(x)));
  weight = as_type(weight, x.scalar_type());
  OptionalTensor b;
  if (bias) b = as_type(*bias, x.scalar_type());
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(b)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// What `many` and `warpgroup` read beside the fragments, kept alive until they are queued.
struct Activations {
  Tensor rows, sums;
};

Activations arrange(const char* op, LinearTask& task, const Tensor& x, const LinearPlan& plan) {
  const mpq::Packed& w = task.weight;
  const int64_t step = mpq::step_depth(w.bits, false), pieces = mpq::ceil_div(w.kp, step) * step / 8;
  const int64_t ld = mpq::ceil_div(task.m, plan.columns) * plan.columns;
  const int64_t unit = w.groups == 1 ? plan.per_split * step : w.group, units = w.groups == 1 ? plan.splits : w.groups;
  Activations made{torch::stable::new_empty(x, {ld, 8 * pieces}),
                   torch::stable::new_empty(x, {units, ld}, ScalarType::Float)};
  auto* sums = static_cast<float*>(made.sums.mutable_data_ptr());
  check_launch(op, mpq_arrange(x.const_data_ptr(), task.type, task.m, w.k, unit, units, pieces, plan.columns, sums, ld,
                               made.rows.mutable_data_ptr(), current_stream(x)));
  task.x = made.rows.const_data_ptr();
  task.sums = sums;
  task.sums_ld = ld;
  return made;
}

Activations prepare(const char* op, LinearTask& task, const Tensor& x, const LinearPlan& plan,
                    const OptionalTensor& act_scale) {
  if (plan.kernel == LinearPlan::warpgroup) return arrange(op, task, x, plan);
  const mpq::Packed& w = task.weight;
  const bool int8 = plan.kernel == LinearPlan::many_int8;
  const int step = mpq::step_depth(w.bits, int8);
  const int unit = mpq::sum_unit(mpq::ends_inside(w.group, w.groups, step), step);
  const int64_t ld = mpq::ceil_div(task.m, 4) * 4, units = mpq::sum_units(w.kp, unit);
  Activations made{x, torch::stable::new_empty(x, {int8 ? 2 : 1, units, ld}, ScalarType::Float)};
  auto* sums = static_cast<float*>(made.sums.mutable_data_ptr());
  if (int8) {
    task.x_ld = mpq::ceil_div(w.kp, 128) * 128;
    made.rows = torch::stable::new_empty(x, {task.m, task.x_ld}, ScalarType::Char);
    check_launch(op, mpq_round_rows(x.const_data_ptr(), task.type, w, task.m, floats(act_scale),
                                    act_scale && act_scale->numel() > 1, unit,
                                    static_cast<int8_t*>(made.rows.mutable_data_ptr()), sums, ld, current_stream(x)));
  } else {
    const bool aligned = w.k % 8 == 0 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
    task.x_ld = mpq::ceil_div(w.k, 8) * 8;
    if (!aligned) made.rows = torch::stable::new_empty(x, {task.m, task.x_ld});
    check_launch(op, mpq_row_sums(x.const_data_ptr(), task.type, task.m, w.k, unit, sums, ld,
                                  aligned ? nullptr : made.rows.mutable_data_ptr(), task.x_ld, current_stream(x)));
  }
  task.x = made.rows.const_data_ptr();
  task.sums = sums;
  task.sums_ld = ld;
  return made;
}

Tensor multiply(const char* op, const Tensor& x, const Tensor& qweight, const Tensor& scales,
                const OptionalTensor& zeros, const OptionalTensor& bias, int64_t bits, int64_t group_size,
                std::optional<int64_t> act_bits, const OptionalTensor& act_scale, const OptionalTensor& given) {
  check_act_bits(op, act_bits);
  check_cuda(op, "x", x);
  STD_TORCH_CHECK(x.dim() >= 1 && is_float(x.scalar_type()), op, ": x is ", describe(x),
                  "; wanted float32, float16 or bfloat16 [..., K]");
  const DeviceGuard guard(x.get_device_index());
  const int64_t k = x.size(x.dim() - 1);
  const HeldWeight w = packed_weight(op, "x", x, qweight, scales, zeros, bits, group_size, k);
  const OptionalTensor b = float_bias(op, x, bias, w.view.n);
  const OptionalTensor fixed = checked_act_scale(op, x, act_bits, act_scale, w.view.groups);
  if (given) {
    check_device(op, "fragments", *given, "x", x);
    const int64_t words = mpq::fragment_words(w.view.n, w.view.kp, int(bits));
    STD_TORCH_CHECK(given->scalar_type() == ScalarType::Int && given->is_contiguous() && given->numel() == words, op,
                    ": fragments is ", describe(*given), "; wanted int32 [", words, "]");
  }
  int arch = 0;
  check_launch(op, mpq_arch(x.get_device_index(), &arch));
#ifndef MPQ_WARPGROUPS  // built without 90a, which they take
  if (arch == 90) arch = 89;
#endif
  STD_TORCH_CHECK(arch >= 80, op, ": the GPU is of compute capability ", arch / 10, ".", arch % 10, "; wanted >= 8.0");
  const Tensor rows = dense(x);
  std::vector<int64_t> shape(x.dim());
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) m *= shape[i] = x.size(i);
  shape.back() = w.view.n;
  const LinearPlan plan = mpq::linear_plan(arch, m, w.view.n, k, int(bits), w.view.group,
                                           act_bits ? mpq::Type::int8 : kernel_type(x.scalar_type()));
  Tensor y = torch::stable::new_empty(rows, shape);
  if (m == 0 || w.view.n == 0) return y;
  if (plan.kernel == LinearPlan::dense) return dense_linear(op, rows, w.view, b);

  const Tensor fragments = given ? *given : fragments_of(op, w.codes, int(bits), w.view.kp);
  LinearTask task;
  task.weight = w.view;
  task.fragments = fragments.const_data_ptr();
  task.x = rows.const_data_ptr();
  task.x_ld = k;
  task.bias = floats(b);
  task.y = y.mutable_data_ptr();
  task.m = m;
  task.type = int(kernel_type(x.scalar_type()));
  task.splits = plan.splits;
  task.per_split = plan.per_split;
  OptionalTensor partial;
  if (plan.splits > 1) {
    partial = torch::stable::new_empty(rows, {plan.splits, m, w.view.n}, ScalarType::Float);
    task.partial = new_floats(*partial);
  }
  if (plan.kernel == LinearPlan::few) {
    check_launch(op, mpq_few(task, current_stream(x)));
  } else {
    const Activations made = prepare(op, task, rows, plan, fixed);
    if (plan.kernel == LinearPlan::warpgroup)
      check_launch(op, mpq_warpgroup(task, plan.columns, current_stream(x)));
    else
      check_launch(op, mpq_many(task, plan.columns, plan.kernel == LinearPlan::many_int8, current_stream(x)));
  }
  if (plan.splits > 1) check_launch(op, mpq_join(task, current_stream(x)));
  return y;
}

Tensor linear_cuda(const Tensor& x, const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros,
                   const OptionalTensor& bias, int64_t bits, int64_t group_size, std::optional<int64_t> act_bits,
                   const OptionalTensor& act_scale) {
  return multiply("mpqkern::linear", x, qweight, scales, zeros, bias, bits, group_size, act_bits, act_scale, {});
}

Tensor linear_fragments_cuda(const Tensor& x, const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros,
                             const OptionalTensor& bias, int64_t bits, int64_t group_size,
                             std::optional<int64_t> act_bits, const OptionalTensor& act_scale,
                             const Tensor& fragments) {
  return multiply("mpqkern::linear_fragments", x, qweight, scales, zeros, bias, bits, group_size, act_bits, act_scale,
                  fragments);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mpqkern, CUDA, m) {
  m.impl("fragments", TORCH_BOX(&fragments_cuda));
  m.impl("linear", TORCH_BOX(&linear_cuda));
  m.impl("linear_fragments", TORCH_BOX(&linear_fragments_cuda));
}
