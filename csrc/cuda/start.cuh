// Starts kernels, for launchers.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "linear.h"

namespace mpq {

constexpr int64_t kMostBlocks = int64_t(1) << 20;  // fills any GPU; blocks stride to what lies beyond

template <class... Wanted, class... Given>
int start(void (*kernel)(Wanted...), int64_t blocks, int threads, void* stream, const Given&... arguments) {
  if (blocks == 0) return cudaSuccess;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(std::min(blocks, kMostBlocks)));
  config.blockDim = dim3(unsigned(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Calls `f` with a value of the element type.
template <class F>
int with_type(int type, const F& f) {
  switch (Type(type)) {
    case Type::f32:
      return f(float());
    case Type::f16:
      return f(__half());
    case Type::bf16:
      return f(__nv_bfloat16());
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace mpq
