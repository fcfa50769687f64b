// Launchers of the CUDA kernels: raw device pointers, sizes and a stream (a cudaStream_t), no torch. They
// return a cudaError_t, 0 for success. Arguments are checked already; N = 0 launches nothing.
#pragma once
#include "../packed.h"

extern "C" {

int mpq_pack(const uint8_t* codes, int64_t n, int64_t k, int bits, uint8_t* out, void* stream);
int mpq_unpack(const uint8_t* packed, int64_t n, int64_t k, int bits, uint8_t* out, void* stream);
int mpq_dequantize(const mpq::Packed& w, float* out, void* stream);  // fp32 [N][K]

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

// out fp64 [n][n] = x x^T of n samples of `columns` values each, `stride` apart; center: each column less its mean. type:
// 0 fp32, 1 fp16, 2 bf16. The columns are cut into `slices`, as many as mpq_gram_slices wants, whose sums lie in a
// workspace of mpq_gram_workspace numbers.
int64_t mpq_gram_slices(int64_t n, int64_t columns);
int64_t mpq_gram_workspace(int64_t n, int64_t slices);
int mpq_gram(const void* x, int type, int64_t n, int64_t columns, int64_t stride, bool center, int64_t slices,
             double* workspace, double* out, void* stream);

// out[i][j] = <K_i, K_j> / (|K_i| |K_j|) of `count` Gram matrices [n][n], which are overwritten if `debiased`: their
// diagonals are dropped and they are U-centred first. A matrix of zeros is orthogonal to all others. `workspace` is
// [count][count].
int mpq_orthogonality(double* grams, int64_t count, int64_t n, bool debiased, double* workspace, double* out,
                      void* stream);

const char* mpq_cuda_error(int error);  // what a launcher's result means
}
