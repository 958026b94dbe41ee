// packed_attention: attention of queries over packed pages and over the tokens that are in no page.
#pragma once
#include "common/cpu_isa.h"
#include "common/dtype.h"
#include "kv/page.h"

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
#include <cuda_runtime.h>
#endif

namespace vtk {

struct PackedSource {
  KvView<const uint8_t> codes;  // [B, Hk, pages, page.code_bytes]
  KvView<const uint16_t> meta;  // float16 [B, Hk, pages, page.meta_count]
  KvView<const char> residual;  // [B, Hk, R, D] of dtype, strides in bytes
  KvPage page;
};

struct PackedAttentionParams {
  KvView<const char> query;  // [B, H, Q, D] of dtype, strides in bytes
  PackedSource side[2];      // keys, values
  KvOrder order;
  DType dtype;
  int32_t batch;        // B
  int32_t heads;        // H, a multiple of key_heads
  int32_t key_heads;    // Hk
  int32_t num_queries;  // Q
  int32_t pages;
  int32_t residual;  // R
  int32_t head_dim;  // D
  bool causal;       // query i sees the residual tokens j <= R - Q + i
  float scale;
  void* out;         // [B, H, Q, D] of dtype, contiguous
  float* lse;        // [B, H, Q]
  float* workspace;  // packed_attention_workspace(params) floats, on CUDA alone
};

VTK_CPU_KERNEL(void, packed_attention_cpu, PackedAttentionParams)

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
int64_t packed_attention_workspace(const PackedAttentionParams& params);
cudaError_t packed_attention_cuda(const PackedAttentionParams& params, cudaStream_t stream);
#endif

}  // namespace vtk
