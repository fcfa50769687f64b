// pack, unpack and dequantize: a thread makes one packed byte or one weight. The threads of a warp lie side
// by side along a row, so that a warp loads and stores contiguous memory.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "launch.h"

namespace {

using namespace mpq;

constexpr int kLanes = 32, kRows = 8;         // a block: one warp a row
constexpr int64_t kGridX = 64, kGridY = 512;  // fills any GPU; threads stride to what lies beyond

template <class Body>
__device__ void each(int64_t rows, int64_t columns, const Body& body) {
  const int64_t row_step = int64_t(gridDim.y) * kRows, column_step = int64_t(gridDim.x) * kLanes;
  for (int64_t n = int64_t(blockIdx.y) * kRows + threadIdx.y; n < rows; n += row_step) {
#pragma unroll 1  // unrolled, it would begin with a 64-bit division
    for (int64_t i = int64_t(blockIdx.x) * kLanes + threadIdx.x; i < columns; i += column_step) body(n, i);
  }
}

template <int bits>
__global__ void pack(const uint8_t* codes, int64_t n, int64_t k, uint8_t* out) {
  constexpr int kPerByte = 8 / bits;
  const int64_t bytes = packed_bytes(padded(k), bits);
  each(n, bytes, [&](int64_t row, int64_t byte) {
    uint8_t made = 0;
#pragma unroll
    for (int i = 0; i < kPerByte; ++i) {
      const int64_t at = byte * kPerByte + i;
      // Codes that are too large lose their high bits. An error could only be raised after a wait for the GPU.
      if (at < k) or_code(&made, i, bits, codes[row * k + at] & max_code(bits));
    }
    out[row * bytes + byte] = made;
  });
}

template <int bits>
__global__ void unpack(const uint8_t* packed, int64_t n, int64_t k, uint8_t* out) {
  const int64_t bytes = packed_bytes(padded(k), bits);
  each(n, k, [&](int64_t row, int64_t i) { out[row * k + i] = get_code(packed + row * bytes, i, bits); });
}

__device__ float grid_value(const Packed& w, const void* values, int64_t at) {
  return w.half ? __half2float(static_cast<const __half*>(values)[at]) : static_cast<const float*>(values)[at];
}

template <int bits>
__global__ void dequantize(const Packed w, float* out) {
  each(w.n, w.k, [&](int64_t row, int64_t k) {
    // a group is whole blocks; numbers of blocks fit 32 bits, where division is cheap
    const int64_t at = row * w.groups + uint32_t(k / kBlock) / uint32_t(w.group / kBlock);
    const float zero = w.zeros ? grid_value(w, w.zeros, w.zero_each ? at : 0) : mid_zero(bits);
    // two roundings, never one fused multiply-add: the same bits as on every other path
    out[row * w.k + k] = __fmul_rn(grid_value(w, w.scales, at), __fsub_rn(float(get_code(w.row(row), k, bits)), zero));
  });
}

template <class... Wanted, class... Given>
cudaError_t launch(void (*kernel)(Wanted...), int64_t rows, int64_t columns, void* stream, const Given&... arguments) {
  if (rows == 0) return cudaSuccess;
  cudaLaunchConfig_t config = {};
  config.gridDim =
      dim3(unsigned(std::min(ceil_div(columns, kLanes), kGridX)), unsigned(std::min(ceil_div(rows, kRows), kGridY)));
  config.blockDim = dim3(kLanes, kRows);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Calls `f` with `bits` as a constant.
template <class F>
cudaError_t with_bits(int bits, const F& f) {
  switch (bits) {
    case 2:
      return f(std::integral_constant<int, 2>());
    case 4:
      return f(std::integral_constant<int, 4>());
    case 8:
      return f(std::integral_constant<int, 8>());
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int mpq_pack(const uint8_t* codes, int64_t n, int64_t k, int bits, uint8_t* out, void* stream) {
  return with_bits(bits,
                   [&](auto b) { return launch(pack<b>, n, packed_bytes(padded(k), b), stream, codes, n, k, out); });
}

int mpq_unpack(const uint8_t* packed, int64_t n, int64_t k, int bits, uint8_t* out, void* stream) {
  return with_bits(bits, [&](auto b) { return launch(unpack<b>, n, k, stream, packed, n, k, out); });
}

int mpq_dequantize(const Packed& w, float* out, void* stream) {
  return with_bits(w.bits, [&](auto b) { return launch(dequantize<b>, w.n, w.k, stream, w, out); });
}

const char* mpq_cuda_error(int error) { return cudaGetErrorString(cudaError_t(error)); }
