#include "many.cuh"

template int mpq::many<2, __half>(const LinearTask&, int, void*);
