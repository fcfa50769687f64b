#include "many.cuh"

template int mpq::many<4, mpq::Int8>(const LinearTask&, int, void*);
