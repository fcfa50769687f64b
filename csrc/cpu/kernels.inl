// The kernels, written once over `Isa` (a vec_*.h) and compiled once for each instruction set.
// Everything is in an unnamed namespace: a weak symbol built with AVX-512 could otherwise be linked
// into every processor's path.
#include <cfloat>
#include <cmath>

#include "kernels.h"

namespace {

using mpq::Float;
using mpq::kBlock;
using mpq::kPanel;
using mpq::Packed;

constexpr int kVecs = kBlock / Isa::kWidth;  // vectors that hold a block's 32 weights

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline bool finite(float v) { return v <= FLT_MAX && v >= -FLT_MAX; }

// Adding and taking away 1.5 * 2^23 rounds |v| < 2^22 to the nearest even integer, on every processor.
constexpr float kRound = 12582912.0f;

// Loops over arrays that are to be registers are unrolled before anything else happens to them.
#define MPQ_UNROLL _Pragma("GCC unroll 32")

// A vector of results: past the caches where y is far (goes_far).
inline void store_result(float* y, typename Isa::Vec v, bool far) {
  if (Isa::kFar && far)
    Isa::store_far(y, v);
  else
    Isa::store(y, v);
}

// ---- floating point types ---------------------------------------------------------------------

void to_float(const void* src, Float type, float* dst, int64_t count) {
  if (type == Float::f16) return Isa::halves_to_floats(static_cast<const uint16_t*>(src), dst, count);
  if (type == Float::f32) {
    std::memcpy(dst, src, count * sizeof(float));
    return;
  }
  const uint16_t* s = static_cast<const uint16_t*>(src);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = uint32_t(s[i]) << 16;
    std::memcpy(dst + i, &bits, 4);
  }
}

void from_float(const float* src, Float type, void* dst, int64_t count) {
  if (type == Float::f16) return Isa::floats_to_halves(src, static_cast<uint16_t*>(dst), count);
  if (type == Float::f32) {
    std::memcpy(dst, src, count * sizeof(float));
    return;
  }
  uint16_t* d = static_cast<uint16_t*>(dst);
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, src + i, 4);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    d[i] = uint16_t(nan ? 0x7fc0 : rounded);
  }
}

void load_rows(const mpq::Rows& x, int64_t columns, bool shift, float* out, int64_t ld, float* first) {
  const int64_t width = mpq::ceil_div(columns, mpq::kWidest) * mpq::kWidest;
  to_float(x.row(0), x.type, first, columns);
  for (int64_t i = 0; i < x.count; ++i, out += ld) {
    const char* ahead = x.row(i + 1 < x.count ? i + 1 : i);
    for (int64_t b = 0; b < columns * x.size(); b += 64) __builtin_prefetch(ahead + b);
    if (shift && x.type == Float::f32) {
      const float* row = reinterpret_cast<const float*>(x.row(i));
      for (int64_t k = 0; k < columns; ++k) out[k] = row[k] - first[k];
    } else {
      to_float(x.row(i), x.type, out, columns);
      if (shift)
        for (int64_t k = 0; k < columns; ++k) out[k] -= first[k];
    }
    for (int64_t k = columns; k < width; ++k) out[k] = 0;
  }
}

// ---- one row's scales and zeros, as floats ------------------------------------------------------

struct RowGrid {
  const float *scale, *zero;
  int step;  // 0 when one zero serves every group
};

// `scratch` holds 2 * groups floats; rows stored as fp32 are read in place.
inline RowGrid row_grid(const Packed& w, int64_t n, float* scratch) {
  const int64_t at = n * w.groups;
  RowGrid g{scratch, scratch + w.groups, w.zero_each ? 1 : 0};
  if (w.half) {
    Isa::halves_to_floats(static_cast<const uint16_t*>(w.scales) + at, scratch, w.groups);
    if (w.zeros)
      Isa::halves_to_floats(static_cast<const uint16_t*>(w.zeros) + (w.zero_each ? at : 0), scratch + w.groups,
                            w.zero_each ? w.groups : 1);
  } else {
    g.scale = static_cast<const float*>(w.scales) + at;
    if (w.zeros) g.zero = static_cast<const float*>(w.zeros) + (w.zero_each ? at : 0);
  }
  if (!w.zeros) scratch[w.groups] = mpq::mid_zero(w.bits);
  return g;
}

// ---- unpack, dequantize ---------------------------------------------------------------------------

template <int BITS>
void unpack_row(const uint8_t* row, uint8_t* out, int64_t count) {
  constexpr int kBytes = kBlock * BITS / 8;
  int64_t k = 0;
  for (; k + 2 * kBlock <= count; k += 2 * kBlock) Isa::template unpack_two<BITS>(row + k / kBlock * kBytes, out + k);
  for (; k + kBlock <= count; k += kBlock)
    Isa::store_codes(out + k, Isa::template codes<BITS>(row + k / kBlock * kBytes));
  for (; k < count; ++k) out[k] = mpq::get_code(row, k, BITS);
}

void unpack(const uint8_t* row, int bits, uint8_t* out, int64_t count) {
  if (bits == 2) unpack_row<2>(row, out, count);
  if (bits == 4) unpack_row<4>(row, out, count);
  if (bits == 8) unpack_row<8>(row, out, count);
}

template <int BITS>
void dequantize_rows(const Packed& w, int64_t n0, int64_t n1, int64_t k0, int64_t k1, float* out, int64_t ld,
                     float* scratch) {
  constexpr int kBytes = kBlock * BITS / 8;
  for (int64_t n = n0; n < n1; ++n, out += ld) {
    const RowGrid g = row_grid(w, n, scratch);
    for (int64_t k = k0; k < k1;) {
      const int64_t i = k / w.group, end = smaller(k1, (i + 1) * w.group);
      const typename Isa::template Decoder<BITS> decode(g.scale[i], g.zero[i * g.step]);
      for (; k < end; k += kBlock) {
        typename Isa::Vec v[kVecs];
        decode(w.row(n) + k / kBlock * kBytes, v);
        for (int b = 0; b < kVecs; ++b) Isa::store(out + k - k0 + b * Isa::kWidth, v[b]);
      }
    }
  }
}

void dequantize(const Packed& w, int64_t n0, int64_t n1, int64_t k0, int64_t k1, float* out, int64_t ld,
                float* scratch) {
  if (w.bits == 2) dequantize_rows<2>(w, n0, n1, k0, k1, out, ld, scratch);
  if (w.bits == 4) dequantize_rows<4>(w, n0, n1, k0, k1, out, ld, scratch);
  if (w.bits == 8) dequantize_rows<8>(w, n0, n1, k0, k1, out, ld, scratch);
}

// ---- few rows of activations: decode weights in registers, multiply at once ------------------------

// R weight rows (as many read streams) by C activation rows; every decoded vector serves C products.
template <int BITS, int R, int C>
inline void gemv_tile(const Packed& w, int64_t n, const RowGrid* grid, const float* x, float* y, int64_t ldy) {
  constexpr int kBytes = kBlock * BITS / 8;
  typename Isa::Vec acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) acc[r][c] = Isa::zero();
  const uint8_t* row[R];
  for (int r = 0; r < R; ++r) row[r] = w.row(n + r);
  const int64_t next = R * mpq::packed_bytes(w.kp, BITS);  // rows end too soon for the processor to fetch ahead itself
  for (int64_t i = 0, k = 0; i < w.groups; ++i) {
    typename Isa::template Decoder<BITS> decode[R];
    for (int r = 0; r < R; ++r) decode[r] = {grid[r].scale[i], grid[r].zero[i * grid[r].step]};
    for (const int64_t end = smaller(w.kp, k + w.group); k < end; k += kBlock) {
      const int64_t at = k / kBlock * kBytes;
      for (int r = 0; r < R; ++r) {
        if (at % 64 == 0) __builtin_prefetch(row[r] + next + at);
        typename Isa::Vec v[kVecs];
        decode[r](row[r] + at, v);
        for (int c = 0; c < C; ++c)
          for (int b = 0; b < kVecs; ++b)
            acc[r][c] = Isa::fma(v[b], Isa::load(x + c * w.kp + k + b * Isa::kWidth), acc[r][c]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) y[c * ldy + r] = Isa::sum(acc[r][c]);
}

template <int BITS, int R>
inline void gemv_rows(const Packed& w, int64_t n, const float* x, int64_t rows, float* y, int64_t ldy, float* scratch) {
  RowGrid grid[R];
  for (int r = 0; r < R; ++r) grid[r] = row_grid(w, n + r, scratch + 2 * w.groups * r);
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) gemv_tile<BITS, R, 4>(w, n, grid, x + m * w.kp, y + m * ldy, ldy);
  x += m * w.kp, y += m * ldy;
  if (rows - m == 3) gemv_tile<BITS, R, 3>(w, n, grid, x, y, ldy);
  if (rows - m == 2) gemv_tile<BITS, R, 2>(w, n, grid, x, y, ldy);
  if (rows - m == 1) gemv_tile<BITS, R, 1>(w, n, grid, x, y, ldy);
}

template <int BITS>
void gemv_bits(const Packed& w, int64_t n0, int64_t n1, const float* x, int64_t rows, float* y, int64_t ldy,
               float* scratch) {
  int64_t n = n0;
  if (rows < 3)  // then there are few sums to hide each other's latency: 4 streams
    for (; n + 4 <= n1; n += 4) gemv_rows<BITS, 4>(w, n, x, rows, y + n - n0, ldy, scratch);
  for (; n + 2 <= n1; n += 2) gemv_rows<BITS, 2>(w, n, x, rows, y + n - n0, ldy, scratch);
  for (; n < n1; ++n) gemv_rows<BITS, 1>(w, n, x, rows, y + n - n0, ldy, scratch);
}

void gemv(const Packed& w, int64_t n0, int64_t n1, const float* x, int64_t rows, float* y, int64_t ldy,
          float* scratch) {
  if (w.bits == 2) gemv_bits<2>(w, n0, n1, x, rows, y, ldy, scratch);
  if (w.bits == 4) gemv_bits<4>(w, n0, n1, x, rows, y, ldy, scratch);
  if (w.bits == 8) gemv_bits<8>(w, n0, n1, x, rows, y, ldy, scratch);
}

// ---- moves ----------------------------------------------------------------------------------------

void add(const float* in, float value, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = in[i] + value;
}

// Floats before the first line's start.
inline int64_t floats_to_line(const float* p) {
  constexpr int64_t kFloats = mpq::kLine / int64_t(sizeof(float));
  return (kFloats - int64_t(reinterpret_cast<uintptr_t>(p) / sizeof(float) % kFloats)) % kFloats;
}

void copy_far(const float* in, int64_t count, float* out) {
  const int64_t first = smaller(count, floats_to_line(out)), last = count - (count - first) % mpq::kWidest;
  std::memcpy(out, in, first * sizeof(float));
  for (int64_t i = first; i < last; i += Isa::kWidth) Isa::store_far(out + i, Isa::load(in + i));
  std::memcpy(out + last, in + last, (count - last) * sizeof(float));
}

// By squares of S x S, of which the last overlap those before; by smaller ones where there is none, and single numbers.
// `in` is walked S rows after S rows, or, with OUT, `out` is, and memory is asked for its next S rows.
template <int S, bool OUT>
void transpose_by(const float* in, int64_t in_ld, int64_t rows, int64_t columns, float* out, int64_t out_ld) {
  auto square = [&](int64_t row, int64_t column) __attribute__((always_inline)) {
    const int64_t i = rows < S ? row : smaller(row, rows - S), j = columns < S ? column : smaller(column, columns - S);
    const float* from = in + i * in_ld + j;
    float* to = out + j * out_ld + i;
    const int64_t height = smaller(S, rows - i), width = smaller(S, columns - j);
    if (height == S && width == S) {
      if constexpr (S == 8) {
        Isa::transpose8(from, in_ld, to, out_ld);
      } else {
        typename Isa::Bytes words[S];
        Isa::transpose_words(reinterpret_cast<const uint8_t*>(from), 4 * in_ld, words);
        for (int r = 0; r < S; ++r) Isa::store_bytes(to + r * out_ld, words[r]);
      }
    } else if constexpr (S > 8) {
      transpose_by<8, OUT>(from, in_ld, height, width, to, out_ld);
    } else {
      for (int64_t r = 0; r < height; ++r)
        for (int64_t c = 0; c < width; ++c) to[c * out_ld + r] = from[r * in_ld + c];
    }
  };
  if constexpr (OUT) {
    for (int64_t column = 0; column < columns; column += S)
      for (int64_t row = 0; row < rows; row += S) {
        for (int64_t r = 0; row % mpq::kWidest == 0 && r < smaller(S, columns - column - S); ++r)
          __builtin_prefetch(out + (column + S + r) * out_ld + row, 1);
        square(row, column);
      }
  } else {
    for (int64_t row = 0; row < rows; row += S)
      for (int64_t column = 0; column < columns; column += S) square(row, column);
  }
}

constexpr int kSquare = Isa::kWidth > 8 ? Isa::kWidth : 8;
void transpose(const float* in, int64_t in_ld, int64_t rows, int64_t columns, float* out, int64_t out_ld) {
  transpose_by<kSquare, false>(in, in_ld, rows, columns, out, out_ld);
}

// Far: whole lines of each row of `out`, one after the other, and what is before and behind them as above.
void transpose_out(const float* in, int64_t in_ld, int64_t rows, int64_t columns, float* out, int64_t out_ld,
                   bool far) {
  if (!Isa::kFar || !far) return transpose_by<kSquare, true>(in, in_ld, rows, columns, out, out_ld);
  constexpr int64_t S = Isa::kWidth;
  const int64_t first = smaller(rows, floats_to_line(out)), last = rows - (rows - first) % mpq::kWidest;
  transpose(in, in_ld, first, columns, out, out_ld);
  for (int64_t j = 0; j < columns; j += S) {
    const int64_t width = smaller(S, columns - j);
    for (int64_t i = first; width == S && i < last; i += S) {
      typename Isa::Bytes square[S];
      Isa::transpose_words(reinterpret_cast<const uint8_t*>(in + i * in_ld + j), 4 * in_ld, square);
      for (int r = 0; r < S; ++r) Isa::store_bytes_far(out + (j + r) * out_ld + i, square[r]);
    }
    if (width < S) transpose(in + first * in_ld + j, in_ld, last - first, width, out + j * out_ld + first, out_ld);
  }
  transpose(in + last * in_ld, in_ld, rows - last, columns, out + last, out_ld);
}

}  // namespace

#include "activate.inl"
#include "acts8.inl"
#include "act.inl"
#include "landing8.inl"
#include "panels8.inl"
#include "asked8.inl"
#include "a8.inl"
#include "apart8.inl"
#include "depthwise.inl"
#include "quads.inl"
#include "quad_filter.inl"
#include "gemm.inl"
#include "gemv_words.inl"
#include "gram.inl"
#include "quantize.inl"

// clang-format off
#define MPQ_KERNELS(table, isa)                                                              \
  const mpq::Kernels mpq::table = {                                                          \
      isa, to_float, from_float, activate, unpack, dequantize, gemv, words_length, words_fit,\
      words_order, gemv_words, gemm, gemm_at, add, finish, Isa::kFar, copy_far, transpose,   \
      transpose_out, every, filter_plane, filter_row, spread, quads_of_floats,               \
      quads_of_bytes, quads_of_planes, quad_weights, filter_quads, Isa::kQuadMost, largest,  \
      round_act, round_bytes, quantize_act, order_a8, Isa::kStarts, start_a8, sum_a8,        \
      panel_a8, grid_a8, panel_floats, turn_floats, kStrip, gemm_rows, gemm_a8,              \
      gemm_a8_apart(), gemm_a8_bytes, gram<false>, gram_pairs(), T, kTileSums,               \
      Isa::kGemmFrom, Isa::ahead, load_rows, quantize, probe_errors}
// clang-format on
