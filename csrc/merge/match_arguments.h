// What the ops that match have in common: the arguments of the metric, the clamp of r, the launch.
#pragma once
#include <algorithm>
#include <optional>

#include "common/backend.h"
#include "common/check.h"
#include "common/empty.h"
#include "merge/bipartite_match.h"

namespace vtk {

inline void set_metric(const char* op, BipartiteMatchParams& p, const Tensor& metric,
                       const std::optional<Tensor>& protect) {
  check_dim(op, "metric", metric, 3, "[B, N, C]");
  p.dtype = float_dtype(op, "metric", metric);
  check_contiguous_last(op, "metric", metric);
  p.batch = check_count(op, "batch size", metric.size(0));
  p.num_tokens = check_count(op, "token count", metric.size(1));
  p.channels = check_count(op, "metric channel count", metric.size(2));
  VTK_CHECK(op, p.channels > 0, "expected metric with at least one channel, got ", shape_text(metric));
  p.metric = metric.const_data_ptr();
  p.stride_batch = metric.stride(0);
  p.stride_token = metric.stride(1);
  p.protect = mask_view(op, "protect", protect, "[B, N]", {p.batch, p.num_tokens}, "metric", metric);
}

// r clamped to the sources that the shape allows; values (protect, rank, threshold) may allow fewer.
inline void set_merges(const char* op, BipartiteMatchParams& p, int64_t r) {
  VTK_CHECK(op, r >= 0, "expected r >= 0, got r = ", r);
  const int64_t most = p.rank != nullptr ? p.num_tokens : p.num_tokens < 2 ? 0 : (int64_t{p.num_tokens} + 1) / 2;
  p.merges = static_cast<int32_t>(std::min(r, most));
}

inline void run_match([[maybe_unused]] const char* op, BipartiteMatchParams& p, [[maybe_unused]] const Tensor& like) {
  if (p.batch == 0 || p.num_tokens == 0) return;
#if defined(VTK_BACKEND_CUDA)
  Tensor workspace = empty({bipartite_match_workspace(p)}, ScalarType::Byte, like);
  p.workspace = workspace.mutable_data_ptr();
#endif
  VTK_LAUNCH(op, bipartite_match, p, like);
}

}  // namespace vtk
