// conv2d as an implicit GEMM on tensor cores: fp16 and bf16 activations, weights rounded to their type as torch's own
// product would have them, sums in fp32.
#include "patches.cuh"
#include "ptx.cuh"

namespace {

using namespace mpq;

constexpr int kLine = kDeep + 8;  // values from row to row: 80 bytes, so that 8 rows of a matrix are in different banks
constexpr int kStrip = 16;        // rows of a tile for a warp, of which 4 lie below each other ...
constexpr int kHalf = 32;         // ... and its columns, 2 side by side

template <class T>
struct Shared {
  T patches[kSquare][kLine], weights[kSquare][kLine];
  Pixel pixels[kSquare];
};

template <class T>
struct Rows {
  T (*to)[kLine];

  __device__ void one(int row, int d, T v) const { to[row][d] = v; }
  __device__ void eight(int row, int d, const T (&v)[8]) const {
    uint32_t two[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) two[i] = bits_of(v[2 * i]) | bits_of(v[2 * i + 1]) << 16;
    *reinterpret_cast<uint4*>(&to[row][d]) = make_uint4(two[0], two[1], two[2], two[3]);
  }
  __device__ void eight(int row, int d, const float (&v)[8]) const {
    T rounded[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) rounded[i] = to_type<T>(v[i]);
    eight(row, d, rounded);
  }
};

// sum[t] += left . right^T over kDeep, for 16 rows from `left` on and 8 rows from right + 8 t on.
template <class T>
__device__ void multiply(const T (*left)[kLine], const T (*right)[kLine], float (&sum)[kHalf / 8][4]) {
  const int lane = threadIdx.x % 32, row = lane % 8, matrix = lane / 8;
#pragma unroll
  for (int k = 0; k < kDeep; k += 16) {
    uint32_t a[4];
    ptx::ldmatrix(a, &left[row + 8 * (matrix & 1)][k + 8 * (matrix >> 1)]);
#pragma unroll
    for (int t = 0; t < kHalf / 8; t += 2) {
      uint32_t b[4];
      ptx::ldmatrix(b, &right[8 * t + row + 8 * (matrix >> 1)][k + 8 * (matrix & 1)]);
      ptx::mma(sum[t], a, b[0], b[1], T());
      ptx::mma(sum[t + 1], a, b[2], b[3], T());
    }
  }
}

// last: channels lie side by side, in x and y, and so do the columns of a tile; else pixels do.
template <class T, bool last>
__global__ void __launch_bounds__(kGatherers, 2) halves(const ConvTask a, int64_t across, int64_t down) {
  __shared__ __align__(16) Shared<T> s;
  const Grid grid(a.weight);
  const int warp = threadIdx.x / 32, row = warp % (kSquare / kStrip) * kStrip;
  const int column = warp / (kSquare / kStrip) * kHalf;
  for (int64_t task = blockIdx.x; task < across * down * a.groups; task += gridDim.x) {
    const Part part(a, task, across, down);
    const T* x = static_cast<const T*>(a.x) + part.x;
    __syncthreads();  // the tile before is done
    if (threadIdx.x < kSquare) s.pixels[threadIdx.x] = pixel_at(a, part.m0 + threadIdx.x);
    float sum[kHalf / 8][4] = {};
    for (int64_t k = 0; k < a.weight.k; k += kDeep) {
      __syncthreads();  // the chunk before has been used, the pixels are there
      gather<T, last>(a, x, s.pixels, part.pixels, k, Rows<T>{s.patches});
      dequantize(a.weight, grid, part.n0, part.channels, k, Rows<T>{s.weights});
      __syncthreads();
      multiply(last ? s.patches + row : s.weights + row, last ? s.weights + column : s.patches + column, sum);
    }
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int t = 0; t < kHalf / 8; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = row + g + i / 2 * 8, at = column + 8 * t + 2 * c + i % 2;
        part.store<T>(a, s.pixels, last ? r : at, last ? at : r, sum[t][i]);
      }
  }
}

template <class T>
int start_halves(const ConvTask& a, void* stream) {
  return start_tiles(a.x_stride[1] == 1 ? halves<T, true> : halves<T, false>, a, stream);
}

}  // namespace

int mpq_conv_halves(const ConvTask& a, void* stream) {
  if (Type(a.type) == Type::f16) return start_halves<__half>(a, stream);
  if (Type(a.type) == Type::bf16) return start_halves<__nv_bfloat16>(a, stream);
  return cudaErrorInvalidValue;
}
