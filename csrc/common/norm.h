// Norms of rows for cosines. Include only from *_cpu.cpp files.
#pragma once
#include <cmath>
#include <limits>

#include "common/cosine.h"
#include "common/simd.h"

namespace vtk {
namespace VTK_ISA {

template <class T>
static inline float squared_norm(const T* x, int32_t channels) {
  f32v lanes = {};
  int32_t d = 0;
  for (; d + kLanes <= channels; d += kLanes) lanes += load(x + d) * load(x + d);
  const f32v tail = load_partial(x + d, channels - d);
  return sum(lanes + tail * tail);
}

// 1 / norm; 0 for a zero vector, NaN for a token without a cosine.
static inline float inverse_norm(float squared_norm) {
  if (!(squared_norm < std::numeric_limits<float>::infinity())) return NAN;
  return squared_norm >= kMinSquaredNorm ? 1.0f / std::sqrt(squared_norm) : 0.0f;
}

}  // namespace VTK_ISA
}  // namespace vtk
