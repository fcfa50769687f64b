// Where products find weights as fp32: in memory, or decoded from their packed form.
#pragma once
#include "kernels.h"

namespace mpq {

struct Block {
  const float* data;
  int64_t ld;  // floats from row to row
};

// Rows n0..n1, columns k0..k1: of `floats` [N][K] when there are any, else decoded from w into `room` with rows
// `ld` floats apart. `grid` holds 2 * w.groups floats of scratch.
inline Block fp32_block(const Packed& w, const float* floats, int64_t n0, int64_t n1, int64_t k0, int64_t k1,
                        float* room, int64_t ld, float* grid) {
  if (floats) return {floats + n0 * w.k + k0, w.k};
  kernels().dequantize(w, n0, n1, k0, k1, room, ld, grid);
  return {room, ld};
}

}  // namespace mpq
