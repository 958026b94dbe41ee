// Host versions of the functions of csrc/device/ptx.cuh, where they are explained. Registers are 32-bit words, laid
// out over the lanes as the PTX manual draws the fragments.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <bit>
#include <cmath>

namespace simt {

// ---- Bits and pairs ----

// Bit i of the result is bit (a_i b_i c_i) of the truth table.
template <uint8_t kTable>
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out = 0;
  for (int i = 0; i < 8; ++i)
    if (kTable >> i & 1) out |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return out;
}

inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

template <class T>
inline float half_of(uint32_t word, int which) {
  return static_cast<float>(std::bit_cast<T>(static_cast<uint16_t>(word >> (16 * which))));
}

template <class T>
inline uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out = 0;
  for (int i = 0; i < 2; ++i) {
    const double exact = std::fma(double{half_of<T>(a, i)}, double{half_of<T>(b, i)}, double{half_of<T>(c, i)});
    out |= static_cast<uint32_t>(std::bit_cast<uint16_t>(T(exact))) << (16 * i);
  }
  return out;
}

// ---- Arithmetic ----

inline float exp2_approx(float x) {
  const float out = std::exp2(x);
  return out < 0x1p-126f ? 0.0f : out;
}

// ---- Copies of one thread ----

inline void cp_async_16(void* shared, const void* global, bool present) {
  async_copy(shared, global, 16, present ? 16 : 0);
}
inline void cp_async_commit() { async_commit(); }
template <int kInFlight>
inline void cp_async_wait() {
  async_wait(kInFlight);
}

// ---- Tensor cores ----

template <bool transposed>
inline void load_matrices(uint32_t (&out)[4], const void* row, Site site) {
  struct Lane {
    const uint16_t* row;
    uint32_t* out;
  } mine{static_cast<const uint16_t*>(row), out};
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    fail("ldmatrix (%s:%d): row address not 16-byte aligned", site.file, site.line);
  shared_access(row, 16, false);
  warp_call(
      "ldmatrix", &mine,
      [](void* const* lanes) {
        auto element = [&](int matrix, int r, int c) -> uint32_t {
          return static_cast<Lane*>(lanes[8 * matrix + r])->row[c];
        };
        for (int l = 0; l < 32; ++l)
          for (int m = 0; m < 4; ++m) {
            const int r = l / 4, c = l % 4 * 2;
            static_cast<Lane*>(lanes[l])->out[m] = transposed ? element(m, c, r) | element(m, c + 1, r) << 16
                                                              : element(m, r, c) | element(m, r, c + 1) << 16;
          }
      },
      site);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, SIMT_SITE) { load_matrices<false>(r, row, site); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, SIMT_SITE) { load_matrices<true>(r, row, site); }

template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_SITE) {
  struct Lane {
    float* d;
    const uint32_t *a, *b;
  } mine{d, a, b};
  warp_call(
      "mma.m16n8k16", &mine,
      [](void* const* lanes) {
        float A[16][16], B[16][8];
        for (int l = 0; l < 32; ++l) {
          const Lane& lane = *static_cast<Lane*>(lanes[l]);
          const int group = l / 4, pair = l % 4 * 2;
          for (int i = 0; i < 8; ++i)
            A[group + (i / 2 % 2) * 8][pair + (i / 4) * 8 + i % 2] = half_of<T>(lane.a[i / 2], i % 2);
          for (int i = 0; i < 4; ++i) B[pair + (i / 2) * 8 + i % 2][group] = half_of<T>(lane.b[i / 2], i % 2);
        }
        for (int l = 0; l < 32; ++l)
          for (int i = 0; i < 4; ++i) {
            float& out = static_cast<Lane*>(lanes[l])->d[i];
            for (int k = 0; k < 16; ++k) out += A[l / 4 + i / 2 * 8][k] * B[k][l % 4 * 2 + i % 2];
          }
      },
      site);
}

// ---- Barriers of part of a block ----
// NOTE: accesses to the barrier's word are noted here, inlined into the kernel, so that a report names its line.

inline void named_barrier_sync(int id, int threads, SIMT_SITE) { named_barrier(id, threads, true, site); }
inline void named_barrier_arrive(int id, int threads, SIMT_SITE) { named_barrier(id, threads, false, site); }

inline void mbarrier_init(uint64_t* barrier, int arrivals, SIMT_SITE) {
  shared_access(barrier, sizeof *barrier, true);
  mbarrier_start(barrier, arrivals, site);
}
inline void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes, SIMT_SITE) {
  atomic_access(barrier, sizeof *barrier);
  mbarrier_count(barrier, bytes, site);
}
inline void mbarrier_arrive(uint64_t* barrier, SIMT_SITE) {
  atomic_access(barrier, sizeof *barrier);
  mbarrier_count(barrier, 0, site);
}
inline void mbarrier_wait(uint64_t* barrier, int parity, SIMT_SITE) {
  atomic_access(barrier, sizeof *barrier);
  mbarrier_pass(barrier, parity, site);
}
inline void fence_mbarrier_init(SIMT_SITE) { simt_fence(site); }

inline void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, SIMT_SITE) {
  atomic_access(barrier, sizeof *barrier);
  async_bulk_copy(shared, global, bytes, barrier, site);
}

}  // namespace simt
