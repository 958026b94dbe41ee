// block_sparse_attention_backward: gradients of block_sparse_attention for query, key and value, over the same lists.
#pragma once
#include "attention/block_sparse_attention.h"

namespace vtk {

struct BlockSparseAttentionBackwardParams {
  BlockSparseAttentionParams forward;  // as the forward pass had it; its out and lse are read
  HeadsView grad_out;                  // [B, H, Q, D]
  const float* grad_lse;               // [B, H, Q], contiguous, or null: zero

  void* grad_query;             // [B, H, Q, D], contiguous, of the dtype of query
  void *grad_key, *grad_value;  // [B, Hk, N, D], contiguous
  float* delta;                 // [B, H, Q], scratch: out . grad_out - grad_lse
  void* workspace;              // CUDA only: block_sparse_attention_backward_workspace(params) bytes
};

VTK_CPU_KERNEL(void, block_sparse_attention_backward_cpu, BlockSparseAttentionBackwardParams)

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
int64_t block_sparse_attention_backward_workspace(const BlockSparseAttentionBackwardParams& params);
cudaError_t block_sparse_attention_backward_cuda(const BlockSparseAttentionBackwardParams& params, cudaStream_t stream);
#endif

}  // namespace vtk
