// Any number of tokens: a block multiplies 128 weight rows by `columns` tokens. Codes, activations and their sums come
// in steps of k through a ring of stages in shared memory (cp.async); 4 x 2 warps take 32 rows by columns / 2 tokens.
//
//   a stage:  codes [8 strips][tiles][32 lanes][16 bytes]
//             x     [columns][step depth], 16-byte pieces of row r at (piece ^ r % 8), so that the eight rows which
//                   ldmatrix reads at a time lie in different banks
//             sums  fp32 [units][columns];  int8: and scales of activations [units][columns]
#pragma once
#include <cuda_runtime.h>

#include <climits>
#include <type_traits>

#include "decode.cuh"
#include "linear.h"
#include "results.cuh"

namespace mpq {
namespace many_kernel {

constexpr int kThreads = 256;
constexpr int kRows = kRowsOfMany, kStrips = kRows / kStrip;
constexpr int kRoom = 99 * 1024;      // bytes of shared memory: what every GPU from sm_80 on has for a block
constexpr int kExactDepth = 1 << 16;  // 255 * 127 * 2^16 < 2^31: int32 sums are exact this far

template <int bits, class T, int columns, bool fine>
struct Shape {
  static constexpr bool kInt8 = std::is_same<T, Int8>::value;
  static constexpr int kDepth = step_depth(bits, kInt8), kTiles = kDepth / tile_depth(bits);
  static constexpr int kElement = kInt8 ? 1 : 2, kRowBytes = kDepth * kElement;
  static constexpr int kUnit = sum_unit(fine, kDepth), kUnits = kDepth / kUnit, kPlanes = kInt8 ? 2 : 1;
  // 64 bytes of a token's activations make two products, between which only bytes can come to a group's end
  static constexpr int kParts = kInt8 && fine ? 2 : 1;
  static constexpr int kCodes = kStrips * kTiles * 512, kX = columns * kRowBytes;
  static constexpr int kStage = kCodes + kX + kPlanes * kUnits * columns * 4;
  static constexpr int kStages = kRoom / kStage < 2 ? 2 : kRoom / kStage > 4 ? 4 : kRoom / kStage;
  static constexpr int kShared = kStages * kStage;
  static_assert(kShared <= kRoom, "two stages at least must fit");
  static_assert(kShared >= columns * kOutLd * 2, "results pass through the stages' memory");
};

// 32 bits hold numbers of strips, tiles, tokens and units; places in memory take 64.
template <class S, int bits, int columns>
__device__ __forceinline__ void load_stage(const LinearTask& a, char* to, int strip0, int token0, int step) {
  const int deep = int(tiles_deep(a.weight.kp, bits)), all_strips = int(strips(a.weight.n));
#pragma unroll 1  // unrolled, these loops would keep more addresses than there are registers
  for (int i = threadIdx.x; i < S::kCodes / 16; i += kThreads) {
    const int strip = strip0 + i / (S::kTiles * 32), tile = step * S::kTiles + i / 32 % S::kTiles;
    const bool there = strip < all_strips && tile < deep;
    const uint4* from = static_cast<const uint4*>(a.fragments);
    ptx::copy16(to + i * 16, there ? from + (int64_t(strip) * deep + tile) * 32 + i % 32 : from, there ? 16 : 0);
  }
  constexpr int kPieces = S::kRowBytes / 16;
#pragma unroll 1
  for (int i = threadIdx.x; i < columns * kPieces; i += kThreads) {
    const int row = i / kPieces, piece = i % kPieces, token = token0 + row;
    const int byte = step * S::kRowBytes + piece * 16, row_bytes = int(a.x_ld) * S::kElement;
    const int valid = token < int(a.m) ? max(0, min(16, row_bytes - byte)) : 0;
    const char* from = static_cast<const char*>(a.x);
    ptx::copy16(to + S::kCodes + row * S::kRowBytes + (piece ^ row % 8) * 16,
                valid ? from + int64_t(token) * row_bytes + byte : from, valid);
  }
  const int units = int(sum_units(a.weight.kp, S::kUnit)), ld = int(a.sums_ld);
#pragma unroll 1
  for (int i = threadIdx.x; i < S::kPlanes * S::kUnits * columns / 4; i += kThreads) {
    const int column = token0 + i % (columns / 4) * 4, line = i / (columns / 4);
    const int unit = line / S::kUnits * units + step * S::kUnits + line % S::kUnits;  // the second plane's follow
    const bool there = column < ld;
    ptx::copy16(to + S::kCodes + S::kX + i * 16, there ? a.sums + int64_t(unit) * ld + column : a.sums, there ? 16 : 0);
  }
}

__device__ __forceinline__ void multiply(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Int8) {
  ptx::mma(d, a, b0, b1);
}
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  ptx::mma(d, a, b0, b1, T());
}

template <int bits, class T, int columns, bool fine>
__global__ void __launch_bounds__(kThreads, columns == 32 ? 2 : 1) kernel(const __grid_constant__ LinearTask a) {
  using S = Shape<bits, T, columns, fine>;
  using Sum = std::conditional_t<S::kInt8, int, float>;
  constexpr int kTokens = columns / 16, kHalves = 2 / S::kParts;  // 8-token tiles of a warp; products in a part
  extern __shared__ __align__(16) char shared[];
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int warp_strip = threadIdx.x / 32 % 4 * 2, warp_token = threadIdx.x / 128 * kTokens * 8;
  const int strip0 = int(blockIdx.y) * kStrips, token0 = int(blockIdx.x) * columns;
  const int steps = int(ceil_div(a.weight.kp, S::kDepth)), first = int(blockIdx.z * a.per_split);
  const int count = min(steps, first + int(a.per_split)) - first;

  const Grid grid(a.weight);
  const bool one = a.weight.groups == 1;
  const int per_group = one ? INT_MAX : int(a.weight.group / S::kUnit), unit0 = first * S::kUnits;
  int group = unit0 / per_group, left = per_group - unit0 % per_group;  // units to the group's end

  Sum acc[2][kTokens][4] = {};
  float total[2][kTokens][4] = {}, sums[kTokens][2] = {};
  const auto close = [&](const float* act_scales) {
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const int64_t row = (strip0 + warp_strip + s) * kStrip + 8 * p + g;
        const float scale = grid.scale(row, group), zero = grid.zero(row, group) + Decode<bits, T>::offset(p);
#pragma unroll
        for (int t = 0; t < kTokens; ++t)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float products = float(acc[s][t][2 * p + j]) * (1 / Decode<bits, T>::unit(p));
            const float of_both = S::kInt8 ? scale * act_scales[warp_token + 8 * t + 2 * c + j] : scale;
            total[s][t][2 * p + j] = fmaf(of_both, fmaf(-zero, sums[t][j], products), total[s][t][2 * p + j]);
            acc[s][t][2 * p + j] = 0;
          }
      }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) sums[t][0] = sums[t][1] = 0;
  };

#pragma unroll
  for (int i = 0; i < S::kStages - 1; ++i) {
    if (i < count) load_stage<S, bits, columns>(a, shared + i * S::kStage, strip0, token0, first + i);
    ptx::commit();
  }
  for (int i = 0; i < count; ++i) {
    ptx::wait<S::kStages - 2>();
    __syncthreads();  // the stage is there for all, and all are done with the one before it
    const int ahead = i + S::kStages - 1;
    if (ahead < count)
      load_stage<S, bits, columns>(a, shared + ahead % S::kStages * S::kStage, strip0, token0, first + ahead);
    ptx::commit();

    const char* stage = shared + i % S::kStages * S::kStage;
    const auto* codes = reinterpret_cast<const uint4*>(stage) + warp_strip * S::kTiles * 32 + lane;
    const char* x = stage + S::kCodes;
    const auto* unit_sums = reinterpret_cast<const float*>(x + S::kX);
    const float* act_scales = unit_sums + S::kUnits * columns;
    uint32_t words[2][4];
#pragma unroll
    for (int part = 0; part < S::kRowBytes / 64 * S::kParts; ++part) {
      const int quad = part / S::kParts,
                block = S::kInt8 ? 2 * part / S::kParts : part;  // the part's first, of 32 codes
      uint32_t left_side[2][kHalves][4];
#pragma unroll
      for (int j = 0; j < kHalves; ++j) {
        const int at = S::kInt8 ? block + j : block, in_tile = at % (tile_depth(bits) / 32);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          if (in_tile == 0 && (S::kInt8 || j == 0)) {
            const uint4 all = codes[(s * S::kTiles + at / (tile_depth(bits) / 32)) * 32];
            words[s][0] = all.x, words[s][1] = all.y, words[s][2] = all.z, words[s][3] = all.w;
          }
          if constexpr (S::kInt8)
            Decode<bits, T>::get(words[s], in_tile, left_side[s][j]);
          else
            Decode<bits, T>::get(words[s], in_tile, j, left_side[s][j]);
        }
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const int row = warp_token + 8 * t + lane % 8;
        uint32_t b[4];
        ptx::ldmatrix(b, x + row * S::kRowBytes + ((4 * quad + lane / 8) ^ row % 8) * 16);
#pragma unroll
        for (int j = 0; j < kHalves; ++j) {
          const int half = S::kParts == 2 ? part % 2 : j;
#pragma unroll
          for (int s = 0; s < 2; ++s) multiply(acc[s][t], left_side[s][j], b[2 * half], b[2 * half + 1], T());
        }
      }
      if (bits == 2 && columns == 128) __syncwarp();  // or loads for all parts are moved here, and registers run out
      const bool step_ends = part == S::kRowBytes / 64 * S::kParts - 1;
      if (!fine && !step_ends) continue;
      const int unit = fine ? block : 0;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const float* sum = unit_sums + unit * columns + warp_token + 8 * t + 2 * c;
        sums[t][0] += sum[0], sums[t][1] += sum[1];
      }
      --left;
      const bool slice_ends = step_ends && i == count - 1;
      const bool overflows = S::kInt8 && step_ends && (i + 1) % (kExactDepth / S::kDepth) == 0;
      if (left == 0 || slice_ends || overflows) close(act_scales + unit * columns);
      if (left == 0) {
        left = per_group;
        group = min(group + 1, grid.groups - 1);  // past Kp there is nothing but zeros
      }
    }
  }
  ptx::wait<0>();
  __syncthreads();

  store_results<kThreads, columns>(a, shared, strip0 * kStrip, token0, [&](const auto& put) {
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int t = 0; t < kTokens; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          put((warp_strip + s) * int(kStrip) + 8 * (i / 2) + g, warp_token + 8 * t + 2 * c + i % 2, total[s][t][i]);
  });
}

template <int bits, class T, int columns, bool fine>
int launch(const LinearTask& task, void* stream) {
  using S = Shape<bits, T, columns, fine>;
  const auto chosen = kernel<bits, T, columns, fine>;
  const int error = cudaFuncSetAttribute(reinterpret_cast<const void*>(chosen),
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, S::kShared);
  if (error) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim =
      dim3(unsigned(ceil_div(task.m, columns)), unsigned(ceil_div(task.weight.n, kRows)), unsigned(task.splits));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = S::kShared;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, chosen, task);
}

}  // namespace many_kernel

template <int bits, class T>
int many(const LinearTask& task, int columns, void* stream) {
  using namespace many_kernel;
  const bool fine = ends_inside(task.weight.group, task.weight.groups, Shape<bits, T, 32, false>::kDepth);
  if (fine) return columns == 32 ? launch<bits, T, 32, true>(task, stream) : launch<bits, T, 64, true>(task, stream);
  if (columns == 32) return launch<bits, T, 32, false>(task, stream);
  if (columns == 64) return launch<bits, T, 64, false>(task, stream);
  return launch<bits, T, 128, false>(task, stream);
}

}  // namespace mpq
