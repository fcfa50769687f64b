// Built without any instruction set flag: serves every processor.
#include "../packed.h"
#include "vec_scalar.h"
#include "kernels.inl"

MPQ_KERNELS(scalar_kernels, "scalar");
