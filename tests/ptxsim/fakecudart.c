// Stands in for the CUDA runtime: a kernel launch becomes a call of `sim_launch`, which Python sets. Has what the
// host code that nvcc makes refers to, and is linked in the runtime's place (nvcc -cudart none).
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct {
  unsigned x, y, z;
} Dim3;
typedef struct {
  Dim3 grid, block;
  size_t shared;
  void* stream;
  void* attributes;
  unsigned count;
} Config;  // cudaLaunchConfig_t
typedef struct {
  size_t shared;
} Attributes;  // cudaFuncAttributes, as far as it is filled
typedef int (*Launch)(const char* kernel, const unsigned* grid_and_block, size_t shared, void** args);
typedef size_t (*SharedOf)(const char* kernel);

enum { kInvalidValue = 1, kInvalidDeviceFunction = 98, kMaxShared = 227 * 1024, kDynamicSharedSize = 8, kMajor = 75 };

static Launch sim_launch;
static SharedOf sim_shared_of;
static const void* fatbins[64];
static int fatbin_count;
static struct {
  const void* host;
  const char* name;
} kernels[1024];
static int kernel_count;
static Config pushed;

void sim_set_launch(Launch f) { sim_launch = f; }
void sim_set_shared_of(SharedOf f) { sim_shared_of = f; }
int sim_fatbins(void) { return fatbin_count; }
const char* sim_fatbin(int i, uint64_t* size) {  // header: magic, version, header size, 64-bit payload size
  const unsigned char* header = ((const unsigned char* const*)fatbins[i])[1];
  uint16_t header_size;
  memcpy(&header_size, header + 6, 2);
  memcpy(size, header + 8, 8);
  return (const char*)header + header_size;
}

void** __cudaRegisterFatBinary(void* f) {
  fatbins[fatbin_count++] = f;
  return (void**)fatbins;
}
void __cudaRegisterFatBinaryEnd(void** handle) { (void)handle; }
void __cudaUnregisterFatBinary(void** handle) { (void)handle; }
void __cudaRegisterFunction(void** handle, const char* host, char* device, const char* name, int limit, void* tid,
                            void* bid, void* block, void* grid, int* warp) {
  (void)handle, (void)device, (void)limit, (void)tid, (void)bid, (void)block, (void)grid, (void)warp;
  kernels[kernel_count].host = host;
  kernels[kernel_count++].name = name;
}

static int launch(const void* f, Dim3 g, Dim3 b, void** args, size_t shared) {
  const unsigned shape[6] = {g.x, g.y, g.z, b.x, b.y, b.z};
  for (int i = 0; i < kernel_count; ++i)
    if (kernels[i].host == f) return sim_launch(kernels[i].name, shape, shared, args);
  return kInvalidDeviceFunction;
}
int cudaLaunchKernelExC(const Config* c, const void* f, void** args) {
  return launch(f, c->grid, c->block, args, c->shared);
}
int __cudaGetKernel(void** kernel, const void* f) {
  *kernel = (void*)f;
  return 0;
}
int __cudaLaunchKernel(void* kernel, Dim3 g, Dim3 b, void** args, size_t shared, void* stream) {
  (void)stream;
  return launch(kernel, g, b, args, shared);
}
unsigned __cudaPushCallConfiguration(Dim3 g, Dim3 b, size_t shared, void* stream) {
  pushed.grid = g, pushed.block = b, pushed.shared = shared, pushed.stream = stream;
  return 0;
}
int __cudaPopCallConfiguration(Dim3* g, Dim3* b, size_t* shared, void* stream) {
  *g = pushed.grid, *b = pushed.block, *shared = pushed.shared, *(void**)stream = pushed.stream;
  return 0;
}
int cudaFuncSetAttribute(const void* f, int attribute, int value) {
  (void)f;
  return attribute == kDynamicSharedSize && value > kMaxShared ? kInvalidValue : 0;
}
int cudaFuncGetAttributes(Attributes* a, const void* f) {
  for (int i = 0; i < kernel_count; ++i)
    if (kernels[i].host == f) return a->shared = sim_shared_of(kernels[i].name), 0;
  return kInvalidDeviceFunction;
}
int cudaDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  *value = attribute == kMajor ? 8 : 0;  // sm_80, as the PTX is
  return 0;
}
int cudaGetLastError(void) { return 0; }
const char* cudaGetErrorString(int error) { return error ? "a CUDA error" : "no error"; }
