// pack, unpack, dequantize and quantize: weights in and out of the packed format, by rows; probe_errors.
#include <algorithm>
#include <atomic>
#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "buffer.h"
#include "drivers.h"
#include "parallel.h"

namespace mpq {
namespace {

constexpr int64_t kGrain = 1 << 15;  // weights

template <class F>
void rows(int64_t n, int64_t k, const F& body) {
  parallel_for(n, ceil_div(kGrain, std::max<int64_t>(k, 1)), body);
}

template <int BITS>
void pack_row(const uint8_t* codes, int64_t k, uint8_t* row) {
  constexpr int kEach = 8 / BITS;  // codes in a byte
  for (int64_t j = 0; j < k / kEach; ++j) {
    uint8_t byte = 0;
    for (int i = 0; i < kEach; ++i) or_code(&byte, i, BITS, codes[j * kEach + i]);
    row[j] = byte;
  }
  std::memset(row + k / kEach, 0, packed_bytes(padded(k), BITS) - k / kEach);
  for (int64_t i = k / kEach * kEach; i < k; ++i) or_code(row, i, BITS, codes[i]);
}

void pack_row(const uint8_t* codes, int64_t k, int bits, uint8_t* row) {
  if (bits == 2) pack_row<2>(codes, k, row);
  if (bits == 4) pack_row<4>(codes, k, row);
  if (bits == 8) pack_row<8>(codes, k, row);
}

// The first row that is not good(n), or -1. Threads share out the rows.
template <class F>
int64_t first_bad_row(int64_t n, int64_t k, const F& good) {
  std::atomic<int64_t> bad{-1};
  rows(n, k, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (!good(i)) {
        for (int64_t seen = bad; (seen < 0 || i < seen) && !bad.compare_exchange_weak(seen, i);) {
        }
        return;  // rows of this thread after i are no concern: i is its smallest
      }
  });
  return bad;
}

// Memory about to be written for the first time, and read over and over: with an entry in the tables of pages for each
// 2 MiB, where the system has such to give, products with one row take less time on a virtual machine, at best a
// quarter.
void in_large_pages([[maybe_unused]] uint8_t* at, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  const uintptr_t begin = (uintptr_t(at) + kPage - 1) / kPage * kPage, end = (uintptr_t(at) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // may be refused: no harm
#endif
}

}  // namespace

void code_panels(const Packed& w, uint8_t* out) {
  const int64_t bytes = kPanel * packed_bytes(w.kp, w.bits);
  in_large_pages(out, panel_bytes(w));
  rows(panel_count(w.n), kPanel * w.kp, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      kernels().panel_a8(w, p * kPanel, std::min(w.n, (p + 1) * kPanel), out + p * bytes);
  });
}

void pack(const uint8_t* codes, int64_t n, int64_t k, int bits, uint8_t* out) {
  const int64_t bytes = packed_bytes(padded(k), bits);
  rows(n, k, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pack_row(codes + i * k, k, bits, out + i * bytes);
  });
}

void unpack(const uint8_t* packed, int64_t n, int64_t k, int bits, uint8_t* out) {
  const int64_t bytes = packed_bytes(padded(k), bits);
  rows(n, k, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels().unpack(packed + i * bytes, bits, out + i * k, k);
  });
}

void dequantize(const Packed& w, float* out) {
  rows(w.n, w.kp, [&](int64_t begin, int64_t end) {
    Buffer<float> grid(2 * w.groups), row(w.k == w.kp ? 0 : w.kp);
    if (w.k == w.kp) return kernels().dequantize(w, begin, end, 0, w.kp, out + begin * w.k, w.k, grid);
    for (int64_t n = begin; n < end; ++n) {
      kernels().dequantize(w, n, n + 1, 0, w.kp, row, w.kp, grid);
      std::memcpy(out + n * w.k, row, w.k * sizeof(float));
    }
  });
}

int64_t quantize(const QuantizeArgs& a) {
  const int64_t groups = ceil_div(padded(a.k), a.group), bytes = packed_bytes(padded(a.k), a.how.bits);
  const Float type = a.how.half_scales ? Float::f16 : Float::f32;
  auto store = [&](void* base, int64_t at, float v) {
    kernels().from_float(&v, type, static_cast<char*>(base) + at * (a.how.half_scales ? 2 : 4), 1);
  };
  if (a.how.symmetric) store(a.zeros, 0, mid_zero(a.how.bits));
  return first_bad_row(a.n, a.k, [&](int64_t n) {
    Buffer<uint8_t> codes(a.k);
    Buffer<Grid> grids(groups);
    if (!kernels().quantize(a.weight + n * a.k, a.k, a.group, a.how, codes, grids)) return false;
    for (int64_t g = 0; g < groups; ++g) {
      store(a.scales, n * groups + g, grids[g].scale);
      if (!a.how.symmetric) store(a.zeros, n * groups + g, grids[g].zero);
      a.errors[n * groups + g] = float(grids[g].error);
    }
    pack_row(codes, a.k, a.how.bits, a.packed + n * bytes);
    return true;
  });
}

int64_t probe_errors(const ProbeErrorsArgs& a) {
  const int64_t groups = ceil_div(padded(a.k), a.group), count = a.how.fraction_count;
  return first_bad_row(a.n, a.k, [&](int64_t n) {
    return kernels().probe_errors(a.weight + n * a.k, a.k, a.group, a.how, a.out + n * groups * count,
                                  a.n * groups * count);
  });
}

}  // namespace mpq
