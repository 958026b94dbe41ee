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

// A key and where it stands, as one integer: of two ranks the larger has the larger key or, among equal keys, the lower
// index. 0 is below every rank.
__device__ inline unsigned long long make_rank(uint32_t key, int32_t index) {
  return static_cast<unsigned long long>(key) << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}

__device__ inline int32_t index_of(unsigned long long rank) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(rank));
}

}  // namespace vtk
