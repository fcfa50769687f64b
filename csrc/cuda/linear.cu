// The launchers of `few`, `many` and `warpgroup` (each instantiated in files of their own), and what they ask of the
// device.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "launch.h"

namespace mpq {
struct Int8;
}
using namespace mpq;

int mpq_few(const LinearTask& task, void* stream) {
  const bool known = Type(task.type) == Type::f16 || Type(task.type) == Type::bf16;
  if (!known || task.m > kFewTokens) return cudaErrorInvalidValue;
  if (task.m == 0 || task.weight.n == 0) return cudaSuccess;
  switch (task.weight.bits) {
    case 2:
      return few<2>(task, stream);
    case 4:
      return few<4>(task, stream);
    case 8:
      return few<8>(task, stream);
  }
  return cudaErrorInvalidValue;
}

namespace {

template <int bits>
int many_of(const LinearTask& task, int columns, bool int8, void* stream) {
  if (int8) return many<bits, Int8>(task, columns, stream);
  if (Type(task.type) == Type::f16) return many<bits, __half>(task, columns, stream);
  if (Type(task.type) == Type::bf16) return many<bits, __nv_bfloat16>(task, columns, stream);
  return cudaErrorInvalidValue;
}

template <int bits>
int warpgroup_of(const LinearTask& task, int columns, void* stream) {
  if (Type(task.type) == Type::f16) return warpgroup<bits, __half>(task, columns, stream);
  if (Type(task.type) == Type::bf16) return warpgroup<bits, __nv_bfloat16>(task, columns, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

int mpq_many(const LinearTask& task, int columns, bool int8, void* stream) {
  if (columns != 32 && columns != 64 && columns != 128) return cudaErrorInvalidValue;
  if (task.m == 0 || task.weight.n == 0) return cudaSuccess;
  switch (task.weight.bits) {
    case 2:
      return many_of<2>(task, columns, int8, stream);
    case 4:
      return many_of<4>(task, columns, int8, stream);
    case 8:
      return many_of<8>(task, columns, int8, stream);
  }
  return cudaErrorInvalidValue;
}

int mpq_warpgroup(const LinearTask& task, int columns, void* stream) {
  if (columns != 64 && columns != 128) return cudaErrorInvalidValue;
  if (task.m == 0 || task.weight.n == 0) return cudaSuccess;
  switch (task.weight.bits) {
    case 2:
      return warpgroup_of<2>(task, columns, stream);
    case 4:
      return warpgroup_of<4>(task, columns, stream);
    case 8:
      return warpgroup_of<8>(task, columns, stream);
  }
  return cudaErrorInvalidValue;
}

int mpq_arch(int device, int* arch) {
  int major = 0, minor = 0;
  int error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  *arch = 10 * major + minor;
  return error;
}
