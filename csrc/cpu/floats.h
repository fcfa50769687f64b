// Rows of fp32 activations by a weight whose panels are decoded as products come to them.
#pragma once
#include <algorithm>
#include <optional>
#include <vector>

#include "buffer.h"
#include "panels8.h"

namespace mpq {

// Where the k's of a row of activations lie: in pieces of one length, so many floats from its address.
struct Pieces {
  int64_t length;
  std::vector<int64_t> from;
};

class FloatPanels {
 public:
  static constexpr int64_t kTogether = 60;  // rows that meet a strip's piece before the next one comes

  // Of `floats` [N][K] where there are any.
  FloatPanels(const Packed& w, const float* floats) : w_(w), floats_(floats), panel_(kPanel * depth()) {
    if (!floats) codes_.emplace(w_, nullptr, nullptr, Activation::none);
  }

  // sums[m][kPanel] of activations at x[m] and weight rows n0..n1, at most kPanel. Of some m at a time: soon(m, m1)
  // before their last products, done(m, m1) behind them. Each sum is one chain of multiply-adds over k.
  template <class Soon, class Done>
  void multiply(int64_t n0, int64_t n1, const float* const* x, int64_t rows, const Pieces& pieces, float* sums,
                const Soon& soon, const Done& done) {
    const int64_t strip = kernels().strip, step = strip * depth();
    for (int64_t k0 = 0; k0 < w_.k; k0 += kDepth) {
      const int64_t k1 = std::min(w_.k, k0 + kDepth);
      decode(n0, n1, k0, k1, step);
      for (int64_t m = 0, m1; m < rows; m = m1) {
        m1 = std::min(rows, m + kTogether);
        if (k1 == w_.k) soon(m, m1);
        for (int64_t j = 0; j < n1 - n0; j += strip)
          for (int64_t k = k0, stop; k < k1; k = stop) {
            const int64_t piece = k / pieces.length, first = piece * pieces.length;
            stop = std::min({k1, first + pieces.length, k + kOnce});
            kernels().gemm_rows(x + m, pieces.from[piece] + k - first, m1 - m,
                                panel_ + j / strip * step + (k - k0) * strip, n1 - n0 - j, stop - k,
                                sums + m * kPanel + j, kPanel, k == 0);
          }
        if (k1 == w_.k) done(m, m1);
      }
    }
  }

 private:
  static constexpr int64_t kDepth = 1152;  // k's that are decoded at once: 144 KiB, part of a level 2 cache
  static constexpr int64_t kOnce = 256;    // of a product: with AVX2 a strip of 16 KiB, half of a level 1 cache

  int64_t depth() const { return std::min(kDepth, w_.kp); }

  void decode(int64_t n0, int64_t n1, int64_t k0, int64_t k1, int64_t step) {
    if (floats_) return kernels().turn_floats(floats_ + n0 * w_.k + k0, w_.k, n1 - n0, k1 - k0, panel_, step);
    if (k0 == 0) words_.emplace(codes_->at(n0, n1));
    kernels().panel_floats(w_, *words_, k0, k1, panel_, step);
  }

  const Packed& w_;
  const float* const floats_;
  std::optional<Panels8> codes_;
  std::optional<Panel8> words_;
  Buffer<float> panel_;
};

}  // namespace mpq
