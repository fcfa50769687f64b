#include "few.cuh"

template int mpq::few<8>(const LinearTask&, void*);
