// Up to 16 tokens: a warp takes 16 rows of the weight and a slice of k straight from memory to registers, one wide
// load a tile, the next loads under way while it multiplies. A block's 8 warps share the slice's activations, laid out
// in shared memory as the B fragments that mma.sync expects.
#pragma once
#include <cuda_runtime.h>

#include <climits>

#include "convert.cuh"
#include "decode.cuh"
#include "linear.h"

namespace mpq {
namespace few_kernel {

constexpr int kThreads = 256, kWarps = 8;
constexpr int kDepth = 1024, kBlocks = kDepth / 32;  // k's in shared memory at a time
constexpr int kAhead = 4;                            // tiles under way

template <int tiles>  // of 8 tokens
struct Staged {
  uint4 x[kBlocks][tiles][32];    // [lane]: word 2f + h holds k = 16f + 8h + 2c, + 1 of token g
  float sums[kBlocks][tiles][8];  // [token], over the 32 k's
};

// Stages k0 .. k0 + 32 * blocks; a lane takes 8 k's of a token.
template <class T, int tiles>
__device__ void stage(const LinearTask& a, Staged<tiles>& to, int64_t k0, int64_t end, int blocks, bool wide) {
  const int lane = threadIdx.x % 32, g = lane / 4, eighth = lane % 4;
  for (int i = threadIdx.x / 32; i < blocks * tiles; i += kWarps) {
    const int block = i / tiles, t = i % tiles, token = 8 * t + g;
    uint32_t v[4] = {};
    if (token < a.m) load8(static_cast<const T*>(a.x) + token * a.x_ld, k0 + 32 * block + 8 * eighth, end, wide, v);
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) sum += low<T>(v[j]) + high<T>(v[j]);
    sum += __shfl_xor_sync(0xffffffff, sum, 1);
    sum += __shfl_xor_sync(0xffffffff, sum, 2);
    if (eighth == 0) to.sums[block][t][g] = sum;
    // each pair of g's begins with another c, so that the 32 words of one store lie in 32 banks
    if (g / 2 % 2) {
      const uint32_t first = v[0];
      v[0] = v[1], v[1] = v[2], v[2] = v[3], v[3] = first;
    }
    if (g / 4) {
      const uint32_t first = v[0], second = v[1];
      v[0] = v[2], v[1] = v[3], v[2] = first, v[3] = second;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) reinterpret_cast<uint32_t*>(&to.x[block][t][4 * g + (j + g / 2) % 4])[eighth] = v[j];
  }
}

template <int bits, class T, int tiles, bool fine>
__global__ void __launch_bounds__(kThreads, 2) kernel(const __grid_constant__ LinearTask a) {
  constexpr int kTile = tile_depth(bits), kUnit = fine ? 32 : kTile, kTilesStaged = kDepth / kTile;
  __shared__ Staged<tiles> staged;
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int64_t strip = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const bool mine = strip < strips(a.weight.n);
  const int deep = int(tiles_deep(a.weight.kp, bits)), first = int(blockIdx.y * a.per_split);
  const int last = min(deep, first + int(a.per_split));
  const int64_t end = min(a.weight.k, int64_t(last) * kTile);
  const bool wide = a.x_ld % 8 == 0 && reinterpret_cast<uint64_t>(a.x) % 16 == 0;
  const uint4* codes = static_cast<const uint4*>(a.fragments) + strip * deep * 32 + lane;

  const Grid grid(a.weight);
  const bool one = a.weight.groups == 1;
  const int per_group = one ? INT_MAX : int(a.weight.group / kUnit), unit = first * (kTile / kUnit);
  int group = unit / per_group, left = per_group - unit % per_group;  // units to the group's end

  // two sums, so that one mma.sync need not wait for the one before
  float acc[2][tiles][4] = {}, total[tiles][4] = {}, sums[tiles][2] = {};
  const auto close_group = [&] {
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      const int64_t row = strip * kStrip + 8 * p + g;
      const float scale = grid.scale(row, group), zero = grid.zero(row, group) + Decode<bits, T>::offset(p);
#pragma unroll
      for (int t = 0; t < tiles; ++t)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float products = (acc[0][t][2 * p + j] + acc[1][t][2 * p + j]) * (1 / Decode<bits, T>::unit(p));
          total[t][2 * p + j] = fmaf(scale, fmaf(-zero, sums[t][j], products), total[t][2 * p + j]);
          acc[0][t][2 * p + j] = acc[1][t][2 * p + j] = 0;
        }
    }
#pragma unroll
    for (int t = 0; t < tiles; ++t) sums[t][0] = sums[t][1] = 0;
  };
  const auto fetch = [&](int tile) {
    return mine && tile < last ? ptx::load_once(codes + int64_t(tile) * 32) : make_uint4(0, 0, 0, 0);
  };

  uint4 next[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) next[i] = fetch(first + i);
  for (int at = first; at < last; at += kAhead) {
    const int in = (at - first) % kTilesStaged;
    if (in == 0) {
      __syncthreads();
      const int rest = (last - at + kAhead - 1) / kAhead * kAhead;
      stage<T, tiles>(a, staged, int64_t(at) * kTile, end, min(kTilesStaged, rest) * (kTile / 32), wide);
      __syncthreads();
    }
    uint4 now[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      now[i] = next[i];
      next[i] = fetch(at + kAhead + i);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const uint32_t words[4] = {now[i].x, now[i].y, now[i].z, now[i].w};
#pragma unroll
      for (int block = 0; block < kTile / 32; ++block) {
        const int from = (in + i) * (kTile / 32) + block;
        uint32_t left_half[4], right_half[4];
        Decode<bits, T>::get(words, block, 0, left_half);
        Decode<bits, T>::get(words, block, 1, right_half);
#pragma unroll
        for (int t = 0; t < tiles; ++t) {
          const uint4 x = staged.x[from][t][lane];
          ptx::mma(acc[0][t], left_half, x.x, x.y, T());
          ptx::mma(acc[1][t], right_half, x.z, x.w, T());
          const float2 sum = *reinterpret_cast<const float2*>(&staged.sums[from][t][2 * c]);
          sums[t][0] += sum.x, sums[t][1] += sum.y;
        }
        if ((fine || block == kTile / 32 - 1) && --left == 0) {
          close_group();
          left = per_group;
          group = min(group + 1, grid.groups - 1);  // past Kp there is nothing but zeros
        }
      }
    }
  }
  close_group();

#pragma unroll
  for (int t = 0; t < tiles; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = strip * kStrip + 8 * (i / 2) + g, token = 8 * t + 2 * c + i % 2;
      if (row >= a.weight.n || token >= a.m) continue;
      if (a.splits > 1)
        a.partial[(blockIdx.y * a.m + token) * a.weight.n + row] = total[t][i];
      else
        static_cast<T*>(a.y)[token * a.weight.n + row] = to_type<T>(total[t][i] + (a.bias ? a.bias[row] : 0));
    }
}

template <int bits, class T, int tiles>
int launch(const LinearTask& task, void* stream) {
  const Packed& w = task.weight;
  constexpr int kTile = tile_depth(bits);
  auto chosen = kernel < bits, T, tiles, bits != 8 > ;  // 8 bits: a tile is as deep as the smallest group
  if (!ends_inside(w.group, w.groups, kTile)) chosen = kernel<bits, T, tiles, false>;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(ceil_div(strips(w.n), kWarps)), unsigned(task.splits));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, chosen, task);
}

}  // namespace few_kernel

template <int bits>
int few(const LinearTask& task, void* stream) {
  const bool one_tile = task.m <= 8;
  if (Type(task.type) == Type::f16)
    return (one_tile ? few_kernel::launch<bits, __half, 1> : few_kernel::launch<bits, __half, 2>)(task, stream);
  return (one_tile ? few_kernel::launch<bits, __nv_bfloat16, 1> : few_kernel::launch<bits, __nv_bfloat16, 2>)(task,
                                                                                                              stream);
}

}  // namespace mpq
