#include "warpgroup.cuh"

template int mpq::warpgroup<8, __half>(const LinearTask&, int, void*);
