// bipartite_match: schema, checks, allocation, launch.
#include "merge/bipartite_match.h"

#include <algorithm>
#include <tuple>

#include "common/backend.h"
#include "common/check.h"
#include "common/empty.h"
#include "merge/match_arguments.h"

namespace vtk {
namespace {

constexpr const char* kOp = "bipartite_match";

// bipartite_match(metric [B, N, C], r) -> (owner int64 [B, N], similarity float32 [B, N])
std::tuple<Tensor, Tensor> bipartite_match(const Tensor& metric, int64_t r, const std::optional<Tensor>& protect,
                                           std::optional<double> threshold, const std::string& split,
                                           const std::optional<Tensor>& rank) {
  BipartiteMatchParams p = {};
  set_metric(kOp, p, metric, protect);
  VTK_CHECK(kOp, split == "even_odd", "expected split to be \"even_odd\" (for another split give rank), got \"", split,
            "\"");
  if (rank.has_value()) {
    check_same_device(kOp, "rank", *rank, "metric", metric);
    check_dtype(kOp, "rank", *rank, ScalarType::Long);
    check_shape(kOp, "rank", *rank, "[B, N]", {p.batch, p.num_tokens});
    p.rank = static_cast<const int64_t*>(rank->const_data_ptr());
    p.rank_stride_batch = rank->stride(0);
    p.rank_stride_token = rank->stride(1);
  }
  set_merges(kOp, p, r);
  p.has_threshold = threshold.has_value();
  p.threshold = static_cast<float>(threshold.value_or(0.0));
  VTK_CHECK(kOp, p.threshold == p.threshold, "expected threshold to be a number, got NaN");

  Tensor owner = empty({p.batch, p.num_tokens}, ScalarType::Long, metric);
  Tensor similarity = empty({p.batch, p.num_tokens}, ScalarType::Float, metric);
  p.owner = static_cast<int64_t*>(owner.mutable_data_ptr());
  p.similarity = static_cast<float*>(similarity.mutable_data_ptr());
  run_match(kOp, p, metric);
  return {owner, similarity};
}

#if defined(VTK_DEFINES_SCHEMAS)
VTK_FRAGMENT(m) {
  // Bipartite soft matching: the r most similar source-destination edges, as the owner map of their merge.
  m.def(
      "bipartite_match(Tensor metric, SymInt r, *, Tensor? protect=None, float? threshold=None, str "
      "split=\"even_odd\", Tensor? rank=None) -> (Tensor owner, Tensor similarity)");
}
#endif

VTK_IMPL(m) { m.impl("bipartite_match", TORCH_BOX(&bipartite_match)); }

}  // namespace
}  // namespace vtk
