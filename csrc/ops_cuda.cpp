// torch.ops.mpqkern.* for CUDA tensors: the way from checked arguments to csrc/cuda/launch.h. No header of CUDA
// or of torch's CUDA part, and nothing of either is needed to load this, so one binary serves every torch.
#include <torch/csrc/stable/library.h>

#include "ops_cuda.h"

namespace {

Tensor pack_cuda(const Tensor& codes, int64_t bits) {
  const char* op = "mpqkern::pack";
  check_codes(op, codes, bits);
  const DeviceGuard guard(codes.get_device_index());
  const Tensor c = dense(codes);
  const int64_t n = c.size(0), k = c.size(1);
  Tensor out = torch::stable::new_empty(c, {n, mpq::packed_bytes(mpq::padded(k), int(bits))});
  check_launch(op, mpq_pack(static_cast<const uint8_t*>(c.const_data_ptr()), n, k, int(bits),
                            static_cast<uint8_t*>(out.mutable_data_ptr()), current_stream(c)));
  return out;
}

Tensor unpack_cuda(const Tensor& qweight, int64_t bits, int64_t k) {
  const char* op = "mpqkern::unpack";
  check_qweight(op, qweight, bits, k);
  const DeviceGuard guard(qweight.get_device_index());
  const Tensor q = dense(qweight);
  Tensor out = torch::stable::new_empty(q, {q.size(0), k});
  check_launch(op, mpq_unpack(static_cast<const uint8_t*>(q.const_data_ptr()), q.size(0), k, int(bits),
                              static_cast<uint8_t*>(out.mutable_data_ptr()), current_stream(q)));
  return out;
}

Tensor dequantize_cuda(const Tensor& qweight, const Tensor& scales, const OptionalTensor& zeros, int64_t bits,
                       int64_t group_size, int64_t k) {
  const char* op = "mpqkern::dequantize";
  check_cuda(op, "qweight", qweight);
  const DeviceGuard guard(qweight.get_device_index());
  const HeldWeight w = packed_weight(op, "qweight", qweight, qweight, scales, zeros, bits, group_size, k);
  Tensor out = torch::stable::new_empty(qweight, {w.view.n, k}, ScalarType::Float);
  check_launch(op, mpq_dequantize(w.view, static_cast<float*>(out.mutable_data_ptr()), current_stream(qweight)));
  return out;
}

}  // namespace

// linear is bound in ops_cuda_linear.cpp, conv2d in ops_cuda_conv.cpp, what scores call in ops_cuda_analysis.cpp;
// mpqkern/plain.py serves what has no kernel here.
STABLE_TORCH_LIBRARY_IMPL(mpqkern, CUDA, m) {
  m.impl("pack", TORCH_BOX(&pack_cuda));
  m.impl("unpack", TORCH_BOX(&unpack_cuda));
  m.impl("dequantize", TORCH_BOX(&dequantize_cuda));
}
