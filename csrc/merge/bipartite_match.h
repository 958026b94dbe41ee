// bipartite_match: which tokens merge into which, and the output row of every token.
//
// An edge joins a source to its most similar destination; the most similar edges merge. Sources are the tokens of
// even rank, destinations those of odd rank; a protected token is neither.
#pragma once
#include <cstdint>

#include "common/cosine.h"
#include "common/cpu_isa.h"
#include "common/dtype.h"

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
#include <cuda_runtime.h>
#endif

namespace vtk {

// Output rows: survivors by position, or unmerged sources before destinations as ToMe lists them.
enum class MergeOrder : int32_t { kPosition, kTome };

struct BipartiteMatchParams {
  const void* metric;  // [B, N, C], the last dimension contiguous; strides in elements
  DType dtype;
  int64_t stride_batch, stride_token;
  MaskView protect;     // [B, N]
  const int64_t* rank;  // [B, N], null: the position
  int64_t rank_stride_batch, rank_stride_token;
  int32_t batch;       // B
  int32_t num_tokens;  // N
  int32_t channels;    // C >= 1
  int32_t merges;      // r, at most the even positions or, with rank, N
  bool has_threshold;  // an edge must have a similarity above it
  float threshold;
  MergeOrder order;
  // CUDA only: exactly `merges` tokens leave each row. Where protect allows fewer edges, the lowest-indexed sources
  // without one are dropped.
  bool exact;

  int64_t* owner;     // [B, N]
  float* similarity;  // [B, N], or null
  void* workspace;    // CUDA only: bipartite_match_workspace(params) bytes, not initialised
};

VTK_CPU_KERNEL(void, bipartite_match_cpu, BipartiteMatchParams)

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
int64_t bipartite_match_workspace(const BipartiteMatchParams& params);
cudaError_t bipartite_match_cuda(const BipartiteMatchParams& params, cudaStream_t stream);
#endif

}  // namespace vtk
