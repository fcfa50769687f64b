#include "many.cuh"

template int mpq::many<2, mpq::Int8>(const LinearTask&, int, void*);
