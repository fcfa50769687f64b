// linear: few rows of activations go through `gemv` or `gemv_words`, many through panels and `gemm`, 8-bit ones through
// panels of codes and `gemm_a8`. The choice depends on the weight's kind, on shapes and on how large activations are,
// so a result never depends on the number of threads.
#include <algorithm>
#include <cstring>

#include "block.h"
#include "buffer.h"
#include "drivers.h"
#include "panels8.h"
#include "parallel.h"

namespace mpq {
namespace {

constexpr int64_t kDepth = 512;           // k's of a dequantized block: kRows * kDepth floats stay in L2
constexpr int64_t kRows = 48;             // a multiple of every ISA's tile height
constexpr int64_t kMaxColumns = 512;      // activation rows staged at once
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

// Result row m's columns n0..n1; rows of several variants are numbered through.
void put(const LinearArgs& a, int64_t m, int64_t n0, int64_t n1, const float* results) {
  const int64_t bytes = a.type == Float::f32 ? 4 : 2;
  char* y = static_cast<char*>(a.y) + (m * a.weight.n + n0) * bytes;
  if (y != reinterpret_cast<const char*>(results)) kernels().from_float(results, a.type, y, n1 - n0);
}

// The same from sums that lack bias and activation.
void finish(const LinearArgs& a, int64_t m, int64_t n0, int64_t n1, float* sums) {
  if (a.bias)
    for (int64_t n = n0; n < n1; ++n) sums[n - n0] += a.bias[n];
  kernels().activate(a.activation, sums, 1, n1 - n0, n1 - n0);
  put(a, m, n0, n1, sums);
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

// Asks for the scales and zeros of weight rows n0..n1 ahead of time. Inlined in any case: compilers drop calls of what
// does nothing but ask.
[[gnu::always_inline]] inline void fetch_grids(const Packed& w, int64_t n0, int64_t n1) {
  const int64_t row = w.groups * (w.half ? 2 : 4);
  for (const void* grids : {w.scales, w.zero_each ? w.zeros : nullptr})
    for (int64_t i = n0 * row; grids && i < n1 * row; i += kLine)
      __builtin_prefetch(static_cast<const char*>(grids) + i);
}

// What panels write of a row of results is a small part of it, and those of other rows lie pages apart, where they push
// each other out of the caches: where weights are so long that memory has time enough, fewer bytes go past these.
constexpr int64_t kFarDepth = 512, kFarBytesOfDeep = 256 * 1024;  // measured

constexpr int64_t kStartsFrom = 3;  // rows of activations: fewer meet whole panels, without starts

// Rows of activations rounded to 8 bits.
struct Rounded {
  const int64_t ld;  // rows a power of two apart would fall on each other in the cache
  Buffer<int8_t> q;
  Buffer<float> scales, sums;
  const int64_t blocks;  // that have starts
  Buffer<int32_t> starts;
  Buffer<int64_t> start_at;

  Rounded(const LinearArgs& a, const Spans& spans, const float* x)
      : ld(a.weight.kp + kLine),
        q(a.m * ld),
        scales(a.m * a.weight.groups),
        sums(a.m * spans.count),
        blocks(a.m < kStartsFrom ? 0 : started_blocks(a.weight, a.weight.n)),
        starts(a.m * blocks),
        start_at(blocks) {
    const Packed& w = a.weight;
    for (int64_t i = 0; i < blocks; ++i) start_at[i] = i * a.m;
    parallel_for(a.m, ceil_div(kGrainMacs, w.kp), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m)
        kernels().quantize_act(x + m * w.kp, w.kp, w.group, a.act_scale, q + m * ld, scales + m * w.groups);
      for (int64_t s = 0; spans.count > 1 && s < spans.count; ++s) {
        const int64_t k0 = spans.begin(s), k1 = spans.end(s);
        kernels().sum_a8(q + begin * ld + k0, ld, end - begin, k1 - k0, sums + begin * spans.count + s, spans.count);
      }
      int8_t* const first = q + begin * ld;
      float* const whole = spans.count == 1 ? sums + begin : nullptr;
      kernels().order_a8(w.bits, first, ld, end - begin, w.kp, first, ld, w.kp, whole);
      if (blocks) kernels().start_a8(first, ld, end - begin, w.kp, starts + begin, a.m);
    });
  }
  Acts8 acts(int64_t kp) const { return {q, ld, scales, sums, kp, kNoJump, starts, start_at}; }
};

// One or two rows by whole panels from begin on, several together, each from the first to the last of a part of all.
// Returns where those begin that are left. Weights with groups gain nothing by it: their scales come in between.
int64_t few_rows8(const LinearArgs& a, const Acts8& acts, int64_t begin, int64_t end) {
  const Packed& w = a.weight;
  const bool apart = a.m <= 2 && a.panels && w.groups == 1 && kernels().gemm_a8_apart;
  const int64_t part = apart ? (std::min(end, w.n / kPanel) - begin) / kApart : 0;
  if (part <= 0) return begin;
  const auto each = [&] { return Panels8(w, a.panels, a.bias, a.activation); };
  Panels8 all[] = {each(), each(), each(), each()};
  static_assert(kApart == 4);
  const bool direct = a.type == Float::f32;
  const int64_t ld = direct ? w.n : kPanel;
  Buffer<float> room(direct ? 0 : kApart * a.m * kPanel);
  for (int64_t i = begin; i < begin + part; ++i) {
    const auto at = [&](int64_t p) { return (i + p * part) * kPanel; };
    const auto panel = [&](int64_t p) { return all[p].at(at(p), at(p) + kPanel); };
    const Panel8 panels[] = {panel(0), panel(1), panel(2), panel(3)};
    float* y[kApart];
    for (int p = 0; p < kApart; ++p) {
      fetch_grids(w, at(p) + kPanel, std::min(w.n, at(p) + 2 * kPanel));
      y[p] = direct ? static_cast<float*>(a.y) + at(p) : room + p * a.m * kPanel;
    }
    kernels().gemm_a8_apart(w, panels, acts, a.m, y, ld);
    for (int p = 0; p < kApart; ++p) {
      if (bends(a.activation)) kernels().activate(a.activation, y[p], a.m, kPanel, ld);
      for (int64_t m = 0; !direct && m < a.m; ++m) put(a, m, at(p), at(p) + kPanel, y[p] + m * ld);
    }
  }
  return begin + kApart * part;
}

void by_panels8(const LinearArgs& a, const float* x) {
  const Packed& w = a.weight;
  const Spans spans(w);
  const Rounded rounded(a, spans, x);
  const Acts8 acts = rounded.acts(w.kp);
  const bool direct = a.type == Float::f32;
  const int64_t least = w.k < kFarDepth ? kFarBytes : kFarBytesOfDeep;
  const bool far = direct && !bends(a.activation) && goes_far(static_cast<float*>(a.y), w.n, a.m * w.n, least);
  parallel_for(panel_count(w.n), ceil_div(kGrainMacs8, kPanel * w.kp * a.m), [&](int64_t begin, int64_t end) {
    Panels8 panels(w, a.panels, a.bias, a.activation);
    Buffer<float> room(direct && w.n % kWidest == 0 ? 0 : a.m * kPanel);
    for (int64_t p = few_rows8(a, acts, begin, end); p < end; ++p) {
      const int64_t n0 = p * kPanel, n1 = std::min(w.n, n0 + kPanel);
      Panel8 panel = panels.at(n0, n1);
      fetch_grids(w, n1, std::min(w.n, n1 + kPanel));
      panel.ahead = a.panels ? kernels().ahead(w.bits, a.m) : w.row(n1) - panel.codes;
      if (a.panels) panel.until = panel.codes + (end - p) * kPanel * packed_bytes(w.kp, w.bits);
      const bool in_place = direct && (n1 - n0) % kWidest == 0;
      float* y = in_place ? static_cast<float*>(a.y) + n0 : room;
      const int64_t ldy = in_place ? w.n : kPanel;
      panel.far = in_place && far, panel.next = kPanel;
      kernels().gemm_a8(w, panel, acts, a.m, y, ldy);
      if (bends(a.activation)) kernels().activate(a.activation, y, a.m, n1 - n0, ldy);
      for (int64_t m = 0; !in_place && m < a.m; ++m) put(a, m, n0, n1, y + m * kPanel);
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
  if (a.act8) {
    by_panels8(a, x);
  } else if (const int64_t length = kernels().words_length(w);
             length && a.m < kernels().gemm_from && kernels().words_fit(w, x, a.m * w.kp)) {
    by_words(a, x, length);
  } else if (a.m < kernels().gemm_from) {
    by_rows(a, [&](int64_t n0, int64_t n1, float* y, int64_t ld, float* grid) {
      kernels().gemv(w, n0, n1, x, a.m, y, ld, grid);
    });
  } else {
    by_panels(a, x);
  }
}

void activate(Activation f, void* y, Float type, int64_t count) {
  constexpr int64_t kOnce = 1024;
  parallel_for(ceil_div(count, kOnce), 16, [&](int64_t begin, int64_t end) {
    Buffer<float> room(type == Float::f32 ? 0 : kOnce);
    for (int64_t i = begin * kOnce; i < std::min(count, end * kOnce); i += kOnce) {
      const int64_t here = std::min(kOnce, count - i);
      char* at = static_cast<char*>(y) + i * (type == Float::f32 ? 4 : 2);
      float* floats = type == Float::f32 ? reinterpret_cast<float*>(at) : room;
      if (room) kernels().to_float(at, type, room, here);
      kernels().activate(f, floats, 1, here, here);
      if (room) kernels().from_float(room, type, at, here);
    }
  });
}

void probe_linear(const LinearArgs& a) {
  if (a.m > 0 && a.weight.n > 0 && a.variants > 0) by_panels(a, static_cast<const float*>(a.x));
}

}  // namespace mpq
