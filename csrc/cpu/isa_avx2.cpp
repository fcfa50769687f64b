// Built with -mavx2 -mfma -mf16c.
#include "../packed.h"
#include "vec_avx2.h"

namespace {
using Isa = Avx2;
}
#include "kernels.inl"

MPQ_KERNELS(avx2_kernels, "avx2");
