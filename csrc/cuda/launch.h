// Launchers of the CUDA kernels: raw device pointers, sizes and a stream (a cudaStream_t), no torch. They
// return a cudaError_t, 0 for success. Arguments are checked already; N = 0 launches nothing.
#pragma once
#include "../packed.h"

extern "C" {

int mpq_pack(const uint8_t* codes, int64_t n, int64_t k, int bits, uint8_t* out, void* stream);
int mpq_unpack(const uint8_t* packed, int64_t n, int64_t k, int bits, uint8_t* out, void* stream);
int mpq_dequantize(const mpq::Packed& w, float* out, void* stream);  // fp32 [N][K]

const char* mpq_cuda_error(int error);  // what a launcher's result means
}
