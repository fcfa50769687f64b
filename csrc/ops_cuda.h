// What the ops for CUDA tensors share, on top of op_checks.h. No header of CUDA or of torch's CUDA part, and nothing of
// either is needed to load this, so one binary serves every torch.
#pragma once
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/launch.h"
#include "op_checks.h"

using torch::stable::accelerator::DeviceGuard;

// The stream that torch queues its work for `t`'s device on.
inline void* current_stream(const Tensor& t) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* lib = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);  // loaded wherever a CUDA tensor can exist
    return lib ? reinterpret_cast<Get>(dlsym(lib, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(get, "mpqkern: this torch has no aoti_torch_get_current_cuda_stream; wanted torch >= 2.11 with CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(t.get_device_index(), &stream));
  return stream;
}

inline mpq::Type kernel_type(ScalarType t) {
  return t == ScalarType::Float ? mpq::Type::f32 : t == ScalarType::Half ? mpq::Type::f16 : mpq::Type::bf16;
}

inline void check_launch(const char* op, int error) {
  STD_TORCH_CHECK(error == 0, op, ": CUDA error ", error, ", ", mpq_cuda_error(error));
}

// A CUDA kernel is chosen when any argument is there; the argument whose device is guarded has to be.
inline void check_cuda(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cuda(), op, ": ", name, " is on ", device_of(t), "; wanted cuda, where another argument is");
}
