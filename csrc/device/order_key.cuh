// A score as an unsigned integer that sorts the same way, so that selection is integer work.
#pragma once
#include <cstdint>

namespace vtk {

inline constexpr uint32_t kDroppedKey = 0;           // drop_mask: below every score
inline constexpr uint32_t kNanKey = 1;               // NaN ranks below -inf, whose key is 0x007fffff
inline constexpr uint32_t kForcedKey = 0xffffffffu;  // keep_mask: above +inf, whose key is 0xff800000

__device__ inline uint32_t order_key(float score) {
  if (score != score) return kNanKey;
  uint32_t bits = __float_as_uint(score + 0.0f);  // -0 and +0 are one score
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

}  // namespace vtk
