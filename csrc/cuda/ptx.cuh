// All inline PTX, behind names. In fragments lane = 4g + c; a register holds two 16-bit values or four bytes, the
// lowest k in the lowest bits.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace mpq::ptx {

// d += A B, A 16x16, B 16x8.  a[2h + p]: row g + 8p, k = 8h + 2c, + 1.  b[h]: column g, k = 8h + 2c, + 1.
// d[2p + j]: row g + 8p, column 2c + j.
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with bytes, A unsigned 16x32, B signed 32x8: a[2h + p] and b[h] hold k = 16h + 4c .. + 3.
__device__ __forceinline__ void mma(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four matrices of 8 rows by 16 bytes from shared memory. Lane i gives the address of row i % 8 of matrix i / 8, and
// gets bytes 4c .. 4c + 3 of row g of each.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}

// 16 bytes from global to shared memory, of which `valid` are read and the rest are 0; it flies until a wait.
__device__ __forceinline__ void copy16(void* shared, const void* global, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(valid)
               : "memory");
}
// The same with 4, 8 or 16 bytes, all of them or zeros.
template <int bytes>
__device__ __forceinline__ void copy(void* shared, const void* global, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
               "l"(global), "n"(bytes), "r"(there ? bytes : 0)
               : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int flying>  // all groups of copies but the last `flying` have landed, for this thread
__device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(flying) : "memory");
}

// 16 bytes that are read once: past the L1 cache.
__device__ __forceinline__ uint4 load_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// Two bf16 a * b + 0, exact where b is a power of two and nothing overflows; a may be subnormal.
__device__ __forceinline__ uint32_t scale_bf16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));  // -0
  return d;
}

// ---- Hopper's own (sm_90a) --------------------------------------------------------------------------

// A barrier in shared memory that counts `count` arrivals and the bytes that they said to expect; then its phase, 0 or
// 1 in turn, is over. To be seen by all, and by copies, after fence_async and a barrier of the block.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(uint32_t(__cvta_generic_to_shared(barrier))), "r"(count)
               : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(uint32_t(__cvta_generic_to_shared(barrier)))
               : "memory");
}
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, int bytes) {  // arrives, too
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(uint32_t(__cvta_generic_to_shared(barrier))),
      "r"(bytes)
      : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int phase) {  // until that phase is over
  uint32_t over;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
                 : "=r"(over)
                 : "r"(uint32_t(__cvta_generic_to_shared(barrier))), "r"(phase)
                 : "memory");
  } while (!over);
}
// What this thread wrote to shared memory is there for copies and matrix products, which go another way to it.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// `bytes`, a multiple of 16, from global to shared memory, both aligned to 16; tells the barrier when they are there.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   uint32_t(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(bytes), "r"(uint32_t(__cvta_generic_to_shared(barrier)))
               : "memory");
}

// Products of a warpgroup, four warps from a multiple of four on: d = A B, or += if `add`. A 64x16, 16 rows to each
// warp, laid out as above. B 16 x `columns` in shared memory, in cores of 8 columns by 16 bytes of k: 128 bytes, a
// column after the other. d[4t + 2p + j]: row g + 8p, column 8t + 2c + j.
//   begin(A), with A's registers made and d's let be; products; end, which makes them a group; wait or take,
//   before A or d is touched again.
__device__ __forceinline__ void products_begin(uint32_t (&a)[2][4]) {
#pragma unroll
  for (int f = 0; f < 2; ++f)  // made by now, not after the fence
    asm volatile("" : "+r"(a[f][0]), "+r"(a[f][1]), "+r"(a[f][2]), "+r"(a[f][3])::"memory");
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int flying>  // all groups of products but the last `flying` are done
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(flying) : "memory");
}
template <int count>
__device__ __forceinline__ void products_take(float (&d)[count]) {  // all are done, and d is read after this
  products_wait<0>();
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
// Where B is: from a core to that of the next columns, and to that of the next k, in bytes.
constexpr int kCore = 128;
__device__ __forceinline__ uint64_t products_source(const void* b, int next_columns, int next_k) {
  const uint64_t at = uint32_t(__cvta_generic_to_shared(b));
  return (at & 0x3ffff) >> 4 | uint64_t(next_k >> 4) << 16 | uint64_t(next_columns >> 4) << 32;
}

#define MPQ_8(d, i)                                                                                           \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define MPQ_32(d, i) MPQ_8(d, i), MPQ_8(d, i + 8), MPQ_8(d, i + 16), MPQ_8(d, i + 24)
#define MPQ_LIST_32 MPQ_32(d, 0)
#define MPQ_LIST_64 MPQ_32(d, 0), MPQ_32(d, 32)
#define MPQ_NAMES_32                                                                               \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
  "%26,%27,%28,%29,%30,%31"
#define MPQ_NAMES_64                                                                                 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"   \
  "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49," \
  "%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define MPQ_PRODUCTS(type, kind, columns, names, d_list, a0, a1, a2, a3, b, scale)                                   \
  __device__ __forceinline__ void products(float(&d)[columns / 2], const uint32_t(&a)[4], uint64_t source, bool add, \
                                           type) {                                                                   \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " scale                                                           \
                 ", 0;\n"                                                                                            \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." kind "." kind " {" names "}, {" a0 "," a1   \
                 "," a2 "," a3 "}, " b ", p, 1, 1, 0;\n}"                                                            \
                 : d_list                                                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(source), "r"(int(add)));                          \
  }
#define MPQ_OF(type, kind)                                                                          \
  MPQ_PRODUCTS(type, kind, 64, MPQ_NAMES_32, MPQ_LIST_32, "%32", "%33", "%34", "%35", "%36", "%37") \
  MPQ_PRODUCTS(type, kind, 128, MPQ_NAMES_64, MPQ_LIST_64, "%64", "%65", "%66", "%67", "%68", "%69")
MPQ_OF(__half, "f16")
MPQ_OF(__nv_bfloat16, "bf16")
#undef MPQ_OF
#undef MPQ_PRODUCTS
#undef MPQ_NAMES_64
#undef MPQ_NAMES_32
#undef MPQ_LIST_64
#undef MPQ_LIST_32
#undef MPQ_32
#undef MPQ_8

}  // namespace mpq::ptx
