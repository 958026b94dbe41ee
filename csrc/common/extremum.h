// The first smallest or largest of an array of floats without NaN. Include only from *_cpu.cpp files.
#pragma once
#include "common/simd.h"

namespace vtk {
namespace VTK_ISA {

// Whether a lane of a comparison is true.
static inline bool any_lane(i32v mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int32_t any = 0;
  for (int lane = 0; lane < kLanes; ++lane) any |= mask[lane];
  return any != 0;
#endif
}

struct Extremum {
  float value;
  int32_t index;
};

// Whether (value, index) ranks before `best` when small values win and ties go to the lower index.
static inline bool before(float value, int32_t index, const Extremum& best) {
  return value < best.value || (value == best.value && index < best.index);
}

// The smallest of count > 0 values and its lowest index.
static inline Extremum smallest(const float* values, int32_t count) {
  float low = values[0];
  int32_t i = 0;
  if (count >= 4 * kLanes) {
    f32v lanes[4];
    for (int k = 0; k < 4; ++k) lanes[k] = load(values + k * kLanes);
    for (i = 4 * kLanes; i + 4 * kLanes <= count; i += 4 * kLanes)
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        f32v next = load(values + i + k * kLanes);
        lanes[k] = next < lanes[k] ? next : lanes[k];
      }
    for (int k = 0; k < 4; ++k)
      for (int lane = 0; lane < kLanes; ++lane) low = lanes[k][lane] < low ? lanes[k][lane] : low;
  }
  for (; i < count; ++i) low = values[i] < low ? values[i] : low;

  // Skip whole vectors without it, then find the lane.
  int32_t first = 0;
  for (; first + 4 * kLanes <= count; first += 4 * kLanes) {
    i32v found = {};
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) found |= load(values + first + k * kLanes) == low;
    if (any_lane(found)) break;
  }
  while (values[first] != low) ++first;
  return {low, first};
}

}  // namespace VTK_ISA
}  // namespace vtk
