// The weight layout of the matrix kernels, derived from the packed format: tiles of 16 rows by 256 / bits codes, 512
// bytes each, and in a tile 16 bytes for every lane of a warp, so that a warp reads a tile with one wide load and every
// lane finds what mma.sync expects of it by masks and shifts alone.
//
//   uint32 [ceil(N / 16)][ceil(Kp / depth)][32 lanes][4 words],  depth = 256 / bits
//
// A code's place follows from its row n = 8p + g (mod 16) and its k = 16f + 8h + 2c + o (mod 32):
//
//   lane = 4g + c
//   bits = 2   word = block (k / 32 within the tile)   first bit = 16o + 8f + 4h + 2p
//   bits = 4   word = 2 block + h                      first bit = 16o + 8f + 4p
//   bits = 8   word = 2h + p                           first bit = 16o + 8f
//
// So the 16-bit halves of (word >> 8f) hold codes of k and k + 1: a register of the m16n8k16 fragment a[2h + p] once
// all else is masked away. Bytes of a word, masked alike, are the fragment a[2h + p] of m16n8k32, whose k runs in the
// order of `byte_place`. Codes past N or Kp are 0.
#pragma once
#include "../packed.h"

namespace mpq {

constexpr int64_t kStrip = 16;       // rows of a tile
constexpr int64_t kTileWords = 128;  // 512 bytes

MPQ_HD constexpr int tile_depth(int bits) { return 256 / bits; }  // codes of a row in a tile
MPQ_HD constexpr int64_t strips(int64_t n) { return ceil_div(n, kStrip); }
MPQ_HD constexpr int64_t tiles_deep(int64_t kp, int bits) { return ceil_div(kp, tile_depth(bits)); }
MPQ_HD constexpr int64_t fragment_words(int64_t n, int64_t kp, int bits) {
  return strips(n) * tiles_deep(kp, bits) * kTileWords;
}

// A code of lane `lane`, in bits shift .. shift + bits - 1 of one of its words.
struct Place {
  int row, k;  // within the tile
};
MPQ_HD constexpr Place place_in_tile(int bits, int lane, int word, int shift) {
  const int g = lane / 4, c = lane % 4, o = shift / 16, f = shift / 8 % 2;
  const int block = bits == 2 ? word : bits == 4 ? word / 2 : 0;
  const int h = bits == 2 ? shift / 4 % 2 : bits == 4 ? word % 2 : word / 2;
  const int p = bits == 2 ? shift / 2 % 2 : bits == 4 ? shift / 4 % 2 : word % 2;
  return {8 * p + g, 32 * block + 16 * f + 8 * h + 2 * c + o};
}

// And back: the word of the whole weight that holds code (n, k), and its first bit there.
struct Spot {
  int64_t word;
  int shift;
};
MPQ_HD constexpr Spot spot_of(int bits, int64_t kp, int64_t n, int64_t k) {
  const int depth = tile_depth(bits), g = int(n % 8), p = int(n / 8 % 2);
  const int in = int(k % depth), block = in / 32, f = in / 16 % 2, h = in / 8 % 2, c = in / 2 % 4, o = in % 2;
  const int word = bits == 2 ? block : bits == 4 ? 2 * block + h : 2 * h + p;
  const int low = bits == 2 ? 4 * h + 2 * p : bits == 4 ? 4 * p : 0;
  return {((n / kStrip * tiles_deep(kp, bits) + k / depth) * 32 + 4 * g + c) * 4 + word, 16 * o + 8 * f + low};
}

// Where an 8-bit activation k (mod 32) stands in its block of 32 bytes: at 16h + 4c + 2o + f.
MPQ_HD constexpr int byte_place(int k) { return 16 * (k / 8 % 2) + 4 * (k / 2 % 4) + 2 * (k % 2) + k / 16 % 2; }

}  // namespace mpq
