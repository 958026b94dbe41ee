// attention_scores: how much attention each key token receives, reduced over heads and query rows.
#pragma once
#include <cstdint>

#include "common/cpu_isa.h"
#include "common/dtype.h"

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
#include <cuda_runtime.h>
#endif

namespace vtk {

// Strides are in elements.
struct AttentionScoresParams {
  const void* query;  // [B, H, Q, D]
  const void* key;    // [B, Hk, N, D]
  DType dtype;        // of both
  int64_t query_stride_batch, query_stride_head, query_stride_row;
  int64_t key_stride_batch, key_stride_head, key_stride_row;
  const float* lse;  // [B, H, Q] natural log, or null: the normaliser is taken over the N keys
  int64_t lse_stride_batch, lse_stride_head, lse_stride_row;
  MaskView key_mask;    // [B, N], false excludes a key
  MaskView query_mask;  // [B, Q], false rows do not vote

  int32_t batch;        // B
  int32_t num_heads;    // H
  int32_t key_heads;    // Hk, divides H
  int32_t num_queries;  // Q
  int32_t num_keys;     // N
  int32_t head_dim;     // D
  float scale;
  Reduce head_reduce;
  Reduce query_reduce;
  bool causal;  // row i sees keys j <= N - Q + i

  float* out;        // [B, N], or [B, H, N] with head_reduce none; contiguous
  float* workspace;  // CUDA only: attention_scores_workspace(params) floats
};

VTK_CPU_KERNEL(void, attention_scores_cpu, AttentionScoresParams)

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
int64_t attention_scores_workspace(const AttentionScoresParams& params);
cudaError_t attention_scores_cuda(const AttentionScoresParams& params, cudaStream_t stream);
#endif

}  // namespace vtk
