// The CPU kernels: one table of functions for each instruction set, chosen once at run time.
#pragma once
#include <cstdint>

#include "../packed.h"
#include "../spans.h"

namespace mpq {

enum class Float { f32, f16, bf16 };  // element type of activations, results, scales

// One group's outcome of `quantize`.
struct Grid {
  float scale, zero;  // already rounded to the stored type
  double error;       // sum of (weight - dequantized)^2
};

struct QuantizeOptions {
  int bits;
  bool symmetric;
  bool mse;          // search the range that minimises the squared error, else min-max
  bool half_scales;  // round scale and zero to fp16 before codes are chosen
};

// Scales of 8-bit activations that are known beforehand: one for all, or one for each group of the weight.
struct FixedScale {
  const float* values = nullptr;  // null: each group takes its own maximum
  bool each = false;
};

// What becomes of each result in the end. ReLUs keep it within a range, which `gemm_a8` and the filters do where they
// store it, at no cost.
enum class Activation { none, relu, relu6, silu, gelu };
struct Range {
  float low = -__builtin_inff(), high = __builtin_inff();
};
constexpr Range range_of(Activation f) {
  if (f != Activation::relu && f != Activation::relu6) return {};
  return {0, f == Activation::relu6 ? 6 : __builtin_inff()};
}
constexpr bool bends(Activation f) { return f == Activation::silu || f == Activation::gelu; }

constexpr int64_t kWidest = 16;  // floats in the widest vector of any instruction set
constexpr int64_t kLine = 64;    // bytes of a cache line

// Rows of one element type in memory, `stride` elements apart.
struct Rows {
  const void* data = nullptr;
  Float type = Float::f32;
  int64_t count = 0, stride = 0;

  int size() const { return type == Float::f32 ? 4 : 2; }  // bytes of an element
  const char* row(int64_t i) const { return static_cast<const char*>(data) + i * stride * size(); }
};

constexpr int64_t kStreams = 4;  // weight rows that `gemv_words` walks along at once, at the most

// Which grids `probe_errors` tries: every width with every fraction of a group's range.
struct ProbeOptions {
  const int64_t* bits;
  int64_t widths;
  const float* fractions;
  int64_t fraction_count;
  bool symmetric, half_scales;
};

// One row of a depthwise convolution's results for channels that lie side by side, at least in blocks of kWidest.
// Taps outside the row count nothing. Distances are in elements.
struct FilterRow {
  const float* x = nullptr;                       // the first pixel of the row that the first taps meet
  int64_t x_row = 0, x_pixel = 0, x_block = 0;    // from tap row to tap row, pixel to pixel, block to block of channels
  int64_t width = 0;                              // of the input
  const float* weights = nullptr;                 // [block][rows * columns][kWidest]
  int64_t rows = 0, columns = 0, w_block = 0;     // w_block: from block to block
  int64_t step = 1, padding = 0, dilation = 1;    // along the row, in pixels
  const float *scale = nullptr, *bias = nullptr;  // y = scale * sum + bias, for each channel,
  Range range;                                    // and that within the range
  float* y = nullptr;
  bool far = false;                                  // y goes past the caches: goes_far
  int64_t soon = 0;                                  // from results to some that memory is asked for, in floats; or 0
  int64_t y_pixel = 0, out_width = 0, channels = 0;  // channels: a multiple of kWidest
};

// A quad is four neighbouring pixels of each of kWidest channels, bytes q + 128 as [kWidest][4], in a row of pixels
// that begins with its padding and is cut into quads from there. A result begins with a quad's first or second pixel,
// or with those of the quad between two; where results lie a pixel apart weights are there twice, for either pixel.
// `halved`: w = 2 * weight + rest, as sizes above kByteMost need.
constexpr int64_t kQuad = 4 * kWidest;  // bytes
constexpr int64_t kByteMost = 127;
constexpr int64_t quad_steps(int64_t columns, int64_t step) { return ceil_div(columns + (step == 1), int64_t(4)); }
struct QuadShape {
  int64_t rows, columns, step;  // step: from result to result, 1 or 2 pixels
  bool halved;

  int64_t words() const { return rows * quad_steps(columns, step) * (2 / step) * kWidest; }
  int64_t sums() const { return (rows + 1) * kWidest; }
};
constexpr int64_t kCodesPast = 64;  // bytes behind codes that `quad_weights` may read

// Planes become rows of quads, `row` bytes each, by way of rows of bytes: of each channel as many at once as about
// kPlaneBytes hold. Vectors may reach a line past the last of them.
constexpr int64_t kPlaneBytes = 512;
constexpr int64_t plane_rows(int64_t row) { return row < kPlaneBytes * kWidest ? kPlaneBytes * kWidest / row : 1; }
constexpr int64_t plane_ld(int64_t row) { return (ceil_div(plane_rows(row) * row / kWidest, kLine) + 1) * kLine; }
constexpr int64_t plane_room(int64_t row) { return 2 * kWidest * plane_ld(row); }

// Results as bytes: rounded by the scale as in `round_act`, within low..high.
struct ByteGrid {
  float scale = 0;
  int8_t low = -127, high = 127;
};

// What kWidest channels of a depthwise convolution meet: quads of bytes q + 128, [kWidest][4], that follow each other
// without a gap.
struct QuadBlock {
  const uint8_t* x;                // the quad that the first step meets for the first result
  const uint32_t *weights, *rest;  // as `quad_weights` makes them, or no rest
  const int32_t *before, *upto;    // [kWidest]: a channel's weights add up to upto - before
  const float *scale, *bias;       // as in FilterRow
};

// Rows of their results, of blocks that lie side by side in y.
struct QuadTask {
  const QuadBlock* block = nullptr;
  int64_t blocks = 0;
  const int64_t* offsets = nullptr;  // [steps]: each step's quad from a block's x, in bytes
  int64_t steps = 0, step = 1;
  Range range;
  float* y = nullptr;
  bool far = false;      // as in FilterRow
  int64_t soon = 0;      // as in FilterRow
  int8_t* y8 = nullptr;  // in place of y: rounded
  ByteGrid grid;
  int64_t y_row = 0, y_pixel = 0, out_width = 0;
  int64_t rows = 1, x_row = 0;  // of results, and from row to row of pixels, in bytes
};

// Columns that one call of `gemm` works on together; its panels are this wide.
constexpr int64_t kPanel = 32;

// Up to kPanel rows of a weight as `gemm_a8` reads them. Columns past the last row hold anything; numbers are faster.
struct Panel8 {
  const uint8_t* codes;  // [word][kPanel][4]: packed words
  const float* scales;   // [groups][kPanel]
  const float* zeros;    // like scales, or [kPanel] for a weight with one zero
  const float* bias;     // [kPanel]
  Range range;           // of results
  Spans spans;           // of the weight's rows
  int64_t columns;       // rows of the weight that it holds
  int64_t ahead;         // from each code to one that memory is asked for meanwhile, in bytes; or 0
  const uint8_t* until;  // the end of this and the panels that follow it in memory, where they come next; or null
  bool far = false;      // floats of results go past the caches: goes_far
  int64_t next = 0;      // from these results to those of the next product, in floats
};

// Rows of 8-bit activations, `ld` bytes apart, in the order of `order_a8`. A row lies in pieces of so many bytes, a
// multiple of 16; from the end of each it is a jump to the next. With starts, for codes of 4 bits, all pieces but the
// last, and all spans of the weight but the last, are multiples of kStartCodes, since each such block takes its own.
constexpr int64_t kStartCodes = 64;
struct Acts8 {
  const int8_t* q;
  int64_t ld;
  const float *scales, *sums;  // [rows][groups], [rows][spans]
  int64_t piece;
  const int64_t* jumps;               // one for each piece; that behind the last is read, but goes nowhere
  const int32_t* starts = nullptr;    // as `start_a8` makes them, of rows one after the other, or none
  const int64_t* start_at = nullptr;  // for each block, where they are from there
};
constexpr int64_t kNoJump[1] = {};

constexpr int kApart = 4;  // panels for gemm_a8_apart

// Where tile (i, j <= i) of a Gram matrix lies among the others.
constexpr int64_t gram_tile_index(int64_t i, int64_t j) { return i * (i + 1) / 2 + j; }

struct Kernels {
  const char* name;

  // dst[i] = float(src[i]), and back with round to nearest even.
  void (*to_float)(const void* src, Float type, float* dst, int64_t count);
  void (*from_float)(const float* src, Float type, void* dst, int64_t count);

  // y = f(y) for rows that are ld apart; off by at most 4 * 2^-24 |y| where f is no range.
  void (*activate)(Activation f, float* y, int64_t rows, int64_t count, int64_t ld);

  // out[count] = the codes of one row from k = 0.
  void (*unpack)(const uint8_t* row, int bits, uint8_t* out, int64_t count);

  // out[(n - n0) * ld + k - k0] = scale * (code - zero) for rows n0..n1 and k0..k1; k0 is a multiple
  // of 32, k1 one too or Kp. `grid` holds 2 * groups floats of scratch.
  void (*dequantize)(const Packed& w, int64_t n0, int64_t n1, int64_t k0, int64_t k1, float* out, int64_t ld,
                     float* grid);

  // y[m * ldy + n - n0] = x[m] . w[n] for rows n0..n1: weights stay packed until they are in registers.
  // x is fp32 [rows][Kp], zero past K. `grid` holds 8 * groups floats.
  void (*gemv)(const Packed& w, int64_t n0, int64_t n1, const float* x, int64_t rows, float* y, int64_t ldy,
               float* grid);

  // The same for weights whose codes are taken a word a lane: `words_length` is the length of a row of activations in
  // their order, or 0 where the weight is not of that kind; `words_fit` whether it can meet these numbers;
  // `words_order` puts x[Kp] into the order, zeros past K. `scratch` holds kStreams * (2 * groups + kWidest) floats.
  int64_t (*words_length)(const Packed& w);
  bool (*words_fit)(const Packed& w, const float* x, int64_t count);
  void (*words_order)(const Packed& w, const float* x, float* out);
  void (*gemv_words)(const Packed& w, int64_t n0, int64_t n1, const float* x, int64_t rows, float* y, int64_t ldy,
                     float* scratch);

  // c[n * ldc + j] (+)= sum over k < depth of a[n * lda + k] * panel[k * kPanel + j], n < rows, j < columns
  // (rounded up to whole vectors); `first` overwrites c. a is dequantized weight that fits the cache.
  void (*gemm)(const float* a, int64_t lda, int64_t rows, const float* panel, int64_t columns, int64_t depth, float* c,
               int64_t ldc, bool first);
  // The same with x[k * ld + j] in place of panel[k * kPanel + j]; whole vectors are read.
  void (*gemm_at)(const float* a, int64_t lda, int64_t rows, const float* x, int64_t ld, int64_t columns, int64_t depth,
                  float* c, int64_t ldc, bool first);

  // out[i] = in[i] + value; out may be in.
  void (*add)(const float* in, float value, int64_t count, float* out);

  // y[m * ld + j] = in[m * in_ld + j] + bias[j], where there is a bias, within the range, for m < rows and j < count; y
  // may be in. Past the caches where it is far.
  void (*finish)(const float* in, int64_t in_ld, const float* bias, const Range& range, int64_t rows, int64_t count,
                 float* y, int64_t ld, bool far);

  bool far;  // whether stores past the caches pay: vectors that are lines
  // out[i] = in[i], past the caches.
  void (*copy_far)(const float* in, int64_t count, float* out);

  // out[j * out_ld + i] = in[i * in_ld + j] for i < rows, j < columns.
  void (*transpose)(const float* in, int64_t in_ld, int64_t rows, int64_t columns, float* out, int64_t out_ld);
  // The same of results that memory is asked for ahead, or, where they are far, past the caches: then out_ld is a
  // multiple of a line, in which `out` may begin anywhere.
  void (*transpose_out)(const float* in, int64_t in_ld, int64_t rows, int64_t columns, float* out, int64_t out_ld,
                        bool far);

  // out[i] = in[i * gap]
  void (*every)(const float* in, int64_t gap, int64_t count, float* out);

  // A depthwise convolution, pixels along vectors: y[i] = scale * (sum over t of weights[t] * x[offsets[t] + i]) + bias
  // for i < count rounded up to a multiple of kWidest, within the range, each sum one chain of multiply-adds over t.
  void (*filter_plane)(const float* x, const int64_t* offsets, const float* weights, int64_t taps, float scale,
                       float bias, const Range& range, float* y, int64_t count);
  // The same with channels along vectors.
  void (*filter_row)(const FilterRow& row);
  // out[c / kWidest * block + i * kWidest + c % kWidest] = x[i * pixel + c] for i < pixels, c < channels, zeros after
  // the last channel; with a scale rounded as in `round_act`, which tells what is not finite, else true.
  bool (*spread)(const float* x, int64_t pixel, int64_t pixels, int64_t channels, const float* scale, float* out,
                 int64_t block);
  // The same pixels, rounded as in `round_act`, or bytes already, as quads of a row that begins `padding` zeros before
  // them: out[c / kWidest * block + quad * 4 * kWidest]. Written is every quad that a pixel falls into; others are to
  // be of zeros, which is 128 in each byte.
  bool (*quads_of_floats)(const float* x, int64_t pixel, int64_t pixels, int64_t channels, float scale, int64_t padding,
                          uint8_t* out, int64_t block);
  void (*quads_of_bytes)(const int8_t* x, int64_t pixel, int64_t pixels, int64_t channels, int64_t padding,
                         uint8_t* out, int64_t block);
  // The same of whole rows of planes, of up to kWidest channels `plane` floats apart: every quad of rows is written,
  // which are `row` bytes long and hold padding and columns. `room` has plane_room(row) bytes, 128 each at first, and
  // serves one number of columns and one padding.
  bool (*quads_of_planes)(const float* x, int64_t plane, int64_t rows, int64_t columns, int64_t channels, float scale,
                          int64_t padding, uint8_t* out, int64_t row, uint8_t* room);
  // Weights each * code - offset of kWidest channels, whose codes lie ld bytes apart, as words of four taps,
  // [row][quad_steps][2 / step][kWidest], and their sums over all rows before each, [row + 1][kWidest].
  void (*quad_weights)(const QuadShape& shape, const uint8_t* codes, int64_t ld, int each, const int32_t* offsets,
                       uint32_t* weights, uint32_t* rest, int32_t* sums);
  // A depthwise convolution of quads, exact in its sums, with weights of a size up to quad_most. False where a result
  // to be rounded is not finite.
  bool (*filter_quads)(const QuadTask& task);
  int64_t quad_most;

  // max|x|, NaN where an x is not finite.
  float (*largest)(const float* x, int64_t count);
  // out[i] = round(x[i] / scale) within -127..127, all 0 where scale is not above 0; out may be x. False where an x is
  // not finite: what it becomes is of no use then.
  bool (*round_act)(const float* x, int64_t count, float scale, float* out);
  // The same as bytes, of rows that are x_ld and ld apart.
  bool (*round_bytes)(const float* x, int64_t x_ld, int64_t rows, int64_t count, float scale, int8_t* out, int64_t ld);

  // q[k] = round(x[k] / scale) over each group, within -127..127. scale is the fixed one, else max|x| / 127; NaN where
  // x is not finite. A scale that is not above 0 makes every q 0. kp is a multiple of kWidest.
  void (*quantize_act)(const float* x, int64_t kp, int64_t group, FixedScale fixed, int8_t* q, float* scale);

  // Rows of `count` bytes of activations from the order of k into that of a panel's codes, one within each 16, with
  // zeros up to `width`, a multiple of 16 and less than 32 more. `out` may be `in` where rows are as far apart. Their
  // sums, too, unless null: exact below 2^24.
  void (*order_a8)(int bits, const int8_t* in, int64_t in_ld, int64_t rows, int64_t count, int8_t* out, int64_t ld,
                   int64_t width, float* sums);
  // starts[i * step + r] = what sums of 16 bits start with in the i-th block of kStartCodes bytes of row r: minus 8
  // times the sum of the first two bytes of its quads, and, in the upper half, of the last two. A row's count is a
  // multiple of 32. Only where `starts_a8`; elsewhere products read none.
  bool starts_a8;
  void (*start_a8)(const int8_t* q, int64_t ld, int64_t rows, int64_t count, int32_t* starts, int64_t step);
  // sums[r * step] = the sum of `count` bytes, exact below 2^24, of rows ld bytes apart; up to kLine bytes are read in
  // any case.
  void (*sum_a8)(const int8_t* q, int64_t ld, int64_t rows, int64_t count, float* sums, int64_t step);

  // The codes of weight rows n0..n1, at most kPanel, as a panel: kPanel packed rows in size.
  void (*panel_a8)(const Packed& w, int64_t n0, int64_t n1, uint8_t* codes);
  // A panel's scales and zeros, all groups. `scratch` holds kPanel * groups floats.
  void (*grid_a8)(const Packed& w, int64_t n0, int64_t n1, float* scales, float* zeros, float* scratch);

  // Up to kPanel rows of a weight as fp32 panels, which are strips of `strip` columns, `step` floats apart:
  // out[j / strip * step + (k - k0) * strip + j % strip] = scale * (code - zero) of the panel's row j, as in
  // `dequantize`. k0 is a multiple of 32, and columns up to such a one are written.
  void (*panel_floats)(const Packed& w, const Panel8& panel, int64_t k0, int64_t k1, float* out, int64_t step);
  // The same from floats, weights[j * ld + k] for j < rows, k < columns.
  void (*turn_floats)(const float* weights, int64_t ld, int64_t rows, int64_t columns, float* out, int64_t step);
  int64_t strip;
  // c[m * ldc + j] (+)= sum over k < depth of x[m][from + k] * b[k * strip + j] for m < rows and j < columns of one
  // strip (rounded up to whole vectors; what is beyond it is left out); `first` overwrites c. One chain of
  // multiply-adds.
  void (*gemm_rows)(const float* const* x, int64_t from, int64_t rows, const float* b, int64_t columns, int64_t depth,
                    float* c, int64_t ldc, bool first);

  // y[m * ldy + j] = sum over spans of scale * a_scale * (sum of code * q - zero * sum of q), plus the bias, within
  // the range, for m < rows, at least one, and the panel's columns; others up to a multiple of kWidest may be written.
  // Sums of a span are exact; then fp32, in order.
  void (*gemm_a8)(const Packed& w, const Panel8& panel, const Acts8& a, int64_t rows, float* y, int64_t ldy);
  // The same of one or two rows and kApart whole panels of a weight with one group, to y[p][m * ld + j]. They are best
  // far apart in memory, with those that come next behind them. Null where nothing is gained by it.
  void (*gemm_a8_apart)(const Packed& w, const Panel8* panels, const Acts8& a, int64_t rows, float* const* y,
                        int64_t ld);
  // As `gemm_a8`, but bytes, and only for columns that the panel holds; false where one is not finite.
  bool (*gemm_a8_bytes)(const Packed& w, const Panel8& panel, const Acts8& a, int64_t rows, const ByteGrid& grid,
                        int8_t* y, int64_t ldy);

  // x[i] . x[j] over `depth` (a multiple of kWidest) for j <= i < n, a multiple of gram_tile, are added to tiles of
  // so many rows and columns, gram_sums numbers each. Meanwhile the same piece of the rows `next` is fetched.
  void (*gram)(const float* x, int64_t n, int64_t ld, int64_t depth, double* sums, const Rows& next);
  // The same of bf16, two in a word of x; ld and depth are words. Null where there is no instruction for it, and to
  // be called only if multiplies_bf16().
  void (*gram_pairs)(const float* x, int64_t n, int64_t ld, int64_t depth, double* sums, const Rows& next);
  int64_t gram_tile, gram_sums;
  // Rows of activations from which on decoding once into the cache, for `gemm`, beats `gemv`, which decodes for
  // every 4.
  int64_t gemm_from;

  // Bytes of panels that memory is asked for ahead while so many rows of activations meet them: measured, but for
  // AVX-VNNI, which takes what AVX2 does.
  int64_t (*ahead)(int bits, int64_t rows);

  // out[i * ld + k] = x[i][k], less x[0][k] with `shift`, for k < columns, and 0 up to a multiple of kWidest.
  // `first` holds as many floats of scratch.
  void (*load_rows)(const Rows& x, int64_t columns, bool shift, float* out, int64_t ld, float* first);

  // A row of k weights -> codes, and one grid a group. False when a weight is not finite or a scale does not fit its
  // type.
  bool (*quantize)(const float* w, int64_t k, int64_t group, const QuantizeOptions& how, uint8_t* codes, Grid* grids);

  // out[b * step + g * fractions + f] = the error that `quantize` would report for group g at width b and fraction f.
  bool (*probe_errors)(const float* w, int64_t k, int64_t group, const ProbeOptions& how, float* out, int64_t step);
};

extern const Kernels scalar_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;     // AVX2, FMA, F16C
extern const Kernels avxvnni_kernels;  // these and AVX-VNNI
extern const Kernels avx512_kernels;   // AVX-512 F, BW, DQ, VL, VNNI
#endif

// The best table that this processor runs, or the lower one that MPQKERN_ISA or `use_isa` asked for.
const Kernels& kernels();
// Whether the processor has bf16 products of its own, AVX512-BF16 (which torch's matrix library then uses too).
bool multiplies_bf16();
// Asks for "scalar", "avx2", "avxvnni", "avx512" or "" (the best); false when unknown or not to be had here.
bool use_isa(const char* name);

}  // namespace mpq
