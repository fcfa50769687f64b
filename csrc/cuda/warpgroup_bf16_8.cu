#include "warpgroup.cuh"

template int mpq::warpgroup<8, __nv_bfloat16>(const LinearTask&, int, void*);
