#include "warpgroup.cuh"

template int mpq::warpgroup<2, __half>(const LinearTask&, int, void*);
