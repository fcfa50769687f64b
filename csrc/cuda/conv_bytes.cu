// conv2d as an implicit GEMM of bytes on tensor cores, for 8-bit activations: codes as they are against rounded values,
// sums in int32 over spans, each brought into fp32 as the CPU does it, so that results are the same to the bit.
//
// A block makes 64 output channels by 64 pixels, a warp 32 by 32. Patches and packed codes come in steps of 64 depths
// through a ring of stages; codes that have come are spread to bytes a step ahead, each by the thread that brought it,
// which needs no barrier. In shared memory a step of a row is 64 bytes, whose 16-byte pieces are at
// (piece ^ row / 2 % 4): the eight rows that ldmatrix reads at a time lie in different banks.
#include "patches.cuh"
#include "ptx.cuh"

namespace {

using namespace mpq;

constexpr int kThreads = 128, kStep = 64, kPiece = 16, kPieces = kStep / kPiece, kStages = 4;
constexpr int kWarpTile = 32, kStrips = kWarpTile / 16, kEights = kWarpTile / 8;
constexpr int kBlocks = kStep / int(kBlock);  // of 32 depths, one product each
constexpr int kBetween = kThreads / kPieces,
              kPasses = kSquare / kBetween;  // rows of a thread's pieces, and their count

using Rows = uint8_t (*)[kStep];

template <int bits>
struct Shared {
  uint8_t patches[kStages][kSquare][kStep];
  uint8_t codes[2][kSquare][kStep];
  uint8_t packed[kStages][kPasses][kThreads][kPiece * bits / 8];  // codes, each thread's own
  Pixel pixels[kSquare];
  float scales[kSquare];  // of the pixels' activations
  int sums[2][kSquare];   // of a span's activations, in turn: one is written while others still read the one before
};

__device__ __forceinline__ uint8_t* piece_of(Rows rows, int row, int piece) {
  return rows[row] + (piece ^ row / 2 % kPieces) * kPiece;
}

// 16 packed codes as bytes.
template <int bits>
__device__ __forceinline__ uint4 spread(const uint8_t* packed) {
  if constexpr (bits == 8) {
    return *reinterpret_cast<const uint4*>(packed);
  } else if constexpr (bits == 4) {  // nibbles of a byte follow each other
    const uint2 words = *reinterpret_cast<const uint2*>(packed);
    const uint32_t even = words.x & 0x0f0f0f0f, odd = words.x >> 4 & 0x0f0f0f0f;
    const uint32_t next_even = words.y & 0x0f0f0f0f, next_odd = words.y >> 4 & 0x0f0f0f0f;
    return make_uint4(__byte_perm(even, odd, 0x5140), __byte_perm(even, odd, 0x7362),
                      __byte_perm(next_even, next_odd, 0x5140), __byte_perm(next_even, next_odd, 0x7362));
  } else {  // byte j of field i is code 4j + i
    const uint32_t word = *reinterpret_cast<const uint32_t*>(packed);
    uint32_t field[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) field[i] = word >> 2 * i & 0x03030303;
    const uint32_t a = __byte_perm(field[0], field[1], 0x5140), b = __byte_perm(field[2], field[3], 0x5140);
    const uint32_t c = __byte_perm(field[0], field[1], 0x7362), d = __byte_perm(field[2], field[3], 0x7362);
    return make_uint4(__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632), __byte_perm(c, d, 0x5410),
                      __byte_perm(c, d, 0x7632));
  }
}

// Brings patches, a step at a time from depth 0 on: 16 channels of a tap at once, without a register in between.
// Threads side by side bring pieces of one patch, which in an image with channels last follow each other.
struct ByPieces {
  int channels, channel, row, column, down, right;  // row, column: of the tap, that is dilated by down and right

  __device__ explicit ByPieces(const ConvTask& a)
      : channels(int(a.in_channels / a.groups)), down(int(a.dilation[0])), right(int(a.dilation[1])) {
    const int k = threadIdx.x % kPieces * kPiece, tap = k / channels, columns = int(a.kernel[1]);
    channel = k - tap * channels, row = tap / columns, column = tap - row * columns;
  }
  __device__ __forceinline__ void bring(const ConvTask& a, const int8_t* x, const Pixel* pixels, int count, int,
                                        Rows to) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int m = threadIdx.x / kPieces + i * kBetween;
      const Pixel& p = pixels[m];
      const int y = p.row + row * down, z = p.column + column * right;
      const bool there =
          m < count && row < a.kernel[0] && unsigned(y) < unsigned(a.height) && unsigned(z) < unsigned(a.width);
      const int8_t* from = x + (there ? p.x + y * a.x_stride[2] + z * a.x_stride[3] + channel : 0);
      ptx::copy16(piece_of(to, m, threadIdx.x % kPieces), from, there ? kPiece : 0);
    }
    for (channel += kStep; channel >= channels; channel -= channels)
      if (++column == a.kernel[1]) column = 0, ++row;
  }
};

// The same byte by byte, for any number of channels: each thread 4 depths of some patches.
struct ByBytes {
  static constexpr int kFours = kStep / 4;

  __device__ explicit ByBytes(const ConvTask&) {}
  __device__ __forceinline__ void bring(const ConvTask& a, const int8_t* x, const Pixel* pixels, int count, int step,
                                        Rows to) const {
    const unsigned channels = unsigned(a.in_channels / a.groups), columns = unsigned(a.kernel[1]);
    const int four = threadIdx.x % kFours;
    int64_t offset[4];
    int down[4], right[4];
    bool real[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const unsigned k = unsigned(step * kStep + four * 4 + j), tap = k / channels, row = tap / columns;
      down[j] = int(row * unsigned(a.dilation[0])), right[j] = int((tap - row * columns) * unsigned(a.dilation[1]));
      offset[j] = down[j] * a.x_stride[2] + right[j] * a.x_stride[3] + (k - tap * channels);
      real[j] = k < a.weight.k;
    }
#pragma unroll 2
    for (int m = threadIdx.x / kFours; m < kSquare; m += kThreads / kFours) {
      const Pixel& p = pixels[m];
      const int8_t* from = x + p.x + p.row * a.x_stride[2] + p.column * a.x_stride[3];
      uint32_t word = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool there = m < count && real[j] && unsigned(p.row + down[j]) < unsigned(a.height) &&
                           unsigned(p.column + right[j]) < unsigned(a.width);
        if (there) word |= uint32_t(uint8_t(from[offset[j]])) << 8 * j;
      }
      *reinterpret_cast<uint32_t*>(piece_of(to, m, four / 4) + four % 4 * 4) = word;
    }
  }
};

__device__ __forceinline__ void put(const ConvTask& a, int64_t at, float v) {
  if (Type(a.type) == Type::f16)
    static_cast<__half*>(a.y)[at] = to_type<__half>(v);
  else if (Type(a.type) == Type::bf16)
    static_cast<__nv_bfloat16*>(a.y)[at] = to_type<__nv_bfloat16>(v);
  else
    static_cast<float*>(a.y)[at] = v;
}

// span: blocks of 32 depths whose products are summed as integers.
template <int bits, class Patches>
__global__ void __launch_bounds__(kThreads, 3)
    bytes(const __grid_constant__ ConvTask a, int64_t across, int64_t down, int span) {
  __shared__ __align__(128) Shared<bits> s;
  const Packed& w = a.weight;
  const Grid grid(w);
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int warp_row = threadIdx.x / 32 % 2, warp_column = threadIdx.x / 64;
  const int rows0 = warp_row * kWarpTile, columns0 = warp_column * kWarpTile;
  const int blocks = int(w.kp / kBlock), steps = int(ceil_div(w.kp, kStep)),
            group_blocks = int(min(w.group, w.kp) / kBlock);
  const int my_piece = threadIdx.x % kPieces, my_row = threadIdx.x / kPieces;
  const uint32_t ones[4] = {0x01010101, 0x01010101, 0x01010101, 0x01010101};
  int turn = 0;  // of s.sums
  for (int64_t task = blockIdx.x; task < across * down * a.groups; task += gridDim.x) {
    const Part part(a, task, across, down);
    const int8_t* x = static_cast<const int8_t*>(a.x) + part.x;
    const uint8_t* packed = w.row(part.n0 + my_row) + packed_bytes(my_piece * kPiece, bits);
    __syncthreads();  // the tile before is done
    if (threadIdx.x < kSquare) {
      s.pixels[threadIdx.x] = pixel_at(a, part.m0 + threadIdx.x);
      const int64_t sample = (part.m0 + threadIdx.x) / (a.out_height * a.out_width);
      s.scales[threadIdx.x] = a.act_scales[sample < a.batch ? sample : 0];
    }
    __syncthreads();

    Patches patches(a);
    const auto bring = [&](int step) {
      const int stage = step % kStages;
      patches.bring(a, x, s.pixels, part.pixels, step, s.patches[stage]);
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const bool there = my_row + i * kBetween < part.channels && step * kStep + my_piece * kPiece < w.kp;
        const int64_t at = i * kBetween * packed_bytes(w.kp, bits) + packed_bytes(step * kStep, bits);
        ptx::copy<kPiece * bits / 8>(s.packed[stage][i][threadIdx.x], there ? packed + at : w.codes, there);
      }
    };
    const auto unpack = [&](int step) {
#pragma unroll
      for (int i = 0; i < kPasses; ++i)
        *reinterpret_cast<uint4*>(piece_of(s.codes[step % 2], my_row + i * kBetween, my_piece)) =
            spread<bits>(s.packed[step % kStages][i][threadIdx.x]);
    };

    int acc[kStrips][kEights][4] = {}, act_sums[kEights / 2][4] = {};  // the other half is another warp's
    float total[kStrips][kEights][4] = {};
    int group = 0, in_group = group_blocks, left = min(span, group_blocks);  // blocks to the group's and span's end
    const auto close = [&] {
      if (g == 0)
#pragma unroll
        for (int t = 0; t < kEights / 2; ++t)
#pragma unroll
          for (int j = 0; j < 2; ++j) s.sums[turn][columns0 + 8 * (2 * warp_row + t) + 2 * c + j] = act_sums[t][j];
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kStrips; ++i)
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          const int64_t row = part.n0 + rows0 + 16 * i + 8 * p + g;
          const float scale = grid.scale(row, group), zero = grid.zero(row, group);
#pragma unroll
          for (int t = 0; t < kEights; ++t)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const int column = columns0 + 8 * t + 2 * c + j;
              const float centred = fmaf(-zero, float(s.sums[turn][column]), float(acc[i][t][2 * p + j]));
              float& sum = total[i][t][2 * p + j];
              sum = fmaf(__fmul_rn(centred, scale), s.scales[column], sum);
              acc[i][t][2 * p + j] = 0;
            }
        }
#pragma unroll
      for (int t = 0; t < kEights / 2; ++t)
#pragma unroll
        for (int j = 0; j < 4; ++j) act_sums[t][j] = 0;
      turn ^= 1;
    };

#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < steps) bring(i);
      ptx::commit();
    }
    ptx::wait<kStages - 2>();
    unpack(0);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      __syncthreads();  // the step is there for all, and all are done with the one before it
      if (step + kStages - 1 < steps) bring(step + kStages - 1);
      ptx::commit();
      const Rows codes = s.codes[step % 2], acts = s.patches[step % kStages];
#pragma unroll 1
      for (int block = 0; block < kBlocks && step * kBlocks + block < blocks; ++block) {
        uint32_t left_side[kStrips][4];
#pragma unroll
        for (int i = 0; i < kStrips; ++i)
          ptx::ldmatrix(left_side[i], piece_of(codes, rows0 + 16 * i + lane % 16, 2 * block + lane / 16));
#pragma unroll
        for (int t = 0; t < kEights; t += 2) {
          uint32_t b[4];
          ptx::ldmatrix(b, piece_of(acts, columns0 + 8 * t + lane % 8 + lane / 16 * 8, 2 * block + lane / 8 % 2));
#pragma unroll
          for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int i = 0; i < kStrips; ++i) ptx::mma(acc[i][t + j], left_side[i], b[2 * j], b[2 * j + 1]);
            if (t / 2 == warp_row) ptx::mma(act_sums[j], ones, b[2 * j], b[2 * j + 1]);
          }
        }
        if (--left > 0) continue;
        close();
        in_group -= span;
        if (in_group <= 0) {  // past Kp there is nothing
          group = min(group + 1, grid.groups - 1);
          in_group = group_blocks;
        }
        left = min(span, min(in_group, blocks - step * kBlocks - block - 1));
      }
      ptx::wait<kStages - 2>();
      if (step + 1 < steps) unpack(step + 1);
    }
    ptx::wait<0>();

#pragma unroll
    for (int i = 0; i < kStrips; ++i)
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const int row = rows0 + 16 * i + 8 * p + g;
        const float bias = a.bias && row < part.channels ? a.bias[part.n0 + row] : 0;
#pragma unroll
        for (int t = 0; t < kEights; ++t)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int column = columns0 + 8 * t + 2 * c + j;
            if (row < part.channels && column < part.pixels)
              put(a, s.pixels[column].y + (part.n0 + row) * a.y_stride[1], total[i][t][2 * p + j] + bias);
          }
      }
  }
}

template <int bits>
int start_bytes(const ConvTask& a, void* stream) {
  const int64_t across = ceil_div(a.pixels(), kSquare), down = ceil_div(a.weight.n / a.groups, kSquare);
  const int span = int(Spans(a.weight).length / kBlock);
  const auto kernel = a.in_channels / a.groups % kPiece ? bytes<bits, ByBytes> : bytes<bits, ByPieces>;
  return start(kernel, across * down * a.groups, kThreads, stream, a, across, down, span);
}

}  // namespace

int mpq_conv_bytes(const ConvTask& a, void* stream) {
  if (!a.act_scales || a.x_stride[1] != 1) return cudaErrorInvalidValue;
  if (a.weight.n == 0) return cudaSuccess;
  switch (a.weight.bits) {
    case 2:
      return start_bytes<2>(a, stream);
    case 4:
      return start_bytes<4>(a, stream);
    case 8:
      return start_bytes<8>(a, stream);
  }
  return cudaErrorInvalidValue;
}
