// From the packed format to the layout of fragments.h, and back. A thread makes one lane's 16 bytes, or one packed
// byte; a warp reads one 32-byte sector of each of a tile's 16 rows.
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "fragments.h"
#include "launch.h"

namespace {

using namespace mpq;

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1 << 16;  // threads stride to what lies beyond

template <int bits>
__global__ void to_fragments(const uint8_t* packed, int64_t n, int64_t kp, uint4* out) {
  const int64_t deep = tiles_deep(kp, bits), count = strips(n) * deep * 32, row_bytes = packed_bytes(kp, bits);
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    const int64_t tile = i / 32, n0 = tile / deep * kStrip, k0 = tile % deep * tile_depth(bits);
    uint32_t words[4] = {};
#pragma unroll
    for (int word = 0; word < 4; ++word) {
#pragma unroll
      for (int shift = 0; shift < 32; shift += bits) {
        const Place at = place_in_tile(bits, int(i % 32), word, shift);
        if (n0 + at.row < n && k0 + at.k < kp)
          words[word] |= uint32_t(get_code(packed + (n0 + at.row) * row_bytes, k0 + at.k, bits)) << shift;
      }
    }
    out[i] = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

template <int bits>
__global__ void from_fragments(const uint32_t* fragments, int64_t n, int64_t kp, uint8_t* out) {
  constexpr int kPerByte = 8 / bits;
  const int64_t row_bytes = packed_bytes(kp, bits), count = n * row_bytes;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    uint8_t made = 0;
#pragma unroll
    for (int j = 0; j < kPerByte; ++j) {
      const Spot from = spot_of(bits, kp, i / row_bytes, i % row_bytes * kPerByte + j);
      or_code(&made, j, bits, uint8_t(fragments[from.word] >> from.shift) & max_code(bits));
    }
    out[i] = made;
  }
}

unsigned blocks_for(int64_t count) { return unsigned(std::min(ceil_div(count, kThreads), kMostBlocks)); }

template <class Kernel, class... Arguments>
int launch(Kernel kernel, int64_t count, void* stream, Arguments... arguments) {
  if (count == 0) return cudaSuccess;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks_for(count));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace

int mpq_to_fragments(const uint8_t* packed, int64_t n, int64_t kp, int bits, void* out, void* stream) {
  const int64_t count = fragment_words(n, kp, bits) / 4;
  auto* to = static_cast<uint4*>(out);
  if (bits == 2) return launch(to_fragments<2>, count, stream, packed, n, kp, to);
  if (bits == 4) return launch(to_fragments<4>, count, stream, packed, n, kp, to);
  if (bits == 8) return launch(to_fragments<8>, count, stream, packed, n, kp, to);
  return cudaErrorInvalidValue;
}

int mpq_from_fragments(const void* fragments, int64_t n, int64_t kp, int bits, uint8_t* out, void* stream) {
  const int64_t count = n * packed_bytes(kp, bits);
  const auto* from = static_cast<const uint32_t*>(fragments);
  if (bits == 2) return launch(from_fragments<2>, count, stream, from, n, kp, out);
  if (bits == 4) return launch(from_fragments<4>, count, stream, from, n, kp, out);
  if (bits == 8) return launch(from_fragments<8>, count, stream, from, n, kp, out);
  return cudaErrorInvalidValue;
}
