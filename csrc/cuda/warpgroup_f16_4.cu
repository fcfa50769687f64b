#include "warpgroup.cuh"

template int mpq::warpgroup<4, __half>(const LinearTask&, int, void*);
