#include "few.cuh"

template int mpq::few<4>(const LinearTask&, void*);
