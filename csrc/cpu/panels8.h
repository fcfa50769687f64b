// Panels of codes with all that goes with them, for products with 8-bit activations.
#pragma once
#include <algorithm>

#include "buffer.h"
#include "drivers.h"

namespace mpq {

// A weight's panels, one at a time, and a thread's room for it: scales and zeros as they are read, the bias, and codes
// unless those are at hand.
class Panels8 {
 public:
  // `made`: what `code_panels` left, or null. `bias`: of all rows, or null.
  Panels8(const Packed& w, const uint8_t* made, const float* bias, Activation activation)
      : w_(w),
        made_(made),
        bias_(bias),
        range_(range_of(activation)),
        spans_(w),
        bytes_(kPanel * packed_bytes(w.kp, w.bits)),
        codes_(made ? 0 : bytes_),
        scales_(kPanel * w.groups),
        zeros_(kPanel * w.groups),
        scratch_(kPanel * w.groups) {
    // For columns without a row before there is one: what memory held would often look as if it could not be rounded.
    for (float* grid : {&scales_[0], &zeros_[0]}) std::fill_n(grid, kPanel * w.groups, 0.0f);
  }

  // Weight rows n0..n1, at most kPanel, until the next ones; with `made`, n0 is a multiple of kPanel.
  Panel8 at(int64_t n0, int64_t n1) {
    kernels().grid_a8(w_, n0, n1, scales_, zeros_, scratch_);
    if (!made_) kernels().panel_a8(w_, n0, n1, codes_);
    if (bias_) std::copy(bias_ + n0, bias_ + n1, its_bias_);
    const uint8_t* codes = made_ ? made_ + n0 / kPanel * bytes_ : codes_;
    return {codes, scales_, zeros_, its_bias_, range_, spans_, n1 - n0, 0, nullptr, false, 0};
  }

 private:
  const Packed& w_;
  const uint8_t* made_;
  const float* bias_;
  const Range range_;
  const Spans spans_;
  const int64_t bytes_;
  Buffer<uint8_t> codes_;
  Buffer<float> scales_, zeros_, scratch_;
  float its_bias_[kPanel] = {};
};

}  // namespace mpq
