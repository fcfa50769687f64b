// torch.ops.mpqkern.*: every schema, and the ops that pack and unpack, for CPU tensors (ops_products.cpp and
// ops_analysis.cpp have the rest): the way from checked arguments to raw pointers. No arithmetic. LibTorch Stable ABI
// only, so one binary serves torch >= 2.11.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/parallel.h"
#include "cuda/linear.h"
#include "ops_cpu.h"

namespace mpq {

void run_parallel(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}
int64_t thread_count() { return torch::stable::get_num_threads(); }

}  // namespace mpq

namespace {

Tensor pack_cpu(const Tensor& codes, int64_t bits) {
  const char* op = "mpqkern::pack";
  check_codes(op, codes, bits);
  const Tensor c = dense(codes);
  const int64_t n = c.size(0), k = c.size(1);
  const auto* p = static_cast<const uint8_t*>(c.const_data_ptr());
  for (int64_t i = 0; i < n * k; ++i)
    STD_TORCH_CHECK(p[i] <= mpq::max_code(int(bits)), op, ": codes holds ", int(p[i]), "; wanted 0..",
                    mpq::max_code(int(bits)), " at bits=", bits);
  Tensor out = torch::stable::new_empty(c, {n, mpq::packed_bytes(mpq::padded(k), int(bits))});
  mpq::pack(p, n, k, int(bits), static_cast<uint8_t*>(out.mutable_data_ptr()));
  return out;
}

Tensor unpack_cpu(const Tensor& qweight, int64_t bits, int64_t k) {
  const char* op = "mpqkern::unpack";
  check_qweight(op, qweight, bits, k);
  const Tensor q = dense(qweight);
  Tensor out = torch::stable::new_empty(q, {q.size(0), k});
  mpq::unpack(static_cast<const uint8_t*>(q.const_data_ptr()), q.size(0), k, int(bits),
              static_cast<uint8_t*>(out.mutable_data_ptr()));
  return out;
}

Tensor dequantize_cpu(const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros, int64_t bits,
                      int64_t group_size, int64_t k) {
  const HeldWeight w =
      packed_weight("mpqkern::dequantize", "qweight", qweight, qweight, scales, zeros, bits, group_size, k);
  Tensor out = torch::stable::new_empty(qweight, {w.view.n, k}, ScalarType::Float);
  mpq::dequantize(w.view, static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_cpu(const Tensor& weight, int64_t bits, int64_t group_size,
                                                        bool symmetric, std::string search, std::string scale_dtype) {
  const char* op = "mpqkern::quantize";
  check_bits(op, bits);
  const bool half = check_quantize(op, weight, scale_dtype);
  check_search(op, search);
  const Tensor w = dense(as_type(weight, ScalarType::Float));
  const int64_t n = w.size(0), k = w.size(1), kp = mpq::padded(k), group = checked_group(op, group_size, kp);
  const int64_t groups = mpq::ceil_div(kp, group);
  const ScalarType type = half ? ScalarType::Half : ScalarType::Float;
  Tensor packed = torch::stable::new_empty(w, {n, mpq::packed_bytes(kp, int(bits))}, ScalarType::Byte);
  Tensor scales = torch::stable::new_empty(w, {n, groups}, type);
  Tensor zeros = symmetric ? torch::stable::new_empty(w, {1}, type) : torch::stable::new_empty(w, {n, groups}, type);
  Tensor errors = torch::stable::new_empty(w, {n, groups}, ScalarType::Float);
  mpq::QuantizeArgs args;
  args.weight = floats(w);
  args.n = n, args.k = k, args.group = group;
  args.how = {int(bits), symmetric, search == "mse", half};
  args.packed = static_cast<uint8_t*>(packed.mutable_data_ptr());
  args.scales = scales.mutable_data_ptr();
  args.zeros = zeros.mutable_data_ptr();
  args.errors = new_floats(errors);
  check_no_bad_row(op, mpq::quantize(args), half);
  return {packed, scales, zeros, errors};
}

// The name of the instruction set in use; `want` changes it first ("" leaves it, "best" undoes a choice).
std::string isa(std::string want) {
  if (!want.empty())
    STD_TORCH_CHECK(
        mpq::use_isa(want == "best" ? "" : want.c_str()), "mpqkern::isa: want='", want,
        "' is unknown or not to be had on this processor; wanted 'scalar', 'avx2', 'avxvnni', 'avx512' or 'best'");
  return mpq::kernels().name;
}

// Which CUDA kernel serves a `linear`: its name, tokens of a block of threads, splits of k. Needs no GPU.
std::tuple<std::string, int64_t, int64_t> linear_plan(int64_t arch, int64_t m, int64_t n, int64_t k, int64_t bits,
                                                      int64_t group_size, std::string dtype,
                                                      std::optional<int64_t> act_bits) {
  const char* op = "mpqkern::linear_plan";
  check_bits(op, bits);
  check_act_bits(op, act_bits);
  STD_TORCH_CHECK(arch >= 80, op, ": arch=", arch, "; wanted 80 or more, 10 * major + minor");
  STD_TORCH_CHECK(m >= 0 && n >= 0 && k >= 1, op, ": m=", m, ", n=", n, ", k=", k, "; wanted m, n >= 0, k >= 1");
  const bool f32 = dtype == "float32", f16 = dtype == "float16";
  STD_TORCH_CHECK(f32 || f16 || dtype == "bfloat16", op, ": dtype='", dtype,
                  "'; wanted 'float32', 'float16' or 'bfloat16'");
  const int64_t group = checked_group(op, group_size, mpq::padded(k));
  const mpq::Type type = act_bits ? mpq::Type::int8 : f32 ? mpq::Type::f32 : f16 ? mpq::Type::f16 : mpq::Type::bf16;
  const mpq::LinearPlan plan = mpq::linear_plan(int(arch), m, n, k, int(bits), group, type);
  return {mpq::name_of(plan.kernel), plan.columns, plan.splits};
}

}  // namespace

STABLE_TORCH_LIBRARY(mpqkern, m) {
  m.def("pack(Tensor codes, int bits) -> Tensor");
  m.def("unpack(Tensor qweight, int bits, int k) -> Tensor");
  m.def("dequantize(Tensor qweight, Tensor scales, Tensor? zeros, int bits, int group_size, int k) -> Tensor");
  m.def(
      "quantize(Tensor weight, int bits, int group_size, bool symmetric, str search=\"minmax\", "
      "str scale_dtype=\"float16\") -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, int bits, int group_size, "
      "int? act_bits=None, Tensor? act_scale=None) -> Tensor");
  m.def("fragments(Tensor qweight, int bits, int k) -> Tensor");
  m.def(
      "linear_fragments(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, int bits, "
      "int group_size, int? act_bits, Tensor? act_scale, Tensor fragments) -> Tensor");
  m.def(
      "conv2d(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, int bits, int group_size, "
      "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, int? act_bits=None, "
      "Tensor? act_scale=None) -> Tensor");
  m.def(
      "conv2d_fragments(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, int bits, "
      "int group_size, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, int? act_bits, "
      "Tensor? act_scale, Tensor fragments) -> Tensor");
  m.def(
      "linear_activated(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, int bits, "
      "int group_size, int? act_bits, Tensor? act_scale, Tensor? fragments, str activation) -> Tensor");
  m.def(
      "conv2d_activated(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, int bits, "
      "int group_size, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, int? act_bits, "
      "Tensor? act_scale, Tensor? fragments, str activation) -> Tensor");
  m.def(
      "conv2d_bytes(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, int bits, int group_size, "
      "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, Tensor act_scale, "
      "Tensor? fragments, str? activation, Tensor? out_scale) -> Tensor");
  m.def("gram(Tensor[] features, bool center=True) -> Tensor");
  m.def("orthogonality(Tensor[] features, bool center=True, bool debiased=False) -> Tensor");
  m.def(
      "probe_errors(Tensor weight, int[] bits, int group_size, bool symmetric, Tensor fractions, "
      "str scale_dtype=\"float16\") -> Tensor");
  m.def("probe_linear(Tensor x, Tensor weights, Tensor? bias=None) -> Tensor");
  m.def(
      "probe_conv2d(Tensor x, Tensor weights, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups) "
      "-> Tensor");
  m.def("isa(str want=\"\") -> str");
  m.def(
      "linear_plan(int arch, int m, int n, int k, int bits, int group_size, str dtype, int? act_bits=None) -> "
      "(str, int, int)");
}

STABLE_TORCH_LIBRARY_IMPL(mpqkern, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack_cpu));
  m.impl("unpack", TORCH_BOX(&unpack_cpu));
  m.impl("dequantize", TORCH_BOX(&dequantize_cpu));
  m.impl("quantize", TORCH_BOX(&quantize_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(mpqkern, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("linear_plan", TORCH_BOX(&linear_plan));
}
