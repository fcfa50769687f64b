// Gram matrices of fp16 and bf16 features by tensor cores. A block has a tile of entries and a slice of the columns, 64
// of which at a time lie in shared memory, [rows][64], 16-byte pieces of row r at (piece ^ r % 8), so that the eight
// rows which ldmatrix reads at a time lie in different banks. A warp has 16 x 32 entries.
//
// Exactness: products of two 16-bit numbers are exact in fp32. A tensor core adds m of them, m >= 8 here, to a sum at
// a time, and drops what is below 2^-23 of the largest (Fasi et al. 2021): m + 1 numbers, then their sum, lose less
// than 2 u each, u = 2^-24. For 64 columns these are 64 / m (m + 2) 2 u <= 160 u of the sum of |x_i x_j|. Eight such
// sums are added in fp32, 8 u more, and from there on in fp64: an entry is within 168 u of the sum of |x_i x_j|.
#include "convert.cuh"
#include "gram.cuh"
#include "ptx.cuh"
#include "start.cuh"
#include "tile.cuh"

namespace {

using namespace mpq;

constexpr int kDeep = 64, kPieces = kDeep / 8;  // columns in shared memory, and their pieces of 16 bytes
static_assert(kSum % kDeep == 0, "fp32 sums end with chunks");

template <int kTile>
using Chunk = uint4[kTile * kPieces];

template <class T, int kTile>
struct Pieces {
  static constexpr int kThreads = tile_threads(kTile), kMine = kTile * kPieces / kThreads;
  uint4 v[kMine];

  __device__ void load(const Samples<T>& s, int row, int k, bool wide) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int at = threadIdx.x + i * kThreads;
      const int r = row + at / kPieces, first = k + at % kPieces * 8;
      uint32_t words[4] = {};
      if (r < s.n) load8(s.x + int64_t(r) * s.stride + first, 0, s.columns - first, wide, words);
      v[i] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
  __device__ void store(Chunk<kTile>& to) const {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int at = threadIdx.x + i * kThreads, r = at / kPieces;
      to[r * kPieces + (at % kPieces ^ r % 8)] = v[i];
    }
  }
};

template <class T, int kTile>
__global__ void __launch_bounds__(tile_threads(kTile), kTile == 64 ? 2 : 6)
    products(const __grid_constant__ Features features, double* partial) {
  __shared__ __align__(16) Chunk<kTile> a, b;
  __shared__ double total[16][tile_threads(kTile)];  // each thread's own, for which registers are too few
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row0 = warp % (kTile / 16) * 16, column0 = warp / (kTile / 16) * 32;
  const int64_t tasks = features.slices() * features.tiles;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t slice = task / features.tiles;
    const Samples<T> s(features, features.of_slice(slice), slice);
    const bool wide = s.stride % 8 == 0 && reinterpret_cast<uint64_t>(s.x) % 16 == 0;
    int ti, tj;
    tile_at(int(task - slice * features.tiles), &ti, &tj);
    const bool apart = kTile > 32 && ti != tj;  // up to 32 samples are one tile
    const uint4* right = apart ? b : a;
#pragma unroll
    for (int i = 0; i < 16; ++i) total[i][threadIdx.x] = 0;
    Pieces<T, kTile> rows, columns;
    const auto load = [&](int k) {
      rows.load(s, ti * kTile, k, wide);
      if (apart) columns.load(s, tj * kTile, k, wide);
    };
    load(0);
    for (int k0 = 0; k0 < s.columns; k0 += kSum) {
      float sum[4][4] = {};
#pragma unroll 1
      for (int k = k0; k < k0 + kSum && k < s.columns; k += kDeep) {
        __syncthreads();  // the chunk before has been read
        rows.store(a);
        if (apart) columns.store(b);
        __syncthreads();
        load(k + kDeep);  // in flight meanwhile
        float acc[4][4] = {};
#pragma unroll
        for (int f = 0; f < kDeep / 16; f += 2) {  // 32 columns
          uint32_t left[2][4], both[4];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int r = row0 + lane % 16;
            ptx::ldmatrix(left[h], &a[r * kPieces + ((2 * (f + h) + lane / 16) ^ r % 8)]);
          }
#pragma unroll
          for (int t = 0; t < 4; ++t) {
            const int r = column0 + 8 * t + lane % 8;
            ptx::ldmatrix(both, &right[r * kPieces + ((2 * f + lane / 8) ^ r % 8)]);
            ptx::mma(acc[t], left[0], both[0], both[1], T());
            ptx::mma(acc[t], left[1], both[2], both[3], T());
          }
        }
#pragma unroll
        for (int t = 0; t < 4; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[t][i] += acc[t][i];
      }
#pragma unroll
      for (int t = 0; t < 4; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) total[4 * t + i][threadIdx.x] += double(sum[t][i]);
    }
    double* out = partial + task * kTile * kTile;
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = row0 + lane / 4 + 8 * (i / 2), column = column0 + 8 * t + lane % 4 * 2 + i % 2;
        out[row * kTile + column] = total[4 * t + i][threadIdx.x];
      }
  }
}

}  // namespace

template <class T>
int mpq::half_products(const Features& features, int side, double* partial, void* stream) {
  const auto kernel = side == 32 ? products<T, 32> : products<T, 64>;
  return start(kernel, features.slices() * features.tiles, tile_threads(side), stream, features, partial);
}

template int mpq::half_products<__half>(const Features&, int, double*, void*);
template int mpq::half_products<__nv_bfloat16>(const Features&, int, double*, void*);
