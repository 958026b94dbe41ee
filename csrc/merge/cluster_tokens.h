// What the clusterings are given, and which tokens take part.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace vtk {

// A token is usable when it is valid and its squared norm is below this, which a NaN's or an infinity's is not: then
// every squared distance is finite.
inline constexpr float kMaxSquaredNorm = 0x1p125f;

struct ClusterTokens {
  const void* data;  // [B, N, D], the last dimension contiguous; strides in elements
  DType dtype;
  int64_t stride_batch, stride_token;
  MaskView valid;    // [B, N]
  int32_t batch;     // B
  int32_t count;     // N
  int32_t channels;  // D >= 1
};

}  // namespace vtk
