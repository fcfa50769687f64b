// torch.ops.mpqkern.*: every schema, and for CPU tensors the way from checked arguments to raw pointers. No
// arithmetic. LibTorch Stable ABI only, so one binary serves torch >= 2.11.
#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>
#include <vector>

#include "cpu/drivers.h"
#include "cpu/parallel.h"
#include "op_checks.h"

using torch::headeronly::MemoryFormat;

namespace mpq {

void run_parallel(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}
int64_t thread_count() { return torch::stable::get_num_threads(); }

}  // namespace mpq

namespace {

bool is_float(ScalarType t) { return t == ScalarType::Float || t == ScalarType::Half || t == ScalarType::BFloat16; }

mpq::Float float_type(ScalarType t) {
  return t == ScalarType::Float ? mpq::Float::f32 : t == ScalarType::Half ? mpq::Float::f16 : mpq::Float::bf16;
}

void check_act_bits(const char* op, const std::optional<int64_t>& act_bits) {
  STD_TORCH_CHECK(!act_bits || *act_bits == 8, op, ": act_bits=", act_bits.value_or(0), "; wanted None or 8");
}

// The bias as contiguous fp32, or nothing.
OptionalTensor float_bias(const char* op, const Tensor& x, const OptionalTensor& bias, int64_t n) {
  if (!bias) return {};
  check_device(op, "bias", *bias, "x", x);
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, op, ": bias is ", describe(*bias), "; wanted [", n, "]");
  STD_TORCH_CHECK(is_float(bias->scalar_type()) || bias->scalar_type() == ScalarType::Double, op,
                  ": bias is not of a float type; wanted floats");
  return dense(as_type(*bias, ScalarType::Float));
}

const float* floats(const OptionalTensor& t) { return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr; }

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
  STD_TORCH_CHECK(weight.dim() == 2 && is_float(weight.scalar_type()) && weight.size(1) > 0, op, ": weight is ",
                  describe(weight), "; wanted float32, float16 or bfloat16 [N, K], K at least 1");
  STD_TORCH_CHECK(search == "minmax" || search == "mse", op, ": search='", search, "'; wanted 'minmax' or 'mse'");
  STD_TORCH_CHECK(scale_dtype == "float16" || scale_dtype == "float32", op, ": scale_dtype='", scale_dtype,
                  "'; wanted 'float16' or 'float32'");
  const Tensor w = dense(as_type(weight, ScalarType::Float));
  const int64_t n = w.size(0), k = w.size(1), kp = mpq::padded(k), group = checked_group(op, group_size, kp);
  const int64_t groups = mpq::ceil_div(kp, group);
  const bool half = scale_dtype == "float16";
  const ScalarType type = half ? ScalarType::Half : ScalarType::Float;
  Tensor packed = torch::stable::new_empty(w, {n, mpq::packed_bytes(kp, int(bits))}, ScalarType::Byte);
  Tensor scales = torch::stable::new_empty(w, {n, groups}, type);
  Tensor zeros = symmetric ? torch::stable::new_empty(w, {1}, type) : torch::stable::new_empty(w, {n, groups}, type);
  Tensor errors = torch::stable::new_empty(w, {n, groups}, ScalarType::Float);
  mpq::QuantizeArgs args;
  args.weight = static_cast<const float*>(w.const_data_ptr());
  args.n = n, args.k = k, args.group = group;
  args.how = {int(bits), symmetric, search == "mse", half};
  args.packed = static_cast<uint8_t*>(packed.mutable_data_ptr());
  args.scales = scales.mutable_data_ptr();
  args.zeros = zeros.mutable_data_ptr();
  args.errors = static_cast<float*>(errors.mutable_data_ptr());
  const int64_t bad = mpq::quantize(args);
  STD_TORCH_CHECK(bad < 0, op, ": row ", bad, " of weight is not finite or too large for ", scale_dtype,
                  " scales; wanted finite weights", half ? " (scale_dtype='float32' allows larger ones)" : "");
  return {packed, scales, zeros, errors};
}

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

Tensor linear_cpu(const Tensor& x, const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros,
                  const OptionalTensor& bias, int64_t bits, int64_t group_size, std::optional<int64_t> act_bits) {
  const char* op = "mpqkern::linear";
  check_act_bits(op, act_bits);
  STD_TORCH_CHECK(x.dim() >= 1 && is_float(x.scalar_type()), op, ": x is ", describe(x),
                  "; wanted float32, float16 or bfloat16 [..., K]");
  const int64_t k = x.size(x.dim() - 1);
  const HeldWeight w = packed_weight(op, "x", x, qweight, scales, zeros, bits, group_size, k);
  const OptionalTensor b = float_bias(op, x, bias, w.view.n);
  const Tensor rows = dense(x);
  std::vector<int64_t> shape(x.dim());
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) m *= shape[i] = x.size(i);
  shape.back() = w.view.n;
  if (!act_bits && dense_wins(x.scalar_type(), m, w.view)) return dense_linear(rows, w.view, b);
  Tensor y = torch::stable::new_empty(rows, shape);
  mpq::LinearArgs args;
  args.weight = w.view;
  args.x = rows.const_data_ptr();
  args.bias = floats(b);
  args.y = y.mutable_data_ptr();
  args.type = float_type(x.scalar_type());
  args.m = m;
  args.act8 = act_bits.has_value();
  mpq::linear(args);
  return y;
}

// Sizes of a convolution stay far from where their products overflow 64 bits.
constexpr int64_t kMostSize = (int64_t(1) << 31) - 1;
constexpr double kMostElements = 1e15;

void check_pair(const char* op, const char* name, const std::vector<int64_t>& v, int64_t least) {
  STD_TORCH_CHECK(v.size() == 2, op, ": ", name, " has ", v.size(), " numbers; wanted 2");
  for (int64_t i : v)
    STD_TORCH_CHECK(i >= least && i <= kMostSize, op, ": ", name, " holds ", i, "; wanted ", least, "..", kMostSize);
}

// Channels last in, channels last out; everything else gives the default order.
bool channels_last(const Tensor& x) {
  if (x.is_contiguous()) return false;
  int64_t want = 1;
  for (int64_t d : {1, 3, 2, 0}) {
    if (x.size(d) != 1 && x.stride(d) != want) return false;
    want *= x.size(d);
  }
  return true;
}

Tensor conv2d_cpu(const Tensor& x, const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros,
                  const OptionalTensor& bias, int64_t bits, int64_t group_size, std::vector<int64_t> kernel_size,
                  std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                  int64_t groups, std::optional<int64_t> act_bits) {
  const char* op = "mpqkern::conv2d";
  check_act_bits(op, act_bits);
  STD_TORCH_CHECK(x.dim() == 4 && is_float(x.scalar_type()), op, ": x is ", describe(x),
                  "; wanted float32, float16 or bfloat16 [batch, channels, height, width]");
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
  const int64_t k = kernel_size[0] * kernel_size[1] * (x.size(1) / groups);
  const HeldWeight w = packed_weight(op, "x", x, qweight, scales, zeros, bits, group_size, k);
  STD_TORCH_CHECK(w.view.n % groups == 0, op, ": groups=", groups, "; wanted a divisor of qweight's ", w.view.n,
                  " rows");
  int64_t out[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t span = x.size(2 + i) + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1;
    STD_TORCH_CHECK(span >= 0, op, ": x is ", describe(x), ", padded smaller than the kernel; wanted at least ",
                    dilation[i] * (kernel_size[i] - 1) + 1 - 2 * padding[i], " in dimension ", 2 + i);
    out[i] = span / stride[i] + 1;
  }
  const OptionalTensor b = float_bias(op, x, bias, w.view.n);
  const Tensor in = as_type(x, ScalarType::Float);
  Tensor y =
      torch::stable::empty({x.size(0), w.view.n, out[0], out[1]}, ScalarType::Float, std::nullopt, x.device(),
                           std::nullopt, channels_last(x) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  mpq::ConvArgs args;
  args.weight = w.view;
  args.x = static_cast<const float*>(in.const_data_ptr());
  args.bias = floats(b);
  args.y = static_cast<float*>(y.mutable_data_ptr());
  args.batch = x.size(0), args.in_channels = x.size(1), args.height = x.size(2), args.width = x.size(3);
  args.out_height = out[0], args.out_width = out[1], args.groups = groups;
  for (int i = 0; i < 2; ++i) {
    args.kernel[i] = kernel_size[i], args.stride[i] = stride[i];
    args.padding[i] = padding[i], args.dilation[i] = dilation[i];
  }
  for (int i = 0; i < 4; ++i) args.x_stride[i] = in.stride(i), args.y_stride[i] = y.stride(i);
  args.act8 = act_bits.has_value();
  mpq::conv2d(args);
  return as_type(y, x.scalar_type());
}

// The name of the instruction set in use; `want` changes it first ("" leaves it, "best" undoes a choice).
std::string isa(std::string want) {
  if (!want.empty())
    STD_TORCH_CHECK(mpq::use_isa(want == "best" ? "" : want.c_str()), "mpqkern::isa: want='", want,
                    "' is unknown or not to be had on this processor; wanted 'scalar', 'avx2', 'avx512' or 'best'");
  return mpq::kernels().name;
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
      "int? act_bits=None) -> Tensor");
  m.def(
      "conv2d(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, int bits, int group_size, "
      "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, int? act_bits=None) -> Tensor");
  m.def("isa(str want=\"\") -> str");
}

STABLE_TORCH_LIBRARY_IMPL(mpqkern, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack_cpu));
  m.impl("unpack", TORCH_BOX(&unpack_cpu));
  m.impl("dequantize", TORCH_BOX(&dequantize_cpu));
  m.impl("quantize", TORCH_BOX(&quantize_cpu));
  m.impl("linear", TORCH_BOX(&linear_cpu));
  m.impl("conv2d", TORCH_BOX(&conv2d_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(mpqkern, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa)); }
