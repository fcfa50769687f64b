// Launchers of the CUDA kernels: raw device pointers, sizes and a stream (a cudaStream_t), no torch. They
// return a cudaError_t, 0 for success. Arguments are checked already; N = 0 launches nothing.
#pragma once
#include "linear.h"

namespace mpq {
struct GramFeature {  // n samples of `columns` values each, `stride` apart
  const void* x;
  int64_t columns, stride;
};
}  // namespace mpq

extern "C" {

int mpq_pack(const uint8_t* codes, int64_t n, int64_t k, int bits, uint8_t* out, void* stream);
int mpq_unpack(const uint8_t* packed, int64_t n, int64_t k, int bits, uint8_t* out, void* stream);
int mpq_dequantize(const mpq::Packed& w, float* out, void* stream);  // fp32 [N][K]

// Between packed codes [N][Kp * bits / 8] and fragment_words(n, kp, bits) words laid out as fragments.h draws.
int mpq_to_fragments(const uint8_t* packed, int64_t n, int64_t kp, int bits, void* out, void* stream);
int mpq_from_fragments(const void* fragments, int64_t n, int64_t kp, int bits, uint8_t* out, void* stream);

// `linear` for up to 16 tokens of fp16 or bf16, for any number of them, and for any number on a GPU of compute
// capability 9.0 (others: cudaErrorNoKernelImageForDevice); `task.splits` > 1 wants mpq_join after it.
int mpq_few(const mpq::LinearTask& task, void* stream);
int mpq_many(const mpq::LinearTask& task, int columns, bool int8, void* stream);
int mpq_warpgroup(const mpq::LinearTask& task, int columns, void* stream);
int mpq_join(const mpq::LinearTask& task, void* stream);

// What mpq_many needs of x [M][K] of a Type. `sums` is fp32 [sum_units(kp, unit)][ld], ld at least M and a multiple
// of 4. Also copies x to `copy` [M][copy_ld], zeros past K, unless that is null.
int mpq_row_sums(const void* x, int type, int64_t m, int64_t k, int unit, float* sums, int64_t ld, void* copy,
                 int64_t copy_ld, void* stream);

// What mpq_warpgroup needs of x [M][K] of fp16 or bf16: `out` [ld / columns][pieces][columns][8], tokens in blocks of
// `columns` (a divisor of ld >= M) and of each the 8 values of k that are a piece, zeros past M and K; and `sums` fp32
// [units][ld] over every `unit` of k, the last one over all that is left.
int mpq_arrange(const void* x, int type, int64_t m, int64_t k, int64_t unit, int64_t units, int64_t pieces, int columns,
                float* sums, int64_t ld, void* out, void* stream);

// x rounded to 8 bits by each row's and group's maximum, or by `fixed` (one, or `each` group's own): q int8
// [M][ceil(Kp / 128) * 128] in the order of byte_place, their sums as above, and behind these, alike, their scales.
int mpq_round_rows(const void* x, int type, const mpq::Packed& w, int64_t m, const float* fixed, bool each, int unit,
                   int8_t* q, float* sums, int64_t ld, void* stream);

// weight fp32 [N][K] -> packed codes, scales and zeros (fp16 if `half`, else fp32; [N][groups], or one zero if
// symmetric) and squared errors [N][groups]. *first_bad, N before, becomes the first row that is not finite or too
// large for fp16 scales; such rows are not written.
int mpq_quantize(const float* weight, int64_t n, int64_t k, int64_t group, int bits, bool symmetric, bool mse,
                 bool half, uint8_t* packed, void* scales, void* zeros, float* errors, int64_t* first_bad,
                 void* stream);

// The errors that mpq_quantize would report, out [widths][N][groups][fractions]; `bits`, 1..8, lie on the host.
int mpq_probe_errors(const float* weight, int64_t n, int64_t k, int64_t group, const int64_t* bits, int64_t widths,
                     const float* fractions, int64_t fraction_count, bool symmetric, bool half, float* out,
                     int64_t* first_bad, void* stream);

// out fp64 [count][n][n], x x^T of each feature; center: each of its columns less its mean. type: a Type, of all. The
// columns of each are cut into `slices`, whose sums lie in a workspace of mpq_gram_workspace numbers; 0: as suits.
int64_t mpq_gram_workspace(const mpq::GramFeature* features, int64_t count, int64_t n, int64_t slices);
int mpq_gram(const mpq::GramFeature* features, int64_t count, int type, int64_t n, bool center, int64_t slices,
             double* workspace, double* out, void* stream);

// out[i][j] = <K_i, K_j> / (|K_i| |K_j|) of `count` Gram matrices [n][n], which are overwritten if `debiased`: their
// diagonals are dropped and they are U-centred first. A matrix of zeros is orthogonal to all others. `workspace` is
// [count][count].
int mpq_orthogonality(double* grams, int64_t count, int64_t n, bool debiased, double* workspace, double* out,
                      void* stream);

int mpq_arch(int device, int* arch);    // 10 * major + minor of its compute capability
const char* mpq_cuda_error(int error);  // what a launcher's result means
}
