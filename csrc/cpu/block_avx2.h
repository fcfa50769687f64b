// The innermost products of 2- and 4-bit weights with 8-bit activations, written out: sums of a tile, factors and what
// is on its way fill all 16 registers, and compilers take more. Included by vec_avx2.h.
#include <cstdint>

namespace {

// clang-format off
// ymm0 and ymm1 hold the sums of row 0, ymm2 and ymm3 those of row 1, ...; ymm12 and ymm13 a quad of codes of 16 weight
// rows; ymm14 and ymm15 what is on its way. `at` is a distance in bytes.
#define MPQ_ROW(place, left, right)                  \
  "vpbroadcastd " place ", %%ymm14\n\t"              \
  "vpmaddubsw %%ymm14, %%ymm12, %%ymm15\n\t"         \
  "vpaddw %%ymm15, %%ymm" left ", %%ymm" left "\n\t" \
  "vpmaddubsw %%ymm14, %%ymm13, %%ymm14\n\t"         \
  "vpaddw %%ymm14, %%ymm" right ", %%ymm" right "\n\t"
#define MPQ_ROWS_1(at) MPQ_ROW(at "(%[q])", "0", "1")
#define MPQ_ROWS_2(at) MPQ_ROWS_1(at) MPQ_ROW(at "(%[q],%[ld])", "2", "3")
#define MPQ_ROWS_3(at) MPQ_ROWS_2(at) MPQ_ROW(at "(%[q],%[ld],2)", "4", "5")
#define MPQ_ROWS_4(at) MPQ_ROWS_3(at) MPQ_ROW(at "(%[q3])", "6", "7")
#define MPQ_ROWS_5(at) MPQ_ROWS_4(at) MPQ_ROW(at "(%[q3],%[ld])", "8", "9")
#define MPQ_ROWS_6(at) MPQ_ROWS_5(at) MPQ_ROW(at "(%[q3],%[ld],2)", "10", "11")

// The lowest field of the codes at `at`, and one that is so many bits higher.
#define MPQ_LOWEST(at)                              \
  "vmovdqa %[mask], %%ymm12\n\t"                    \
  "vpand " at "+32(%[codes]), %%ymm12, %%ymm13\n\t" \
  "vpand " at "(%[codes]), %%ymm12, %%ymm12\n\t"
#define MPQ_FIELD(at, bits)                  \
  "vmovdqu " at "(%[codes]), %%ymm12\n\t"    \
  "vmovdqu " at "+32(%[codes]), %%ymm13\n\t" \
  "vpsrlw $" bits ", %%ymm12, %%ymm12\n\t"   \
  "vpsrlw $" bits ", %%ymm13, %%ymm13\n\t"   \
  "vpand %[mask], %%ymm12, %%ymm12\n\t"      \
  "vpand %[mask], %%ymm13, %%ymm13\n\t"

// 16 codes of each weight row.
#define MPQ_STEP_2(rows)             \
  MPQ_LOWEST("0") rows("0")          \
  MPQ_FIELD("0", "2") rows("4")      \
  MPQ_FIELD("0", "4") rows("8")      \
  MPQ_FIELD("0", "6") rows("12")
#define MPQ_STEP_4(rows)             \
  MPQ_LOWEST("0") rows("0")          \
  MPQ_FIELD("0", "4") rows("4")      \
  MPQ_LOWEST("128") rows("8")        \
  MPQ_FIELD("128", "4") rows("12")

// Of a whole panel those take so many bytes; and two lines are asked for into level 2.
#define MPQ_BYTES_2 "128"
#define MPQ_BYTES_4 "256"
#define MPQ_FETCH "prefetcht1 (%[soon])\n\tprefetcht1 64(%[soon])\n\tadd $128, %[soon]\n\t"

// What sums start with: the two numbers of a row, or nothing.
#define MPQ_NONE(left, right)                             \
  "vpxor %%xmm" left ", %%xmm" left ", %%xmm" left "\n\t" \
  "vpxor %%xmm" right ", %%xmm" right ", %%xmm" right "\n\t"
#define MPQ_NONE_1 MPQ_NONE("0", "1")
#define MPQ_NONE_2 MPQ_NONE_1 MPQ_NONE("2", "3")
#define MPQ_NONE_3 MPQ_NONE_2 MPQ_NONE("4", "5")
#define MPQ_NONE_4 MPQ_NONE_3 MPQ_NONE("6", "7")
#define MPQ_NONE_5 MPQ_NONE_4 MPQ_NONE("8", "9")
#define MPQ_NONE_6 MPQ_NONE_5 MPQ_NONE("10", "11")
#define MPQ_START(at, left, right)                    \
  "vpbroadcastd " at "(%[starts]), %%ymm" left "\n\t" \
  "vmovdqa %%ymm" left ", %%ymm" right "\n\t"
#define MPQ_START_1 MPQ_START("0", "0", "1")
#define MPQ_START_2 MPQ_START_1 MPQ_START("4", "2", "3")
#define MPQ_START_3 MPQ_START_2 MPQ_START("8", "4", "5")
#define MPQ_START_4 MPQ_START_3 MPQ_START("12", "6", "7")
#define MPQ_START_5 MPQ_START_4 MPQ_START("16", "8", "9")
#define MPQ_START_6 MPQ_START_5 MPQ_START("20", "10", "11")

// Neighbours' sums joined in 32 bits, and added to those in memory, or put there.
#define MPQ_ADD(sum, at) "vpaddd " at "(%[sums]), %%ymm" sum ", %%ymm" sum "\n\t"
#define MPQ_PUT(sum, at)
#define MPQ_JOIN(how, sum, at)                       \
  "vpmaddwd %%ymm12, %%ymm" sum ", %%ymm" sum "\n\t" \
  how(sum, at)                                       \
  "vmovdqa %%ymm" sum ", " at "(%[sums])\n\t"
#define MPQ_JOIN_1(how) MPQ_JOIN(how, "0", "0") MPQ_JOIN(how, "1", "32")
#define MPQ_JOIN_2(how) MPQ_JOIN_1(how) MPQ_JOIN(how, "2", "64") MPQ_JOIN(how, "3", "96")
#define MPQ_JOIN_3(how) MPQ_JOIN_2(how) MPQ_JOIN(how, "4", "128") MPQ_JOIN(how, "5", "160")
#define MPQ_JOIN_4(how) MPQ_JOIN_3(how) MPQ_JOIN(how, "6", "192") MPQ_JOIN(how, "7", "224")
#define MPQ_JOIN_5(how) MPQ_JOIN_4(how) MPQ_JOIN(how, "8", "256") MPQ_JOIN(how, "9", "288")
#define MPQ_JOIN_6(how) MPQ_JOIN_5(how) MPQ_JOIN(how, "10", "320") MPQ_JOIN(how, "11", "352")

#define MPQ_BLOCK(bits, rows, begin)                                                              \
  asm volatile(begin##_##rows                                                                     \
               "1:\n\t"                                                                           \
               "test %[soon], %[soon]\n\t"                                                        \
               "jz 2f\n\t"                                                                        \
               MPQ_FETCH                                                                          \
               "2:\n\t"                                                                           \
               MPQ_STEP_##bits(MPQ_ROWS_##rows)                                                   \
               "add $16, %[q]\n\t"                                                                \
               "add $16, %[q3]\n\t"                                                               \
               "add $" MPQ_BYTES_##bits ", %[codes]\n\t"                                          \
               "sub $16, %[count]\n\t"                                                            \
               "jnz 1b\n\t"                                                                       \
               "vmovdqa %[ones], %%ymm12\n\t"                                                     \
               "test %[first], %[first]\n\t"                                                      \
               "jnz 3f\n\t"                                                                       \
               MPQ_JOIN_##rows(MPQ_ADD)                                                           \
               "jmp 4f\n"                                                                         \
               "3:\n\t"                                                                           \
               MPQ_JOIN_##rows(MPQ_PUT)                                                           \
               "4:\n\t"                                                                           \
               : [codes] "+&r"(codes), [q] "+&r"(q), [q3] "+&r"(q3), [count] "+&r"(count),        \
                 [soon] "+&r"(soon)                                                               \
               : [ld] "r"(ld), [starts] "r"(starts), [sums] "r"(sums),                            \
                 [first] "r"(int(first)), [mask] "m"(kMask), [ones] "m"(kOnes)                    \
               : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",  \
                 "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15")

#define MPQ_BLOCKS(bits, begin)                       \
  if constexpr (ROWS == 1) MPQ_BLOCK(bits, 1, begin); \
  if constexpr (ROWS == 2) MPQ_BLOCK(bits, 2, begin); \
  if constexpr (ROWS == 3) MPQ_BLOCK(bits, 3, begin); \
  if constexpr (ROWS == 4) MPQ_BLOCK(bits, 4, begin); \
  if constexpr (ROWS == 5) MPQ_BLOCK(bits, 5, begin); \
  if constexpr (ROWS == 6) MPQ_BLOCK(bits, 6, begin)
// clang-format on

// sums[ROWS][16] = or, unless it is the first time, += products of `count` codes, a multiple of 16 above 0, of 16
// columns of a panel with as many bytes of each row of activations, and, where STARTED, two numbers of 16 bits for each
// row, with which its sums start. In the end 16 bits must be enough for two neighbours' sums; `sums` lie on 32 bytes.
// Unless `soon` is null, codes from there on are asked for meanwhile: of 2 bits as many as those of the whole panel, of
// 4 half of that.
template <int BITS, int ROWS, bool STARTED>
inline void avx2_block(const uint8_t* codes, const uint8_t* soon, const int8_t* q, int64_t ld, const int32_t* starts,
                       int64_t count, bool first, void* sums) {
  constexpr uint64_t kField = 0x0101010101010101 * ((1 << BITS) - 1), kOne = 0x0001000100010001;
  alignas(32) static constexpr uint64_t kMask[] = {kField, kField, kField, kField}, kOnes[] = {kOne, kOne, kOne, kOne};
  static_assert((BITS == 2 || BITS == 4) && ROWS >= 1 && ROWS <= 6);
  const int8_t* q3 = ROWS > 3 ? q + 3 * ld : q;
  if constexpr (BITS == 2) {
    MPQ_BLOCKS(2, MPQ_NONE);
  } else if constexpr (STARTED) {
    MPQ_BLOCKS(4, MPQ_START);
  } else {
    MPQ_BLOCKS(4, MPQ_NONE);
  }
}

}  // namespace
