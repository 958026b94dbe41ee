// Host versions of the PTX instructions behind the wrappers of csrc/device/ptx.cuh. Registers are 32-bit words, laid
// out over the lanes as the PTX manual draws the fragments.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>

#include "simt.h"

namespace simt {

// lop3.b32: bit i of the result is bit (a_i b_i c_i) of the truth table.
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint8_t table) {
  uint32_t out = 0;
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) out |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return out;
}

// ldmatrix.m8n8.x{count}{.trans}: lane 8 m + r brings the address of row r of matrix m.
template <int count, bool transposed>
inline void ldmatrix(uint32_t (&out)[count], const void* row, Site site = {__builtin_FILE(), __builtin_LINE()}) {
  struct Lane {
    const uint16_t* row;
    uint32_t* out;
  } mine{static_cast<const uint16_t*>(row), out};
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    fail("ldmatrix (%s:%d): row address not 16-byte aligned", site.file, site.line);
  if (lane() < 8 * count) shared_access(row, 16, false);
  warp_call(
      "ldmatrix", &mine,
      [](void* const* lanes) {
        auto element = [&](int matrix, int r, int c) -> uint32_t {
          return static_cast<Lane*>(lanes[8 * matrix + r])->row[c];
        };
        for (int l = 0; l < 32; ++l)
          for (int m = 0; m < count; ++m) {
            const int r = l / 4, c = l % 4 * 2;
            static_cast<Lane*>(lanes[l])->out[m] = transposed ? element(m, c, r) | element(m, c + 1, r) << 16
                                                              : element(m, r, c) | element(m, r, c + 1) << 16;
          }
      },
      site);
}

template <class T>
inline float half_of(uint32_t word, int which) {
  return static_cast<float>(std::bit_cast<T>(static_cast<uint16_t>(word >> (16 * which))));
}

// mma.sync.aligned.m16n8k16.row.col.f32.T.T.f32 with T __nv_bfloat16 or __half: d = a b + d.
template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         Site site = {__builtin_FILE(), __builtin_LINE()}) {
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

}  // namespace simt
