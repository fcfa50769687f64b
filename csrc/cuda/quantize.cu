// quantize and probe_errors: a block takes one group of a weight's row at a time, a warp spans of 256 weights, which
// stay in registers while grid after grid is tried on them.
//
// Codes, grids and errors are those of every other path to the bit: each step is one IEEE operation or one fused
// multiply-add (written as intrinsics, so that the compiler joins no others), and sums run in an order of their own:
// lane l of 32 adds weights l, l + 32, ... of a span in fp32, lanes l and l + 16 meet, then 8, 4, 2 and 1 apart; spans
// are added in order in fp64.
#include <cuda_fp16.h>

#include "launch.h"
#include "start.cuh"

namespace {

using namespace mpq;

constexpr int kLanes = 32, kEach = 8, kSpan = kLanes * kEach;
constexpr int kMostWarps = 8;
constexpr int kMostFits = 64;   // grids that are tried together
constexpr int kFractions = 41;  // the MSE search: 1, 0.98, ... 0.2 of the full range; the first of equals wins
constexpr float kFractionStep = 0.02f;
constexpr int kWidths = 16;            // of a launch of probe_errors, 4 bits each
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction, rounded to nearest even

// One group's grid, 32 bytes.
struct Fit {
  float scale, zero, top;
  float inverse;       // 1 / scale
  float nearly;        // how far off its code w / scale + zero may be for `inverse` to tell the code
  float coarse, fine;  // their sum is the zero; the coarse part is a multiple of 2^-15, and code - coarse exact
  float unused;
};

struct Range {
  float lo, hi;  // always holds 0, so that the zero lies in 0..top
  bool finite;
};

struct Group {
  const float* w;
  int64_t size;
};

struct Shared {
  Fit fits[kMostFits];
  double total[kMostFits];
  float part[kMostWarps][kMostFits];
  float lo[kMostWarps], hi[kMostWarps], bad[kMostWarps];
};

__device__ __forceinline__ int lane() { return threadIdx.x % kLanes; }
__device__ __forceinline__ int warp() { return threadIdx.x / kLanes; }
__device__ __forceinline__ int warps() { return blockDim.x / kLanes; }

template <class T, class F>
__device__ __forceinline__ T across(T v, const F& join) {
#pragma unroll
  for (int by = kLanes / 2; by > 0; by /= 2) v = join(v, __shfl_xor_sync(0xffffffff, v, by));
  return v;
}

__device__ float lower(float a, float b) { return fminf(a, b); }
__device__ float higher(float a, float b) { return fmaxf(a, b); }
__device__ float sum(float a, float b) { return __fadd_rn(a, b); }

__device__ Range range_of(Shared& s, const Group& g) {
  float lo = 0, hi = 0, bad = 0;
  for (int64_t k = threadIdx.x; k < g.size; k += blockDim.x) {
    const float v = g.w[k];
    lo = fminf(lo, v), hi = fmaxf(hi, v);
    bad = fmaf(v, 0, bad);  // 0, or NaN from an infinity or NaN on
  }
  lo = across(lo, lower), hi = across(hi, higher), bad = across(bad, sum);
  __syncthreads();  // of the last group nothing is read any more
  if (lane() == 0) s.lo[warp()] = lo, s.hi[warp()] = hi, s.bad[warp()] = bad;
  __syncthreads();
  for (int i = 0; i < warps(); ++i) lo = fminf(lo, s.lo[i]), hi = fmaxf(hi, s.hi[i]), bad = __fadd_rn(bad, s.bad[i]);
  return {lo, hi, bad == 0};
}

__device__ __forceinline__ float stored(float v, bool half) { return half ? __half2float(__float2half_rn(v)) : v; }

// The grid over `fraction` of a range; scale and zero are of the stored type.
__device__ Fit fit(const Range& r, float fraction, int bits, bool symmetric, bool half) {
  Fit f;
  f.top = float(max_code(bits));
  const float below = __fsub_rn(0, r.lo), width = symmetric ? fmaxf(r.hi, below) : __fsub_rn(r.hi, r.lo);
  f.scale = stored(__fdiv_rn(__fmul_rn(width, fraction), symmetric ? f.top / 2 : f.top), half);
  f.zero = f.top / 2;
  if (!symmetric) {
    const float z = fminf(fmaxf(__fdiv_rn(__fmul_rn(below, fraction), f.scale), 0), f.top);
    f.zero = f.scale > 0 ? stored(z, half) : 0;
  }
  f.inverse = __fdiv_rn(1, f.scale);
  // A product with 1 / scale is off by less than 5 * 2^-24 * top (three roundings of the quotient and two of the sum).
  f.nearly = f.scale > 0x1p-100f && f.scale < 0x1p100f ? 0.5f - 0x1p-21f * f.top : -1;
  f.coarse = __fsub_rn(__fadd_rn(f.zero, 384), 384);
  f.fine = __fsub_rn(f.zero, f.coarse);
  f.unused = 0;
  return f;
}

__device__ __forceinline__ float within(float v, float top) { return fminf(fmaxf(v, 0), top); }
__device__ __forceinline__ float whole(float v) { return __fsub_rn(__fadd_rn(v, kRound), kRound); }

// clamp(w / scale + zero) rounded to nearest even; without a scale, the zero. Divides only where it must.
__device__ __forceinline__ float code_of(float w, const Fit& f) {
  float v = within(fmaf(w, f.inverse, f.zero), f.top), code = whole(v);
  if (fabsf(__fsub_rn(v, code)) > f.nearly) {
    v = within(__fadd_rn(__fdiv_rn(w, f.scale > 0 ? f.scale : __int_as_float(0x7f800000)), f.zero), f.top);
    code = whole(v);
  }
  return code;
}

// w - scale * (code - zero)
__device__ __forceinline__ float off_by(float w, const Fit& f) {
  return fmaf(f.scale, f.fine, fmaf(-f.scale, __fsub_rn(code_of(w, f), f.coarse), w));
}

// s.part[warp][i] = the sum of squared errors of fit i over a span of which `left` weights are left, from this lane's
// first on.
template <bool full>
__device__ void try_fits(Shared& s, const float* w, int64_t left, int count) {
  float v[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) v[j] = full || j * kLanes < left ? w[j * kLanes] : 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const Fit f = s.fits[i];
    float squares = 0;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const float e = off_by(v[j], f);
      if (full || j * kLanes < left) squares = fmaf(e, e, squares);
    }
    squares = across(squares, sum);
    if (lane() == 0) s.part[warp()][i] = squares;
  }
}

// s.total[i] = the error of grid make(i), for i < count. The weights are read once for all.
template <class Make>
__device__ void errors(Shared& s, const Group& g, int count, const Make& make) {
  __syncthreads();  // what was here before is read
  for (int i = threadIdx.x; i < count; i += blockDim.x) s.fits[i] = make(i), s.total[i] = 0;
  __syncthreads();
  const int64_t spans = ceil_div(g.size, kSpan);
  for (int64_t first = 0; first < spans; first += warps()) {
    const int64_t span = first + warp(), k = span * kSpan + lane();
    if (span < spans) {
      if (g.size >= (span + 1) * kSpan)
        try_fits<true>(s, g.w + k, kSpan, count);
      else
        try_fits<false>(s, g.w + k, g.size - k, count);
    }
    __syncthreads();
    const int here = spans - first < warps() ? int(spans - first) : warps();
    for (int i = threadIdx.x; i < count; i += blockDim.x)
      for (int j = 0; j < here; ++j) s.total[i] += double(s.part[j][i]);
    __syncthreads();
  }
}

__device__ void store(void* to, int64_t at, float v, bool half) {
  if (half)
    static_cast<__half*>(to)[at] = __float2half_rn(v);
  else
    static_cast<float*>(to)[at] = v;
}

__device__ bool fits_type(float scale) { return fabsf(scale) < __int_as_float(0x7f800000); }

__device__ void report(int64_t* first_bad, int64_t row) {
  if (threadIdx.x == 0) atomicMin(reinterpret_cast<long long*>(first_bad), static_cast<long long>(row));
}

// Packs a group's codes, a word of 32 bits at a time: the lanes of a word bring one code each.
__device__ void pack(const Group& g, const Fit& f, int bits, uint8_t* out) {
  const int per_word = 32 / bits;
  for (int64_t k = int64_t(warp()) * kLanes; k < g.size; k += int64_t(warps()) * kLanes) {
    const bool real = k + lane() < g.size;
    uint32_t word = real ? uint32_t(code_of(g.w[k + lane()], f)) << (lane() % per_word * bits) : 0;
#pragma unroll 1
    for (int by = 1; by < per_word; by *= 2) word |= __shfl_xor_sync(0xffffffff, word, by);
    if (lane() % per_word == 0) reinterpret_cast<uint32_t*>(out + k * bits / 8)[lane() / per_word] = word;
  }
}

// body(row, number of the group, group) for every group of a weight, one block each
template <class Body>
__device__ void each_group(const float* w, int64_t n, int64_t k, int64_t group, const Body& body) {
  const int64_t groups = ceil_div(k, group);
#pragma unroll 1
  for (int64_t i = blockIdx.x; i < n * groups; i += gridDim.x) {
    const int64_t row = i / groups, g = i - row * groups, left = k - g * group;
    body(row, i, Group{w + row * k + g * group, left < group ? left : group});
  }
}

__global__ void __launch_bounds__(kMostWarps* kLanes, 3)
    quantize(const float* weight, int64_t n, int64_t k, int64_t group, int bits, bool symmetric, bool mse, bool half,
             uint8_t* packed, void* scales, void* zeros, float* error, int64_t* first_bad) {
  __shared__ Shared s;
  if (symmetric && blockIdx.x == 0 && threadIdx.x == 0) store(zeros, 0, mid_zero(bits), half);
  const int64_t groups = ceil_div(k, group), bytes = packed_bytes(padded(k), bits);
  each_group(weight, n, k, group, [&](int64_t row, int64_t at, const Group& g) {
    const Range r = range_of(s, g);
    const int count = mse ? kFractions : 1;
    errors(s, g, count,
           [&](int i) { return fit(r, __fsub_rn(1, __fmul_rn(float(i), kFractionStep)), bits, symmetric, half); });
    if (!r.finite || !fits_type(s.fits[0].scale)) return report(first_bad, row);
    int best = 0;
    for (int i = 1; i < count; ++i)
      if (s.total[i] < s.total[best]) best = i;
    const Fit f = s.fits[best];
    if (threadIdx.x == 0) {
      store(scales, at, f.scale, half);
      if (!symmetric) store(zeros, at, f.zero, half);
      error[at] = float(s.total[best]);
    }
    pack(g, f, bits, packed + row * bytes + (at - row * groups) * packed_bytes(group, bits));
  });
}

__global__ void __launch_bounds__(kMostWarps* kLanes, 3)
    probe_errors(const float* weight, int64_t n, int64_t k, int64_t group, uint64_t bits, int widths,
                 const float* fractions, int64_t fraction_count, bool symmetric, bool half, float* out,
                 int64_t* first_bad) {
  __shared__ Shared s;
  const int64_t step = n * ceil_div(k, group) * fraction_count, all = widths * fraction_count;
  each_group(weight, n, k, group, [&](int64_t row, int64_t at, const Group& g) {
    const Range r = range_of(s, g);
    if (!r.finite) return report(first_bad, row);
    for (int64_t done = 0; done < all; done += kMostFits) {
      const int count = all - done < kMostFits ? int(all - done) : kMostFits;
      errors(s, g, count, [&](int i) {
        const int64_t width = (done + i) / fraction_count, f = (done + i) % fraction_count;
        return fit(r, fractions[f], int(bits >> 4 * width & 15), symmetric, half);
      });
      bool good = true;
      for (int i = 0; i < count; ++i) good &= fits_type(s.fits[i].scale);
      if (!good) return report(first_bad, row);
      for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const int64_t width = (done + i) / fraction_count, f = (done + i) % fraction_count;
        out[width * step + at * fraction_count + f] = float(s.total[i]);
      }
    }
  });
}

// A warp for every span of a group, up to kMostWarps.
int threads_for(int64_t k, int64_t group) {
  return kLanes * int(std::min<int64_t>(ceil_div(std::min(k, group), kSpan), kMostWarps));
}

}  // namespace

int mpq_quantize(const float* weight, int64_t n, int64_t k, int64_t group, int bits, bool symmetric, bool mse,
                 bool half, uint8_t* packed, void* scales, void* zeros, float* errors, int64_t* first_bad,
                 void* stream) {
  const int64_t blocks = std::max<int64_t>(n * ceil_div(k, group), symmetric);  // one writes the zero
  return start(quantize, blocks, threads_for(k, group), stream, weight, n, k, group, bits, symmetric, mse, half, packed,
               scales, zeros, errors, first_bad);
}

int mpq_probe_errors(const float* weight, int64_t n, int64_t k, int64_t group, const int64_t* bits, int64_t widths,
                     const float* fractions, int64_t fraction_count, bool symmetric, bool half, float* out,
                     int64_t* first_bad, void* stream) {
  const int64_t blocks = n * ceil_div(k, group);
  for (int64_t b = 0; b < widths; b += kWidths) {
    const int count = int(std::min<int64_t>(kWidths, widths - b));
    uint64_t nibbles = 0;
    for (int i = 0; i < count; ++i) nibbles |= uint64_t(bits[b + i]) << 4 * i;
    const int error = start(probe_errors, blocks, threads_for(k, group), stream, weight, n, k, group, nibbles, count,
                            fractions, fraction_count, symmetric, half, out + b * blocks * fraction_count, first_bad);
    if (error) return error;
  }
  return cudaSuccess;
}
