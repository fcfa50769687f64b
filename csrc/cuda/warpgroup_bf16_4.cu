#include "warpgroup.cuh"

template int mpq::warpgroup<4, __nv_bfloat16>(const LinearTask&, int, void*);
