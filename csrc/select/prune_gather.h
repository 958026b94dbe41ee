// prune_gather: keep the highest scores of each segment and gather their token rows.
//
// A segment is one batch row (B segments of N tokens) or one packed sequence of the varlen form.
#pragma once
#include <cstdint>

#include "common/cpu_isa.h"
#include "common/dtype.h"

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
#include <cuda_runtime.h>
#endif

namespace vtk {

inline constexpr int kMaxGatherTensors = 16;

// One tensor whose rows are gathered. Strides are in bytes.
struct GatherRows {
  const char* in;  // [outer, B or 1, N, row_bytes]; varlen: [T, row_bytes]
  char* out;       // [outer, B, keep, row_bytes], contiguous; varlen: [total_keep, row_bytes]
  int64_t row_bytes;
  int64_t stride_token;
  int64_t stride_batch;  // 0: one row set shared by the batch (rotary tables, expanded views)
  int64_t stride_outer;
  int64_t outer;  // leading dimensions before the batch, for example 3 of M-RoPE position ids
};

struct PruneGatherParams {
  const void* scores;  // [B, H, N] or varlen [H, T], strides in elements
  DType scores_dtype;
  int64_t scores_stride_batch, scores_stride_head, scores_stride_token;
  int32_t num_heads;  // 1 when the scores have no head dimension
  Reduce head_reduce;
  MaskView keep_mask;  // [B, N] or [T]
  MaskView drop_mask;

  int32_t num_segments;  // B
  int32_t num_tokens;    // N; varlen: T, the packed length
  int32_t keep;          // per segment; unused in the varlen form
  Order order;

  // varlen only, null otherwise. The CPU op has checked both arrays; on CUDA nobody has read them yet.
  const int32_t* cu_seqlens;  // [B + 1]
  const int32_t* keeps;       // [B]
  int32_t* cu_kept;           // [B + 1]
  int64_t total_keep;         // rows allocated for all segments together

  int64_t* indices;  // [B, keep]; varlen: [total_keep], rows of the packed tensor
  GatherRows rows[kMaxGatherTensors];
  int32_t num_rows;
};

// What makes a selection impossible. The CPU kernel reports the first segment that has it (ok() when none)
// and writes nothing for that segment; the CUDA kernel clamps without a sync instead, see prune_gather.cu.
struct PruneGatherConflict {
  enum Kind : int32_t { kNone, kKeptAndDropped, kTooManyForced, kTooFewAllowed };
  Kind kind = kNone;
  int32_t segment = 0;
  int64_t count = 0;  // forced or allowed tokens, or the index of the token that is set in both masks
  int64_t keep = 0;
  bool ok() const { return kind == kNone; }
};

VTK_CPU_KERNEL(PruneGatherConflict, prune_gather_cpu, PruneGatherParams)

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
cudaError_t prune_gather_cuda(const PruneGatherParams& params, cudaStream_t stream);
#endif

}  // namespace vtk
