#include "many.cuh"

template int mpq::many<8, mpq::Int8>(const LinearTask&, int, void*);
