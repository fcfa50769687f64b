#include "many.cuh"

template int mpq::many<8, __nv_bfloat16>(const LinearTask&, int, void*);
