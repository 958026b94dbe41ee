// energy_scores: how much each token has in common with all tokens of its batch row.
//
//   energy(i) = scale * mean over usable j, i included, of f(cos(i, j))
//   ELU       f(s) = s - margin above 0, else alpha * (exp(s - margin) - 1)
//   Gaussian  f(s) = 2^(-sharpness * (1 - s)^2)
//
// A token is usable when it is valid and has a cosine (common/cosine.h).
#pragma once
#include <cstdint>

#include "common/cosine.h"
#include "common/cpu_isa.h"
#include "common/dtype.h"

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
#include <cuda_runtime.h>
#endif

namespace vtk {

enum class EnergyKind : int32_t { kElu, kGaussian };

struct EnergyScoresParams {
  const void* metric;  // [B, N, C], the last dimension contiguous; strides in elements
  DType dtype;
  int64_t stride_batch, stride_token;
  MaskView valid;      // [B, N]
  int32_t batch;       // B
  int32_t num_tokens;  // N
  int32_t channels;    // C >= 1
  EnergyKind kind;
  float margin, alpha;
  float sharpness;  // of the Gaussian, in powers of two
  float scale;

  float* out;       // [B, N]: -inf where not valid, NaN without a cosine
  void* workspace;  // CUDA only: energy_scores_workspace(params) bytes, not initialised
};

VTK_CPU_KERNEL(void, energy_scores_cpu, EnergyScoresParams)

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
int64_t energy_scores_workspace(const EnergyScoresParams& params);
cudaError_t energy_scores_cuda(const EnergyScoresParams& params, cudaStream_t stream);
#endif

}  // namespace vtk
