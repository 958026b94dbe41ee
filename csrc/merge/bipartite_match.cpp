// bipartite_match: schema, checks, allocation, launch.
#include "merge/bipartite_match.h"

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
  set_metric(kOp, p, metric, false, protect);
  set_split(kOp, p, split, threshold);
  set_rank(kOp, p, rank, false, metric);
  set_merges(kOp, p, r);

  Tensor owner = empty({p.batch, p.num_tokens}, ScalarType::Long, metric);
  Tensor similarity = empty({p.batch, p.num_tokens}, ScalarType::Float, metric);
  p.owner = static_cast<int64_t*>(owner.mutable_data_ptr());
  p.similarity = static_cast<float*>(similarity.mutable_data_ptr());
  run_match(kOp, p, metric);
  return {owner, similarity};
}

// bipartite_match.varlen(metric [T, C], cu_seqlens int32 [S + 1], r int32 [S])
//   -> (owner int64 [T], similarity float32 [T], cu_merged int32 [S + 1])
std::tuple<Tensor, Tensor, Tensor> bipartite_match_varlen(const Tensor& metric, const Tensor& cu_seqlens,
                                                          const Tensor& r, const std::optional<Tensor>& protect,
                                                          std::optional<double> threshold, const std::string& split,
                                                          const std::optional<Tensor>& rank) {
  BipartiteMatchParams p = {};
  set_metric(kOp, p, metric, true, protect);
  set_split(kOp, p, split, threshold);
  set_rank(kOp, p, rank, true, metric);
  Tensor cu_merged = set_segments(kOp, p, cu_seqlens, r, metric);

  Tensor owner = empty({p.num_tokens}, ScalarType::Long, metric);
  Tensor similarity = empty({p.num_tokens}, ScalarType::Float, metric);
  p.owner = static_cast<int64_t*>(owner.mutable_data_ptr());
  p.similarity = static_cast<float*>(similarity.mutable_data_ptr());
  run_match(kOp, p, metric);
  return {owner, similarity, cu_merged};
}

#if defined(VTK_DEFINES_SCHEMAS)
VTK_FRAGMENT(m) {
  // Bipartite soft matching: the r most similar source-destination edges, as the owner map of their merge.
  m.def(
      "bipartite_match(Tensor metric, SymInt r, *, Tensor? protect=None, float? threshold=None, str "
      "split=\"even_odd\", Tensor? rank=None) -> (Tensor owner, Tensor similarity)");
  // The same for every packed segment, each with its own r; owner counts rows of the packed output.
  m.def(
      "bipartite_match.varlen(Tensor metric, Tensor cu_seqlens, Tensor r, *, Tensor? protect=None, float? "
      "threshold=None, str split=\"even_odd\", Tensor? rank=None) -> (Tensor owner, Tensor similarity, Tensor "
      "cu_merged)");
}
#endif

VTK_IMPL(m) {
  m.impl("bipartite_match", TORCH_BOX(&bipartite_match));
  m.impl("bipartite_match.varlen", TORCH_BOX(&bipartite_match_varlen));
}

}  // namespace
}  // namespace vtk
