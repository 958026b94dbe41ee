// Scores as unsigned integers that sort the same way. Include only from *_cpu.cpp files; the CUDA twin is
// device/order_key.cuh.
#pragma once
#include "common/simd.h"

namespace vtk {
namespace VTK_ISA {

constexpr uint32_t kNanKey = 1;  // NaN ranks below -inf, whose key is 0x007fffff

static inline uint32_t order_key(float score) {
  if (score != score) return kNanKey;
  score += 0.0f;  // -0 and +0 are one score
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

static inline u32v order_key(f32v score) {
  u32v bits = (u32v)(score + f32v{});
  u32v flip = (u32v)((i32v)bits >> 31) | 0x80000000u;
  u32v nan = (u32v)(score != score);
  return ((bits ^ flip) & ~nan) | (nan & kNanKey);
}

}  // namespace VTK_ISA
}  // namespace vtk
