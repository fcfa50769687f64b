#include "many.cuh"

template int mpq::many<8, __half>(const LinearTask&, int, void*);
