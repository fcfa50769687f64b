// Many tokens on Hopper: a block multiplies 128 weight rows by `columns` tokens with wgmma, whose left side, the
// weight, comes out of registers. Warps 0..3 and 4..7 are two warpgroups of 64 rows each. Warp 8 copies: it keeps a
// ring of stages in shared memory, each a step of k, ahead of them.
//
//   a stage:  codes [8 strips][tiles][32 lanes][16 bytes]
//             x     [depth / 8 pieces][columns][8 k's], as mpq_arrange makes it: wgmma's blocks of 8 tokens by 16 bytes
//             sums  fp32 [lines][columns] of the groups that end in the step
//
// `full[s]` opens when stage s is there, `empty[s]` when all eight warps are done with it. Everything but sm_90a gets
// an empty kernel, which the launcher refuses to start.
#pragma once
#include <cuda_runtime.h>

#include <climits>

#include "decode.cuh"
#include "linear.h"
#include "results.cuh"

namespace mpq {
namespace warpgroup_kernel {

constexpr int kWarps = 8, kThreads = 32 * (kWarps + 1);
constexpr int kRows = int(kRowsOfMany), kStrips = kRows / int(kStrip);

constexpr int kRoom = 224 * 1024;  // bytes of shared memory, of the 227 KB that a block can have

template <int bits, int columns, bool fine>
struct Shape {
  static constexpr int kDepth = step_depth(bits, false), kTiles = kDepth / tile_depth(bits);
  static constexpr int kRounds = kDepth / 64, kPieces = kDepth / 8;
  static constexpr int kLines =
      fine ? kDepth / int(kBlock) : 1;  // groups that a step can touch: they begin at multiples of 32
  static constexpr int kPieceBytes = columns * 16;
  static constexpr int kCodes = kStrips * kTiles * 512, kX = kPieces * kPieceBytes, kSums = kLines * columns * 4;
  static constexpr int kStage = kCodes + kX + kSums;
  static constexpr int kStages = kRoom / kStage > 8 ? 8 : kRoom / kStage;
  static constexpr int kShared = kStages * kStage;
  static_assert(kStrips * kTiles <= 32, "a tile for each lane to copy");
  static_assert(kStages >= 3 && kShared >= columns * kOutLd * 2, "results pass through the stages' memory");
};

// What splits a block's share of k into stretches with one scale each.
struct Slice {
  int first, count;  // steps
  int group;         // codes; INT_MAX for the whole row
  __device__ explicit Slice(const LinearTask& a, int depth)
      : first(int(blockIdx.z * a.per_split)),
        count(min(int(ceil_div(a.weight.kp, depth)), first + int(a.per_split)) - first),
        group(a.weight.groups == 1 ? INT_MAX : int(a.weight.group)) {}
};

// Past the weight's last strip and tile there is a copy of it: rows that are thrown away, and codes that meet zeros.
template <class S, int bits, int columns>
__device__ __forceinline__ void produce(const LinearTask& a, char* shared, uint64_t* full, uint64_t* empty) {
  const int lane = threadIdx.x % 32;
  const Slice slice(a, S::kDepth);
  const int deep = int(tiles_deep(a.weight.kp, bits)), steps = int(ceil_div(a.weight.kp, S::kDepth));
  const int strip = min(int(blockIdx.y) * kStrips + lane / S::kTiles, int(strips(a.weight.n)) - 1);
  const uint4* codes = static_cast<const uint4*>(a.fragments) + int64_t(strip) * deep * 32;
  const char* x = static_cast<const char*>(a.x) + int64_t(blockIdx.x) * steps * S::kX;
  const float* sums = a.sums + int64_t(blockIdx.x) * columns;
  for (int i = 0; i < slice.count; ++i) {
    const int at = i % S::kStages, step = slice.first + i;
    char* stage = shared + at * S::kStage;
    if (i >= S::kStages) ptx::mbarrier_wait(&empty[at], (i / S::kStages - 1) % 2);
    if (lane == 0) {
      ptx::mbarrier_expect(&full[at], S::kStage);
      ptx::copy_bulk(stage + S::kCodes, x + int64_t(step) * S::kX, S::kX, &full[at]);
    }
    __syncwarp();
    if (lane < kStrips * S::kTiles) {
      const int tile = min(step * S::kTiles + lane % S::kTiles, deep - 1);
      ptx::copy_bulk(stage + lane * 512, codes + tile * 32, 512, &full[at]);
    }
    if (lane < S::kLines) {
      const int group = min(step * S::kDepth / slice.group + lane, int(a.weight.groups) - 1);
      const int64_t line = a.weight.groups == 1 ? blockIdx.z : group;
      ptx::copy_bulk(stage + S::kCodes + S::kX + lane * columns * 4, sums + line * a.sums_ld, columns * 4, &full[at]);
    }
  }
}

// total[4t + 2p + j]: the product of row 8p + g of the warp's strip and token 8t + 2c + j.
template <class S, int bits, class T, int columns, bool fine>
__device__ __forceinline__ void consume(const LinearTask& a, const char* shared, uint64_t* full, uint64_t* empty,
                                        float (&total)[columns / 2]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
  const Slice slice(a, S::kDepth);
  const Grid grid(a.weight);
  const int64_t row = int64_t(blockIdx.y) * kRows + warp * kStrip + g;
  int group = slice.first * S::kDepth / slice.group;
  int left = slice.group - slice.first * S::kDepth % slice.group;  // codes to the group's end

  float acc[columns / 2], scale[2], zero[2];
  uint32_t words[2][4], fragments[2][2][4];
  const auto open = [&] {
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      const int known = min(group, grid.groups - 1);
      scale[p] = grid.scale(row + 8 * p, known) / Decode<bits, T>::unit(p);
      zero[p] = (grid.zero(row + 8 * p, known) + Decode<bits, T>::offset(p)) * Decode<bits, T>::unit(p);
    }
  };
  const auto close = [&](const float* sums) {
#pragma unroll
    for (int i = 0; i < columns / 2; ++i) {
      const float sum = sums[i / 4 * 8 + 2 * c + i % 2], s = scale[i / 2 % 2], z = zero[i / 2 % 2];
      total[i] = fmaf(s, fmaf(-z, sum, acc[i]), total[i]);
    }
  };
  // The codes of a round: 64 of a row, two parts of 32.
  const auto load = [&](const char* stage, int round) {
    const auto* codes = stage + (warp * S::kTiles * 32 + lane) * 16;
    if constexpr (bits == 2) {
      const uint2 half = *reinterpret_cast<const uint2*>(codes + round * 8);
      words[0][0] = half.x, words[0][1] = half.y;
    } else {
#pragma unroll
      for (int tile = 0; tile < S::kTiles; ++tile) {
        const uint4 all = *reinterpret_cast<const uint4*>(codes + tile * 512);
        words[tile][0] = all.x, words[tile][1] = all.y, words[tile][2] = all.z, words[tile][3] = all.w;
      }
    }
  };
  const auto multiply = [&](const char* stage, int round, int part, bool add) {
#pragma unroll
    for (int f = 0; f < 2; ++f)
      Decode<bits, T>::get(words[bits == 8 ? part : 0], bits == 8 ? 0 : part, f, fragments[part][f]);
    ptx::products_begin(fragments[part]);
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      const char* x = stage + S::kCodes + (8 * round + 4 * part + 2 * f) * S::kPieceBytes;
      ptx::products(acc, fragments[part][f], ptx::products_source(x, ptx::kCore, S::kPieceBytes), add || f > 0, T());
    }
    ptx::products_end();
  };
  const auto give_back = [&](int i) {
    __syncwarp();
    if (lane == 0 && i >= 0) ptx::mbarrier_arrive(&empty[i % S::kStages]);
  };

  const auto stage_of = [&](int i) {
    ptx::mbarrier_wait(&full[i % S::kStages], i / S::kStages % 2);
    return shared + i % S::kStages * S::kStage;
  };

  if constexpr (fine) {
    bool add = false;
    open();
    for (int i = 0; i < slice.count; ++i) {
      const char* stage = stage_of(i);
      const auto* sums = reinterpret_cast<const float*>(stage + S::kCodes + S::kX);
      const int first_group = group;
#pragma unroll 1
      for (int round = 0; round < S::kRounds; ++round) {
        load(stage, round);
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          multiply(stage, round, part, add);
          ptx::products_take(acc);
          if (round == 0 && part == 0) give_back(i - 1);
          add = true;
          left -= int(kBlock);
          const bool slice_ends = i == slice.count - 1 && round == S::kRounds - 1 && part == 1;
          if (left > 0 && !slice_ends) continue;
          if (group < grid.groups) close(sums + (group - first_group) * columns);  // past Kp are zeros alone
          ++group, left = slice.group, add = false;
          open();
        }
      }
    }
  } else {
    for (int i = 0; i < slice.count;) {
      const char* stage;
      bool add = false;
      open();
      do {
        stage = stage_of(i);
#pragma unroll 1
        for (int round = 0; round < S::kRounds; ++round) {
          load(stage, round);
#pragma unroll
          for (int part = 0; part < 2; ++part) {
            multiply(stage, round, part, add);
            ptx::products_wait<1>();  // the part before is done, and its fragments can be made anew
            if (round == 0 && part == 0) give_back(i - 1);
            add = true;
          }
        }
        ++i, left -= S::kDepth;
      } while (left > 0 && i < slice.count);
      ptx::products_take(acc);
      close(reinterpret_cast<const float*>(stage + S::kCodes + S::kX));
      ++group, left = slice.group;
    }
  }
}

template <int bits, class T, int columns, bool fine>
__global__ void __launch_bounds__(kThreads, 1) kernel(const __grid_constant__ LinearTask a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = Shape<bits, columns, fine>;
  extern __shared__ __align__(128) char shared[];
  __shared__ uint64_t full[S::kStages], empty[S::kStages];
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      ptx::mbarrier_init(&full[i], 1);
      ptx::mbarrier_init(&empty[i], kWarps);
    }
    ptx::fence_async();
  }
  __syncthreads();
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  float total[columns / 2] = {};
  if (warp == kWarps)
    produce<S, bits, columns>(a, shared, full, empty);
  else
    consume<S, bits, T, columns, fine>(a, shared, full, empty, total);
  __syncthreads();
  store_results<kThreads, columns>(
      a, shared, int64_t(blockIdx.y) * kRows, int64_t(blockIdx.x) * columns, [&](const auto& put) {
        if (warp == kWarps) return;
#pragma unroll
        for (int i = 0; i < columns / 2; ++i)
          put(warp * int(kStrip) + 8 * (i / 2 % 2) + g, i / 4 * 8 + 2 * c + i % 2, total[i]);
      });
#endif
}

template <int bits, class T, int columns, bool fine>
int launch(const LinearTask& task, void* stream) {
  using S = Shape<bits, columns, fine>;
  const auto chosen = kernel<bits, T, columns, fine>;
  if (task.splits > 1 && task.weight.groups > 1 && task.per_split * S::kDepth % task.weight.group != 0)
    return cudaErrorInvalidValue;  // sums are those of whole groups
  cudaFuncAttributes made;
  int error = cudaFuncGetAttributes(&made, reinterpret_cast<const void*>(chosen));
  if (error) return error;
  if (made.sharedSizeBytes == 0) return cudaErrorNoKernelImageForDevice;  // the empty one
  error = cudaFuncSetAttribute(reinterpret_cast<const void*>(chosen), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               S::kShared);
  if (error) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim =
      dim3(unsigned(ceil_div(task.m, columns)), unsigned(ceil_div(task.weight.n, kRows)), unsigned(task.splits));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = S::kShared;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, chosen, task);
}

}  // namespace warpgroup_kernel

template <int bits, class T>
int warpgroup(const LinearTask& task, int columns, void* stream) {
  using namespace warpgroup_kernel;
  const bool fine = ends_inside(task.weight.group, task.weight.groups, Shape<bits, 64, false>::kDepth);
  if (fine) return columns == 64 ? launch<bits, T, 64, true>(task, stream) : launch<bits, T, 128, true>(task, stream);
  return columns == 64 ? launch<bits, T, 64, false>(task, stream) : launch<bits, T, 128, false>(task, stream);
}

}  // namespace mpq
