// Built with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni, or anywhere with -DMPQ_SIMDE.
#include "../packed.h"
#include "vec_avx512.h"

namespace {
using Isa = Avx512;
}
#include "kernels.inl"

MPQ_KERNELS(avx512_kernels, "avx512");
