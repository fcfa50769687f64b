// Whole problems on raw pointers: split over threads, staged through the cache, handed to `kernels()`.
#pragma once
#include "kernels.h"

namespace mpq {

// y[M][N] = activation(x[M][K] . weight^T + bias), x and y of one type. act8: activations rounded to 8 bits per row
// and group of the weight, or with `act_scale`; exact integer products.
struct LinearArgs {
  Packed weight;
  const void* x = nullptr;
  const float* bias = nullptr;  // [N] or null
  void* y = nullptr;
  Float type = Float::f32;
  int64_t m = 0;
  bool act8 = false;
  FixedScale act_scale;
  Activation activation = Activation::none;
  const uint8_t* panels = nullptr;  // what `code_panels` made, or null; with act8
  const float* floats = nullptr;    // `probe_linear`: [variants][N][K] in place of packed codes
  int64_t variants = 1;
};
void linear(const LinearArgs& args);

// Blocks that have starts, of rows that are as long as the weight's; 0 where products cannot take what `start_a8`
// makes, or gain nothing by it. `meetings`: of each activation with weights.
constexpr int64_t kMinMeetings = 128;  // twice as many as, counted in instructions, pay for a start
inline int64_t started_blocks(const Packed& w, int64_t meetings) {
  if (w.bits != 4 || !kernels().starts_a8 || w.kp <= kStartCodes / 2 || meetings < kMinMeetings) return 0;
  const Spans spans(w);
  for (int64_t s = 0; s < spans.count; ++s)
    if (spans.begin(s) % kStartCodes != 0) return 0;
  return ceil_div(w.kp, kStartCodes);
}

// y[i] = f(y[i]), computed in fp32.
void activate(Activation f, void* y, Float type, int64_t count);

// y[variants][M][N]: many fp32 weights of one shape meet the same x, which is laid out for them once. Every result
// is one chain of multiply-adds over k in order, so it depends on no other row, variant, shape or thread.
// `weight` gives only n and k = kp.
void probe_linear(const LinearArgs& args);

// Strides are in elements, in the order batch, channel, row, column. act8: one scale a sample, or `act_scale`.
//
// Convolutions that follow each other may hand on bytes: results that are rounded by the scale that the next one would
// round them by. Bytes lie channels last without gaps, and a sample that is not finite is kSpoiled all over, of which
// its first byte tells.
struct ConvArgs {
  Packed weight;
  const float* x = nullptr;
  const float* bias = nullptr;
  float* y = nullptr;
  int64_t batch, in_channels, height, width, out_height, out_width, groups;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t x_stride[4], y_stride[4];
  bool act8 = false;
  FixedScale act_scale;  // one for all
  Activation activation = Activation::none;
  const uint8_t* panels = nullptr;  // as in LinearArgs; of use where a group's rows fill panels
  const int8_t* x8 = nullptr;       // in place of x: rounded by act_scale; with act8
  int8_t* y8 = nullptr;             // in place of y: rounded by y8_scale; with act8
  float y8_scale = 0;
  const float* floats = nullptr;  // `probe_conv2d`: [variants][N][channels][row][column] in place of packed codes
  int64_t variants = 1;

  int64_t pixels() const { return batch * out_height * out_width; }
  bool bytes() const { return x8 || y8; }
};
void conv2d(const ConvArgs& args);
constexpr int8_t kSpoiled = -128;

// y[variants][batch]...: as probe_linear; patches are gathered once for all variants.
void probe_conv2d(const ConvArgs& args);

// The Gram matrix x x^T of n samples of `columns` features each, fp64 [n][n]: fp32 sums over 512 columns, fp64 from
// there on. center: every feature less its mean over the samples. Where the processor multiplies bf16, bf16 features
// meet as they are: exact products, fp32 sums over 1024 columns (64 steps a lane), but products below 2^-126 count
// as 0.
void gram(const Rows& x, int64_t columns, bool center, double* out);

// out[i][j] = <K_i, K_j> / (|K_i| |K_j|) for `count` Gram matrices [n][n], which are overwritten. debiased: their
// diagonals are dropped and they are U-centred first. A matrix of zeros is orthogonal to all others.
void orthogonality(double* grams, int64_t count, int64_t n, bool debiased, double* out);

// A weight's codes once more, in the order in which products with 8-bit activations read them: panels of kPanel rows,
// [word][kPanel][4 bytes] of packed codes each, the last one filled up with anything.
constexpr int64_t panel_count(int64_t n) { return ceil_div(n, kPanel); }
inline int64_t panel_bytes(const Packed& w) { return panel_count(w.n) * kPanel * packed_bytes(w.kp, w.bits); }
void code_panels(const Packed& w, uint8_t* out);

void pack(const uint8_t* codes, int64_t n, int64_t k, int bits, uint8_t* out);
void unpack(const uint8_t* packed, int64_t n, int64_t k, int bits, uint8_t* out);
void dequantize(const Packed& w, float* out);  // [N][K]

// weight fp32 [N][K] -> packed codes, scales, zeros ([N][groups], or one when symmetric), squared errors
// [N][groups]. Returns -1, or the first row that is not finite or too large for fp16 scales.
struct QuantizeArgs {
  const float* weight = nullptr;
  int64_t n = 0, k = 0, group = 0;
  QuantizeOptions how{};
  uint8_t* packed = nullptr;
  void *scales = nullptr, *zeros = nullptr;
  float* errors = nullptr;
};
int64_t quantize(const QuantizeArgs& args);

// The errors that `quantize` would report: out [widths][N][groups][fractions]. Reads the weight once; returns as
// quantize does.
struct ProbeErrorsArgs {
  const float* weight = nullptr;
  int64_t n = 0, k = 0, group = 0;
  ProbeOptions how{};
  float* out = nullptr;
};
int64_t probe_errors(const ProbeErrorsArgs& args);

}  // namespace mpq
