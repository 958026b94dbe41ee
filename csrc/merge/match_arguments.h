// What the ops that match have in common: the arguments of the metric and of packed segments, the clamp of r, the
// launch.
#pragma once
#include <algorithm>
#include <optional>

#include "common/backend.h"
#include "common/check.h"
#include "common/empty.h"
#include "common/metric_argument.h"
#include "merge/bipartite_match.h"

namespace vtk {

// metric [B, N, C], or packed [T, C], which is one batch row until set_segments divides it.
inline void set_metric(const char* op, BipartiteMatchParams& p, const Tensor& metric, bool packed,
                       const std::optional<Tensor>& protect) {
  set_metric(op, p, metric, packed);
  std::vector<int64_t> shape = {p.batch, p.num_tokens};
  if (packed) shape = {p.num_tokens};
  p.protect = mask_view(op, "protect", protect, packed ? "[T]" : "[B, N]", shape, "metric", metric);
}

inline void set_split(const char* op, BipartiteMatchParams& p, const std::string& split,
                      std::optional<double> threshold) {
  VTK_CHECK(op, split == "even_odd" || split == "causal",
            "expected split to be \"even_odd\" or \"causal\" (for another split of bipartite_match give rank), got \"",
            split, "\"");
  p.split = split == "causal" ? MatchSplit::kCausal : MatchSplit::kEvenOdd;
  p.has_threshold = threshold.has_value();
  p.threshold = static_cast<float>(threshold.value_or(0.0));
  VTK_CHECK(op, p.threshold == p.threshold, "expected threshold to be a number, got NaN");
}

inline void set_rank(const char* op, BipartiteMatchParams& p, const std::optional<Tensor>& rank, bool packed,
                     const Tensor& metric) {
  if (!rank.has_value()) return;
  VTK_CHECK(op, p.split == MatchSplit::kEvenOdd, "expected no rank with split=\"causal\"");
  check_same_device(op, "rank", *rank, "metric", metric);
  check_dtype(op, "rank", *rank, ScalarType::Long);
  std::vector<int64_t> shape = {p.batch, p.num_tokens};
  if (packed) shape = {p.num_tokens};
  check_shape(op, "rank", *rank, packed ? "[T]" : "[B, N]", shape);
  p.rank = static_cast<const int64_t*>(rank->const_data_ptr());
  p.rank_stride_batch = packed ? 0 : rank->stride(0);
  p.rank_stride_token = rank->stride(packed ? 0 : 1);
}

// r clamped to the sources that the shape allows; values (protect, rank, threshold) may allow fewer.
inline void set_merges(const char* op, BipartiteMatchParams& p, int64_t r) {
  VTK_CHECK(op, r >= 0, "expected r >= 0, got r = ", r);
  p.merges = static_cast<int32_t>(std::min<int64_t>(r, most_merges(p, p.num_tokens)));
}

// The segments of a packed metric, cu_seqlens [S + 1] and r [S]. The CPU reads both; on CUDA the kernel clamps r, and
// drops every token when cu_seqlens does not ascend from 0 to T. Allocates cu_merged.
inline Tensor set_segments(const char* op, BipartiteMatchParams& p, const Tensor& cu_seqlens, const Tensor& r,
                           const Tensor& metric) {
  check_dtype(op, "r", r, ScalarType::Int);
  check_dtype(op, "cu_seqlens", cu_seqlens, ScalarType::Int);
  check_dim(op, "r", r, 1, "[segments]");
  check_contiguous_last(op, "r", r);
  check_contiguous_last(op, "cu_seqlens", cu_seqlens);
  check_same_device(op, "r", r, "metric", metric);
  check_same_device(op, "cu_seqlens", cu_seqlens, "metric", metric);
  check_shape(op, "cu_seqlens", cu_seqlens, "[segments + 1]", {r.size(0) + 1});
  p.batch = check_count(op, "segment count", r.size(0));
  p.cu_seqlens = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  p.segment_merges = static_cast<const int32_t*>(r.const_data_ptr());
#if !defined(VTK_BACKEND_CUDA)
  VTK_CHECK(op, p.cu_seqlens[0] == 0 && p.cu_seqlens[p.batch] == p.num_tokens,
            "expected cu_seqlens to run from 0 to T = ", p.num_tokens, ", got ", p.cu_seqlens[0], " to ",
            p.cu_seqlens[p.batch]);
  for (int32_t s = 0; s < p.batch; ++s) {
    VTK_CHECK(op, p.cu_seqlens[s] <= p.cu_seqlens[s + 1], "expected ascending cu_seqlens, got ", p.cu_seqlens[s],
              " then ", p.cu_seqlens[s + 1]);
    VTK_CHECK(op, p.segment_merges[s] >= 0, "expected r >= 0, got r[", s, "] = ", p.segment_merges[s]);
  }
#endif
  Tensor cu_merged = empty({int64_t{p.batch} + 1}, ScalarType::Int, metric);
  p.cu_merged = static_cast<int32_t*>(cu_merged.mutable_data_ptr());
  return cu_merged;
}

inline void run_match([[maybe_unused]] const char* op, BipartiteMatchParams& p, [[maybe_unused]] const Tensor& like) {
  if (p.cu_seqlens == nullptr && (p.batch == 0 || p.num_tokens == 0)) return;
#if defined(VTK_BACKEND_CUDA)
  Tensor workspace = empty({bipartite_match_workspace(p)}, ScalarType::Byte, like);
  p.workspace = workspace.mutable_data_ptr();
#endif
  VTK_LAUNCH(op, bipartite_match, p, like);
}

}  // namespace vtk
