// The PTX that kernels use, each instruction behind one function, so that no kernel writes assembly and the host
// emulation of the tests can supply its own versions.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#if defined(VTK_BACKEND_SIMT)
#include "simt_ptx.h"
#endif

namespace vtk {
namespace ptx {

#if defined(VTK_BACKEND_SIMT)

inline void cp_async_16(void* shared, const void* global, bool present) {
  simt::async_copy(shared, global, 16, present ? 16 : 0);
}
inline void cp_async_commit() { simt::async_commit(); }
template <int kInFlight>
inline void cp_async_wait() {
  simt::async_wait(kInFlight);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) { simt::ldmatrix<4, false>(r, shared_row); }
template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::mma_m16n8k16<T>(d, a, b);
}

#else

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, both aligned to 16; zeros when not present (nothing is read then).
__device__ inline void cp_async_16(void* shared, const void* global, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(present ? 16 : 0)
               : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kInFlight of this thread's groups are under way.
template <int kInFlight>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kInFlight) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements: lane 8 m + r brings the address of row r of matrix m, and receives the
// elements 2 (lane % 4) and the next of row lane / 4 of every matrix.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8], float32 accumulation.
template <class T>
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ inline void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ inline void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

}  // namespace ptx
}  // namespace vtk
