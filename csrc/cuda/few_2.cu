#include "few.cuh"

template int mpq::few<2>(const LinearTask&, void*);
