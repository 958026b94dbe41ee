// The PTX that kernels use, each instruction behind one function, so that no kernel writes assembly and the host
// emulation of the tests can supply its own versions (tests/simt/include/simt_ptx.h). Registers are 32-bit words.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#if defined(VTK_BACKEND_SIMT)
#include "simt_ptx.h"
#endif

namespace vtk {
namespace ptx {

// The truth table of lop3 is what these three give under the same operators: lop3<(kA & kB) | kC>(a, b, c).
inline constexpr uint8_t kA = 0xf0, kB = 0xcc, kC = 0xaa;

#if defined(VTK_BACKEND_SIMT)

using simt::bulk_copy;
using simt::cp_async_16;
using simt::cp_async_commit;
using simt::cp_async_wait;
using simt::exp2_approx;
using simt::fence_mbarrier_init;
using simt::fma_pair;
using simt::ldmatrix_x4;
using simt::ldmatrix_x4_trans;
using simt::lop3;
using simt::mbarrier_arrive;
using simt::mbarrier_arrive_expect;
using simt::mbarrier_init;
using simt::mbarrier_wait;
using simt::mma_m16n8k16;
using simt::named_barrier_arrive;
using simt::named_barrier_sync;
using simt::prmt;

#else

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- Bits and pairs ----

template <uint8_t kTable>
__device__ inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(out) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return out;
}

// Byte i of the result is byte (selector >> 4 i & 7) of b:a.
__device__ inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

// a b + c in both 16-bit lanes, rounded once.
template <class T>
__device__ inline uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out;
  if constexpr (std::is_same_v<T, __half>) {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  }
  return out;
}

// ---- Arithmetic ----

// 2^x within 2^-22 of itself; results below 2^-126 are 0.
__device__ inline float exp2_approx(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// ---- Copies of one thread ----

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

// ---- Tensor cores ----

// Four 8 x 8 matrices of 16-bit elements: lane 8 m + r brings the address of row r of matrix m, and receives the
// elements 2 (lane % 4) and the next of row lane / 4 of every matrix; _trans: of column lane / 4.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
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

// ---- Barriers of part of a block ----

// Barrier `id`, 1 to 15 (0 is __syncthreads), for `threads` threads, a multiple of 32: sync waits, arrive does not.
__device__ inline void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// An mbarrier is 8 bytes of shared memory. A phase ends when `arrivals` threads have arrived and the bytes that they
// announced have landed; phases alternate between parity 0, the first one, and 1.
__device__ inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ inline void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(barrier))
               : "memory");
}

// Returns once the phase of this parity has ended. A fresh barrier counts as past a phase of parity 1.
__device__ inline void mbarrier_wait(uint64_t* barrier, int parity) {
  uint32_t done = 0;
  while (!done) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
#else
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
#endif
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  }
}

// sm_90 and later; a trap before.

// After mbarrier_init and before the block's barrier: bulk copies see the initialised barriers.
__device__ inline void fence_mbarrier_init() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  __trap();
#endif
}

// Arrives, and announces `bytes` of bulk copies to this barrier in this phase.
__device__ inline void mbarrier_arrive_expect([[maybe_unused]] uint64_t* barrier, [[maybe_unused]] uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#else
  __trap();
#endif
}

// One thread copies `bytes` from global to shared memory, all three multiples of 16; they count at the barrier.
__device__ inline void bulk_copy([[maybe_unused]] void* shared, [[maybe_unused]] const void* global,
                                 [[maybe_unused]] uint32_t bytes, [[maybe_unused]] uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#else
  __trap();
#endif
}

#endif

}  // namespace ptx
}  // namespace vtk
