// bipartite_match: which tokens merge into which, and the output row of every token.
//
// An edge joins a source to its most similar destination; the most similar edges merge. Sources are the tokens of
// even rank, destinations those of odd rank; a protected token is neither. Under the causal split every token is both,
// and an edge leads to an earlier token.
//
// An item is one batch row (B of N tokens) or one segment of the packed form; items do not mix.
#pragma once
#include <cstdint>

#include "common/cosine.h"
#include "common/cpu_isa.h"
#include "common/dtype.h"
#include "device/host_device.h"

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
#include <cuda_runtime.h>
#endif

namespace vtk {

// Output rows: survivors by position, or unmerged sources before destinations as ToMe lists them.
enum class MergeOrder : int32_t { kPosition, kTome };

// kCausal: into earlier tokens, and not transitively: what would merge into a merged token is dropped (owner -1).
enum class MatchSplit : int32_t { kEvenOdd, kCausal };

struct BipartiteMatchParams {
  const void* metric;  // [B, N, C], the last dimension contiguous; packed: [T, C]. Strides in elements
  DType dtype;
  int64_t stride_batch, stride_token;
  MaskView protect;  // [B, N] or [T]
  MatchSplit split;
  const int64_t* rank;  // [B, N] or [T], null: the position within the item
  int64_t rank_stride_batch, rank_stride_token;
  int32_t batch;       // B; packed: the segments S
  int32_t num_tokens;  // N; packed: T
  int32_t channels;    // C >= 1
  int32_t merges;      // r, at most most_merges(*this, N); packed: unused
  bool has_threshold;  // an edge must have a similarity above it
  float threshold;
  MergeOrder order;
  // CUDA only: exactly `merges` tokens leave each row. Where protect allows fewer edges, the lowest-indexed sources
  // without one are dropped.
  bool exact;

  // Packed only, null otherwise. The CPU op has checked both; on CUDA nobody has read them yet.
  const int32_t* cu_seqlens;      // [S + 1]
  const int32_t* segment_merges;  // [S], r

  int64_t* owner;      // [B, N] or [T]
  float* similarity;   // [B, N] or [T], or null
  int32_t* cu_merged;  // packed: [S + 1]
  void* workspace;     // CUDA only: bipartite_match_workspace(params) bytes, not initialised
};

// The sources that an item of `tokens` tokens has at most.
VTK_HOST_DEVICE constexpr int32_t most_merges(const BipartiteMatchParams& p, int32_t tokens) {
  if (tokens < 2) return p.rank != nullptr ? tokens : 0;
  return p.split == MatchSplit::kCausal ? tokens - 1 : p.rank != nullptr ? tokens : (tokens - 1) / 2 + 1;
}

VTK_CPU_KERNEL(void, bipartite_match_cpu, BipartiteMatchParams)

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
int64_t bipartite_match_workspace(const BipartiteMatchParams& params);
cudaError_t bipartite_match_cuda(const BipartiteMatchParams& params, cudaStream_t stream);
#endif

}  // namespace vtk
