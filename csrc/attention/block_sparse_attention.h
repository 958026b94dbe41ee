// block_sparse_attention: softmax(scale q k^T + bias) v over the key blocks that are listed for each block of queries.
// rule_attention: the same over the keys that a rule gives (attention_rule.h).
#pragma once
#include <cstdint>

#include "common/cpu_isa.h"
#include "common/dtype.h"

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
#include <cuda_runtime.h>
#endif

namespace vtk {

// Lists of int32 entries, one list for each batch item, head and block of queries. A stride of 0 shares a list. Null
// counts mean that every list is empty. Strides are in elements; entries of a list lie together.
struct BlockLists {
  const int32_t* counts;   // [B | 1, H | 1, Mq]
  const int32_t* entries;  // [B | 1, H | 1, Mq, capacity], the first `count` are valid
  int64_t count_stride_batch, count_stride_head, count_stride_row;
  int64_t entry_stride_batch, entry_stride_head, entry_stride_row;
  int32_t capacity;
};

// [B, heads, rows, D] with a contiguous last dimension; strides are in elements.
struct HeadsView {
  const void* data;
  int64_t stride_batch, stride_head, stride_row;
};

struct BlockSparseAttentionParams {
  HeadsView query;  // [B, H, Q, D]
  HeadsView key;    // [B, Hk, N, D]
  HeadsView value;  // [B, Hk, N, D]
  DType dtype;      // of these and of out

  BlockLists partial;  // blocks of block_k keys, masked element by element: causal, length
  BlockLists full;     // the same without the causal mask
  BlockLists columns;  // single keys, masked like partial blocks
  bool token_offsets;  // entries of partial and full are the first keys of their blocks instead of block numbers

  const int32_t* rule;  // [H | 1, kRuleNumbers], in place of the lists and causal, or null
  int64_t rule_stride_head;
  const int32_t* starts_k;  // [B]: the first key that exists, with a rule, or null: 0
  int64_t starts_stride;

  const float* key_bias;  // [B, N], added to the logits, or null
  int64_t bias_stride_batch, bias_stride_key;
  const int32_t* seqlens_k;  // [B]: keys that exist, or null: N
  int64_t seqlens_stride;

  int32_t batch;        // B
  int32_t num_heads;    // H
  int32_t key_heads;    // Hk, divides H
  int32_t num_queries;  // Q
  int32_t num_keys;     // N
  int32_t head_dim;     // D
  int32_t block_q, block_k;
  float scale;
  bool causal;  // query i sees keys j <= i + length - Q

  void* out;         // [B, H, Q, D], contiguous
  float* lse;        // [B, H, Q], natural log
  float* workspace;  // CUDA only: block_sparse_attention_workspace(params) floats
};

VTK_CPU_KERNEL_BF16(void, block_sparse_attention_cpu, BlockSparseAttentionParams)

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
int64_t block_sparse_attention_workspace(const BlockSparseAttentionParams& params);
cudaError_t block_sparse_attention_cuda(const BlockSparseAttentionParams& params, cudaStream_t stream);
#endif

}  // namespace vtk
