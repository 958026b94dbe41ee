// nearest_match: the most similar of a few centres for every token.
//
// What is compared is a score of the dot product and one term of each token: the cosine, with 1 / norm for a term, or
// minus half the squared distance, with minus half the squared norm. A NaN term makes the score NaN.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/cosine.h"
#include "common/cpu_isa.h"
#include "common/dtype.h"
#include "device/host_device.h"

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
#include <cuda_runtime.h>
#endif

namespace vtk {

enum class Distance : int32_t { kCosine, kEuclidean };

struct NearestMatchParams {
  const void* metric;  // [B, N, C], the last dimension contiguous; strides in elements
  DType dtype;
  int64_t stride_batch, stride_token;
  // [B, K], -1: none. The CPU op has checked it; on CUDA nobody has read it yet: what is no centre counts as none, and
  // so does a repetition.
  const int64_t* centers;
  int64_t centers_stride_batch, centers_stride_row;
  MaskView valid;       // [B, N]
  int32_t batch;        // B
  int32_t num_tokens;   // N
  int32_t channels;     // C >= 1
  int32_t num_centers;  // K
  Distance distance;

  int64_t* owner;     // [B, N]
  float* similarity;  // [B, N]
  void* workspace;    // CUDA only: nearest_match_workspace(params) bytes, not initialised
};

// A token whose squared norm reaches this has no distance, so that every distance is finite.
inline constexpr float kMaxSquaredNorm = 0x1p125f;

VTK_HOST_DEVICE inline float distance_term(float squared_norm) {
  return squared_norm < kMaxSquaredNorm ? -0.5f * squared_norm : NAN;
}

VTK_HOST_DEVICE inline float score_of(Distance distance, float dot, float token, float center) {
  return distance == Distance::kCosine ? dot * token * center : dot + (token + center);
}

// Rounding may leave equal tokens a distance below zero. NaN stays.
VTK_HOST_DEVICE inline float similarity_of(Distance distance, float score) {
  if (distance == Distance::kCosine) return score;
  return score > 0.0f ? 0.0f : 2.0f * score;
}

// Of a center with itself, by definition.
VTK_HOST_DEVICE inline float own_similarity(Distance distance) { return distance == Distance::kCosine ? 1.0f : 0.0f; }

VTK_CPU_KERNEL(void, nearest_match_cpu, NearestMatchParams)

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
int64_t nearest_match_workspace(const NearestMatchParams& params);
cudaError_t nearest_match_cuda(const NearestMatchParams& params, cudaStream_t stream);
#endif

}  // namespace vtk
