#include "many.cuh"

template int mpq::many<4, __half>(const LinearTask&, int, void*);
