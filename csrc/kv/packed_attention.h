// packed_attention: attention of queries over packed pages and over the tokens that are in no page.
//
// A request's tokens, in this order: those of its pages (of its own, or of a pool by a table), those of its protected
// pages, the residual ones.
#pragma once
#include "common/cpu_isa.h"
#include "common/dtype.h"
#include "kv/page.h"

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
#include <cuda_runtime.h>
#endif

namespace vtk {

// Pages that share their schemes. Index 0: keys, 1: values.
struct PackedClass {
  KvPage page[2];
  KvView<const uint8_t> codes[2];  // [B, Hk, count, page.code_bytes]; of a pool [P, Hk, ..] with a batch stride of 0
  KvView<const uint16_t> meta[2];  // float16, of page.meta_count numbers
  int32_t count;                   // of a request, at most
};

struct PackedAttentionParams {
  KvView<const char> query;        // [B, H, Q, D] of dtype, strides in bytes
  PackedClass pages[2];            // the pages, the protected pages
  KvView<const char> residual[2];  // [B, Hk, R, D] of dtype, strides in bytes
  KvOrder order;                   // of the classes whose keys are a mix
  DType dtype;
  int32_t batch;            // B
  int32_t heads;            // H, a multiple of key_heads
  int32_t key_heads;        // Hk
  int32_t num_queries;      // Q
  int32_t residual_tokens;  // R
  int32_t head_dim;         // D

  const float* key_bias;  // [B | 1, 128 pages + 128 protected pages + R], or null; natural units
  int64_t bias_stride_batch, bias_stride_key;
  const int32_t* block_table;  // [B, pages[0].count] places in the pool, negative: a hole; or null
  int64_t table_stride_batch, table_stride_page;
  int32_t pool_pages;          // P
  const int32_t* page_counts;  // [B], or null: every request has pages[0].count
  int64_t page_counts_stride;
  const int32_t* residual_lengths;  // [B], or null: R
  int64_t residual_lengths_stride;

  // The queries are the last Q residual tokens; of these, query i sees the tokens j <= i (causal), or those whose bit
  // j % 64 of ancestors[b, i, j / 64] is set. Otherwise every query sees every token.
  bool causal;
  const int64_t* ancestors;  // [B | 1, Q, ceil(Q / 64)], or null
  int64_t ancestors_stride_batch, ancestors_stride_query, ancestors_stride_word;

  float scale;
  void* out;         // [B, H, Q, D] of dtype, contiguous
  float* lse;        // [B, H, Q]
  float* workspace;  // packed_attention_workspace(params) floats, on CUDA alone
};

// ---- What both processors read of the parameters. CUDA sources clamp what the CPU's checks report. ----

VTK_HOST_DEVICE inline int32_t packed_count(const int32_t* counts, int64_t stride, int64_t b, int32_t most) {
  if (counts == nullptr) return most;
  const int32_t count = counts[b * stride];
  return count < 0 ? 0 : count > most ? most : count;
}
VTK_HOST_DEVICE inline int32_t pages_of(const PackedAttentionParams& p, int64_t b) {
  return packed_count(p.page_counts, p.page_counts_stride, b, p.pages[0].count);
}
VTK_HOST_DEVICE inline int32_t residual_of(const PackedAttentionParams& p, int64_t b) {
  return packed_count(p.residual_lengths, p.residual_lengths_stride, b, p.residual_tokens);
}

// The row of the class's views that holds page n of request b; -1: a hole.
VTK_HOST_DEVICE inline int32_t packed_place(const PackedAttentionParams& p, int kind, int64_t b, int32_t n) {
  if (kind != 0 || p.block_table == nullptr) return n;
  const int32_t place = p.block_table[b * p.table_stride_batch + n * p.table_stride_page];
  return place < p.pool_pages ? place : -1;
}

// Whether query i sees residual token j, that `length` tokens of the request bound.
VTK_HOST_DEVICE inline bool packed_sees(const PackedAttentionParams& p, int64_t b, int32_t i, int32_t j,
                                        int32_t length) {
  const int32_t node = j - (length - p.num_queries);
  if (p.causal) return node <= i;
  if (p.ancestors == nullptr || node < 0) return true;
  const int64_t word =
      p.ancestors[b * p.ancestors_stride_batch + i * p.ancestors_stride_query + node / 64 * p.ancestors_stride_word];
  return (word >> node % 64 & 1) != 0;
}

VTK_CPU_KERNEL(void, packed_attention_cpu, PackedAttentionParams)

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
int64_t packed_attention_workspace(const PackedAttentionParams& params);
cudaError_t packed_attention_cuda(const PackedAttentionParams& params, cudaStream_t stream);
#endif

}  // namespace vtk
