// orthogonality: inner products of Gram matrices, in fp64 and in orders of their own.
#include "launch.h"
#include "start.cuh"

namespace {

using namespace mpq;

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMostSamples = 1024;

__device__ double plus(double a, double b) { return __dadd_rn(a, b); }
__device__ double higher(double a, double b) { return fmax(a, b); }

template <class F>
__device__ double across(double v, const F& join) {  // the same for all lanes
#pragma unroll
  for (int by = 16; by > 0; by /= 2) v = join(v, __shfl_xor_sync(0xffffffff, v, by));
  return v;
}

// The same for all threads of a block.
template <class F>
__device__ double over_block(double v, const F& join) {
  __shared__ double part[kWarps];
  v = across(v, join);
  __syncthreads();  // what was here before is read
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
  __syncthreads();
  v = part[0];
  for (int i = 1; i < kWarps; ++i) v = join(v, part[i]);
  return v;
}

// Zero diagonal and zero row sums: inner products of such matrices are unbiased (Song et al. 2012). What is left below
// fp32's rounding of the diagonal is noise, and becomes 0. A block takes a matrix, a warp a row.
__global__ void __launch_bounds__(kThreads) u_centre(double* grams, int64_t count, int n) {
  __shared__ double part[kMostSamples];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t m = blockIdx.x; m < count; m += gridDim.x) {
    double* k = grams + m * n * n;
    double noise = 0;
    for (int i = threadIdx.x; i < n; i += kThreads) noise = fmax(noise, __dmul_rn(k[i * n + i], 0x1p-24));
    noise = over_block(noise, higher);
    for (int i = warp; i < n; i += kWarps) {
      double sum = 0;
      for (int j = lane; j < n; j += 32)
        if (i != j) sum = __dadd_rn(sum, k[i * n + j]);
      sum = across(sum, plus);
      if (lane == 0) part[i] = sum;
    }
    __syncthreads();
    double all = 0, left = 0, strange = 0;
    for (int i = lane; i < n; i += 32) all = __dadd_rn(all, part[i]);
    all = __ddiv_rn(across(all, plus), double(n - 1) * double(n - 2));
    for (int i = warp; i < n; i += kWarps)
      for (int j = lane; j < n; j += 32) {
        const double of_row = __ddiv_rn(part[i], n - 2), of_column = __ddiv_rn(part[j], n - 2);
        const double v = i == j ? 0 : __dsub_rn(k[i * n + j], __dsub_rn(__dadd_rn(of_row, of_column), all));
        k[i * n + j] = v;
        left = fmax(left, fabs(v));
        strange = __dadd_rn(strange, __dmul_rn(v, 0));  // NaN from an infinity or NaN on
      }
    left = over_block(left, higher), strange = over_block(strange, plus);
    if (left <= noise && strange == 0)
      for (int i = threadIdx.x; i < n * n; i += kThreads) k[i] = 0;
  }
}

// inner[i][j], j <= i, a block each
__global__ void __launch_bounds__(kThreads) products(const double* grams, int64_t count, int64_t size, double* inner) {
  for (int64_t at = blockIdx.x; at < count * count; at += gridDim.x) {
    const int64_t i = at / count, j = at % count;
    if (j > i) continue;
    double sum = 0;
    for (int64_t e = threadIdx.x; e < size; e += kThreads)
      sum = __dadd_rn(sum, __dmul_rn(grams[i * size + e], grams[j * size + e]));
    sum = over_block(sum, plus);
    if (threadIdx.x == 0) inner[at] = sum;
  }
}

__global__ void __launch_bounds__(kThreads, 1) normalise(const double* inner, int64_t count, double* out) {
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < count * count; at += gridDim.x * kThreads) {
    const int64_t i = at / count, j = at % count;
    const double a = __dsqrt_rn(inner[i * count + i]), b = __dsqrt_rn(inner[j * count + j]);
    const double both = __dmul_rn(a, b), of = inner[i > j ? at : j * count + i];
    if (i == j)
      out[at] = __dsub_rn(a, a) == 0 ? 1 : __dsub_rn(a, a);  // NaN for a norm that is none
    else
      out[at] = both == 0 ? 0 : __ddiv_rn(of, both);
  }
}

}  // namespace

int mpq_orthogonality(double* grams, int64_t count, int64_t n, bool debiased, double* workspace, double* out,
                      void* stream) {
  int error = cudaSuccess;
  if (debiased) error = start(u_centre, count, kThreads, stream, grams, count, int(n));
  if (error) return error;
  error = start(products, count * count, kThreads, stream, static_cast<const double*>(grams), count, n * n, workspace);
  if (error) return error;
  return start(normalise, ceil_div(count * count, kThreads), kThreads, stream, static_cast<const double*>(workspace),
               count, out);
}
