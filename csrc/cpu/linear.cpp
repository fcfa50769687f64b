// linear: few rows of activations go through `gemv` or `gemv_words`, many through panels and `gemm`; 8-bit ones through
// `gemv_a8`, some against panels of codes, `gemm_a8`, and many through panels and `gemm8`. The choice depends on the
// weight's kind and on shapes alone, so a result never depends on the number of threads.
#include <algorithm>
#include <cstring>

#include "block.h"
#include "buffer.h"
#include "conv.h"
#include "drivers.h"
#include "parallel.h"

namespace mpq {
namespace {

constexpr int64_t kDepth = 512;       // k's of a dequantized block: kRows * kDepth floats stay in L2
constexpr int64_t kRows = 48;         // a multiple of every ISA's tile height, and of kCodeRows
constexpr int64_t kMaxColumns = 512;  // activation rows staged at once
// Rows of 8-bit activations up to which codes are put into panels: from there on a panel of activations is full enough
// that it does not matter, and 8-bit codes are many to transpose.
constexpr int64_t some_rows(int bits) { return bits == 8 ? 12 : 24; }
constexpr int64_t kGrainMacs = 1 << 16;   // below this a second thread costs more than it saves
constexpr int64_t kGrainMacs8 = 1 << 19;  // and with 8-bit activations

// Rows of x as fp32 [m][Kp], zero past K; the caller's own memory when that is what it holds.
const float* padded_rows(const LinearArgs& a, Buffer<float>& room) {
  const Packed& w = a.weight;
  if (a.type == Float::f32 && w.k == w.kp) return static_cast<const float*>(a.x);
  const int64_t bytes = a.type == Float::f32 ? 4 : 2;
  parallel_for(a.m, ceil_div(kGrainMacs, w.kp), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      float* row = room + m * w.kp;
      kernels().to_float(static_cast<const char*>(a.x) + m * w.k * bytes, a.type, row, w.k);
      std::memset(row + w.k, 0, (w.kp - w.k) * sizeof(float));
    }
  });
  return room;
}

// Result row m's columns n0..n1, from fp32 sums; rows of several variants are numbered through.
void finish(const LinearArgs& a, int64_t m, int64_t n0, int64_t n1, float* sums) {
  if (a.bias)
    for (int64_t n = n0; n < n1; ++n) sums[n - n0] += a.bias[n];
  const int64_t bytes = a.type == Float::f32 ? 4 : 2;
  char* y = static_cast<char*>(a.y) + (m * a.weight.n + n0) * bytes;
  if (y != reinterpret_cast<char*>(sums)) kernels().from_float(sums, a.type, y, n1 - n0);
}

// Threads share out the weight's rows: kernel(n0, n1, sums, ld, scratch) leaves fp32 sums at
// sums[m * ld + n - n0], which are finished here.
template <class F>
void by_rows(const LinearArgs& a, const F& kernel) {
  const Packed& w = a.weight;
  const bool direct = a.type == Float::f32;
  const int64_t grain = ceil_div(kGrainMacs, a.m * w.kp * kStreams);
  parallel_for(ceil_div(w.n, kStreams), grain, [&](int64_t begin, int64_t end) {
    const int64_t n0 = begin * kStreams, n1 = std::min(w.n, end * kStreams), ld = direct ? w.n : n1 - n0;
    Buffer<float> scratch(kStreams * (2 * w.groups + kWidest)), room(direct ? 0 : a.m * ld);
    float* sums = direct ? static_cast<float*>(a.y) + n0 : room;
    kernel(n0, n1, sums, ld, scratch);
    for (int64_t m = 0; m < a.m; ++m) finish(a, m, n0, n1, sums + m * ld);
  });
}

void by_words(const LinearArgs& a, const float* x, int64_t length) {
  const Packed& w = a.weight;
  Buffer<float> ordered(a.m * length);
  for (int64_t m = 0; m < a.m; ++m) kernels().words_order(w, x + m * w.kp, ordered + m * length);
  by_rows(a, [&](int64_t n0, int64_t n1, float* y, int64_t ld, float* scratch) {
    kernels().gemv_words(w, n0, n1, ordered, a.m, y, ld, scratch);
  });
}

// x[m0..m1] transposed into panels [ceil(rows / 32)][Kp][32]: k runs down, activation rows across.
void make_panels(const float* x, int64_t kp, int64_t m0, int64_t m1, float* panels) {
  const int64_t count = ceil_div(m1 - m0, kPanel), strips = ceil_div(kp, kDepth);
  parallel_for(count * strips, ceil_div(1 << 14, kDepth * kPanel), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i / strips, k0 = i % strips * kDepth, depth = std::min(kp - k0, kDepth);
      const int64_t first = m0 + p * kPanel, rows = std::min(kPanel, m1 - first);
      float* out = panels + (p * kp + k0) * kPanel;
      if (rows < kPanel) std::memset(out, 0, depth * kPanel * sizeof(float));
      kernels().transpose(x + first * kp + k0, kp, rows, depth, out, kPanel);
    }
  });
}

void by_panels(const LinearArgs& a, const float* x) {
  const Packed& w = a.weight;
  const int64_t columns = std::min(kMaxColumns, ceil_div(a.m, kPanel) * kPanel), blocks = ceil_div(w.n, kRows);
  Buffer<float> panels(columns * w.kp);
  for (int64_t m0 = 0; m0 < a.m; m0 += columns) {
    const int64_t m1 = std::min(a.m, m0 + columns), count = ceil_div(m1 - m0, kPanel);
    make_panels(x, w.kp, m0, m1, panels);
    const int64_t grain = ceil_div(kGrainMacs, kRows * w.kp * (m1 - m0));
    parallel_for(a.variants * blocks, grain, [&](int64_t begin, int64_t end) {
      Buffer<float> room(a.floats ? 0 : kRows * kDepth), sums(count * kRows * kPanel), grid(2 * w.groups),
          tile(kPanel * kRows);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t variant = i / blocks, n0 = i % blocks * kRows, n1 = std::min(w.n, n0 + kRows);
        const float* floats = a.floats ? a.floats + variant * w.n * w.k : nullptr;
        for (int64_t k0 = 0; k0 < w.kp; k0 += kDepth) {
          const int64_t k1 = std::min(w.kp, k0 + kDepth);
          const Block block = fp32_block(w, floats, n0, n1, k0, k1, room, kDepth, grid);
          for (int64_t p = 0; p < count; ++p)
            kernels().gemm(block.data, block.ld, n1 - n0, panels + (p * w.kp + k0) * kPanel, m1 - m0 - p * kPanel,
                           k1 - k0, sums + p * kRows * kPanel, kPanel, k0 == 0);
        }
        for (int64_t p = 0; p < count; ++p) {
          const int64_t first = m0 + p * kPanel, rows = std::min(kPanel, m1 - first);
          kernels().transpose(sums + p * kRows * kPanel, kPanel, n1 - n0, rows, tile, kRows);
          for (int64_t m = 0; m < rows; ++m) finish(a, variant * a.m + first + m, n0, n1, tile + m * kRows);
        }
      }
    });
  }
}

// Rows of activations rounded to 8 bits, in panels.
struct Rounded {
  const int64_t kp, groups, spans;
  Buffer<int8_t> q;
  Buffer<float> scales, sums;

  Rounded(const LinearArgs& a, const float* x)
      : kp(a.weight.kp),
        groups(a.weight.groups),
        spans(Spans(a.weight).count),
        q(panels(a) * kPanel * kp),
        scales(panels(a) * kPanel * groups),
        sums(panels(a) * kPanel * spans) {
    const Packed& w = a.weight;
    parallel_for(panels(a), ceil_div(kGrainMacs, w.kp * kPanel), [&](int64_t begin, int64_t end) {
      Buffer<int8_t> rows(kPanel * kp + kLine);
      Buffer<float> room(kPanel * std::max(groups, spans));
      for (int64_t p = begin; p < end; ++p) {
        const int64_t m0 = p * kPanel, count = std::min(kPanel, a.m - m0);
        for (int64_t m = 0; m < count; ++m)
          kernels().quantize_act(x + (m0 + m) * kp, kp, w.group, a.act_scale, rows + m * kp, room + m * groups);
        kernels().transpose(room, groups, count, groups, scales + m0 * groups, kPanel);
        kernels().sum_a8(w, rows, kp, count, room);
        kernels().transpose(room, spans, count, spans, sums + m0 * spans, kPanel);
        Packed bytes;  // panels of bytes are panels of 8-bit codes
        bytes.codes = reinterpret_cast<const uint8_t*>(static_cast<int8_t*>(rows));
        bytes.k = bytes.kp = kp;
        kernels().panel_a8(bytes, 0, count, 0, kp, reinterpret_cast<uint8_t*>(q + m0 * kp));
      }
    });
  }
  static int64_t panels(const LinearArgs& a) { return ceil_div(a.m, kPanel); }
  ActPanels8 from(int64_t m) const { return {q + m * kp, scales + m * groups, sums + m * spans}; }  // m: of a panel
};

void by_rows8(const LinearArgs& a, const float* x) {
  const Packed& w = a.weight;
  const Chunks chunks(w);
  const int64_t ld = chunks.count * chunks.codes, lanes = chunks.stretches * kWidest;
  Buffer<int8_t> rounded(w.kp), q(a.m * ld);
  Buffer<float> scales(w.groups), sums(a.m * 2 * lanes);
  Buffer<int32_t> group(lanes);
  for (int64_t i = 0; i < lanes; ++i)
    group[i] = int32_t(chunks.group_of(i / kWidest, i % kWidest) - chunks.group_of(i / kWidest, 0));
  for (int64_t m = 0; m < a.m; ++m) {
    kernels().quantize_act(x + m * w.kp, w.kp, w.group, a.act_scale, rounded, scales);
    kernels().spread_a8(w, rounded, scales, q + m * ld, sums + m * 2 * lanes);
  }
  const Few8 acts{q, ld, sums, group};
  by_rows(a, [&](int64_t n0, int64_t n1, float* y, int64_t ldy, float* scratch) {
    kernels().gemv_a8(w, n0, n1, acts, a.m, y, ldy, scratch);
  });
}

// Asks for the scales and zeros of weight rows n0..n1 ahead of time.
void fetch_grids(const Packed& w, int64_t n0, int64_t n1) {
  const int64_t row = w.groups * (w.half ? 2 : 4);
  for (const void* grids : {w.scales, w.zero_each ? w.zeros : nullptr})
    for (int64_t i = n0 * row; grids && i < n1 * row; i += kLine)
      __builtin_prefetch(static_cast<const char*>(grids) + i);
}

// Few, but more than kFewRows: a panel of activations would be nearly empty, so codes lie in panels. While one of them
// is transposed and multiplied, the next is fetched.
void by_code_panels8(const LinearArgs& a, const float* x) {
  const Packed& w = a.weight;
  const Spans spans(w);
  const int64_t ld = w.kp + kLine;  // rows a power of two apart would fall on each other in the cache
  Buffer<int8_t> q(a.m * ld);
  Buffer<float> act_scales(a.m * w.groups), act_sums(a.m * spans.count);
  for (int64_t m = 0; m < a.m; ++m)
    kernels().quantize_act(x + m * w.kp, w.kp, w.group, a.act_scale, q + m * ld, act_scales + m * w.groups);
  kernels().sum_a8(w, q, ld, a.m, act_sums);
  for (int64_t m = 0; m < a.m; ++m) kernels().order_a8(w.bits, q + m * ld, w.kp);
  const Acts8 acts{q, ld, act_scales, act_sums};
  const int64_t step = std::max<int64_t>(1, kDepth / spans.length), depth = std::min(w.kp, step * spans.length);
  parallel_for(ceil_div(w.n, kPanel), ceil_div(kGrainMacs8, kPanel * w.kp * a.m), [&](int64_t begin, int64_t end) {
    Buffer<uint8_t> codes(packed_bytes(depth, w.bits) * kPanel);
    Buffer<float> scales(w.groups * kPanel), zeros(w.groups * kPanel), scratch(w.groups * kPanel), y(a.m * kPanel);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n0 = i * kPanel, n1 = std::min(w.n, n0 + kPanel);
      kernels().grid_a8(w, n0, n1, scales, zeros, scratch);
      fetch_grids(w, n1, std::min(w.n, n1 + kPanel));
      for (int64_t s0 = 0; s0 < spans.count; s0 += step) {
        const int64_t s1 = std::min(spans.count, s0 + step);
        kernels().panel_a8(w, n0, n1, spans.begin(s0), spans.end(s1 - 1), codes);
        const int64_t half = packed_bytes(spans.begin(s0) + spans.end(s1 - 1), w.bits) * kPanel / 2;
        kernels().gemm_a8(w, {codes, scales, zeros, w.row(n1) + half}, acts, a.m, s0, s1, y, s0 == 0);
      }
      for (int64_t m = 0; m < a.m; ++m) finish(a, m, n0, n1, y + m * kPanel);
    }
  });
}

void by_panels8(const LinearArgs& a, const float* x) {
  const Packed& w = a.weight;
  const Spans spans(w);
  const Rounded acts(a, x);
  const int64_t most = std::min(kMaxColumns, ceil_div(a.m, kPanel) * kPanel);
  const int64_t step = std::max<int64_t>(1, kDepth / spans.length), depth = std::min(w.kp, step * spans.length);
  const int64_t ld = depth + kLine;  // rows a power of two apart would fall on each other in the cache
  parallel_for(ceil_div(w.n, kRows), ceil_div(kGrainMacs8, kRows * w.kp * a.m), [&](int64_t begin, int64_t end) {
    Buffer<uint8_t> codes(kRows * ld);
    Buffer<float> scales(kRows * w.groups), zeros(kRows * w.groups), sums(most * kRows), tile(kPanel * kRows);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n0 = i * kRows, n1 = std::min(w.n, n0 + kRows);
      load_grids(w, n0, n1, scales, zeros);
      fetch_grids(w, n1, std::min(w.n, n1 + kRows));
      for (int64_t m0 = 0; m0 < a.m; m0 += most) {
        const int64_t m1 = std::min(a.m, m0 + most);
        for (int64_t s0 = 0; s0 < spans.count; s0 += step) {
          const int64_t s1 = std::min(spans.count, s0 + step), k0 = spans.begin(s0), k1 = spans.end(s1 - 1);
          for (int64_t n = n0; n < n1; ++n)
            kernels().unpack(w.row(n) + packed_bytes(k0, w.bits), w.bits, codes + (n - n0) * ld, k1 - k0);
          const uint8_t* next = s1 < spans.count ? w.row(n0) + packed_bytes(k1, w.bits) : w.row(n1);
          kernels().gemm8(w, {codes, ld, kRows, scales, zeros, next}, n1 - n0, acts.from(m0), m1 - m0, s0, s1, sums,
                          s0 == 0);
        }
        for (int64_t m = m0; m < m1; m += kPanel) {
          const int64_t rows = std::min(kPanel, m1 - m);
          kernels().transpose(sums + (m - m0) * kRows, kPanel, n1 - n0, rows, tile, kRows);
          for (int64_t j = 0; j < rows; ++j) finish(a, m + j, n0, n1, tile + j * kRows);
        }
      }
    }
  });
}

}  // namespace

void linear(const LinearArgs& a) {
  const Packed& w = a.weight;
  if (a.m == 0 || w.n == 0) return;
  const bool in_place = a.type == Float::f32 && w.k == w.kp;
  Buffer<float> room(in_place ? 0 : a.m * w.kp);
  const float* x = padded_rows(a, room);
  if (a.act8 && a.m <= kFewRows) {
    by_rows8(a, x);
  } else if (a.act8 && a.m <= some_rows(w.bits)) {
    by_code_panels8(a, x);
  } else if (a.act8) {
    by_panels8(a, x);
  } else if (const int64_t length = kernels().words_length(w); length && a.m < kernels().gemm_from) {
    by_words(a, x, length);
  } else if (a.m < kernels().gemm_from) {
    by_rows(a, [&](int64_t n0, int64_t n1, float* y, int64_t ld, float* grid) {
      kernels().gemv(w, n0, n1, x, a.m, y, ld, grid);
    });
  } else {
    by_panels(a, x);
  }
}

void probe_linear(const LinearArgs& a) {
  if (a.m > 0 && a.weight.n > 0 && a.variants > 0) by_panels(a, static_cast<const float*>(a.x));
}

}  // namespace mpq
