// cluster_dpc_knn: schema, checks, allocation, launch.
#include "merge/cluster_dpc_knn.h"

#include <tuple>

#include "common/backend.h"
#include "merge/cluster_arguments.h"

namespace vtk {
namespace {

constexpr const char* kOp = "cluster_dpc_knn";

void set_counts(ClusterDpcKnnParams& p, const std::optional<Tensor>& counts, const Tensor& tokens) {
  if (!counts.has_value()) return;
  check_same_device(kOp, "counts", *counts, "tokens", tokens);
  check_dtype(kOp, "counts", *counts, ScalarType::Int);
  check_shape(kOp, "counts", *counts, "[B]", {p.tokens.batch});
  p.counts = static_cast<const int32_t*>(counts->const_data_ptr());
  p.counts_stride = counts->stride(0);
#if !defined(VTK_BACKEND_CUDA)  // where a report needs a sync, the kernel clamps
  for (int64_t b = 0; b < p.tokens.batch; ++b) {
    const int32_t count = p.counts[b * p.counts_stride];
    VTK_CHECK(kOp, count >= 0 && count <= p.clusters, "expected 0 <= counts <= clusters = ", p.clusters,
              ", got counts[", b, "] = ", count);
  }
#endif
}

// cluster_dpc_knn(tokens [B, N, D], clusters) -> (centers int64 [B, clusters], owner int64 [B, N])
std::tuple<Tensor, Tensor> cluster_dpc_knn(const Tensor& tokens, int64_t clusters, int64_t k,
                                           const std::optional<Tensor>& valid, const std::optional<Tensor>& counts) {
  ClusterDpcKnnParams p = {};
  p.tokens = cluster_tokens(kOp, tokens, valid);
  p.clusters = cluster_count(kOp, clusters, p.tokens);
  VTK_CHECK(kOp, k >= 1 && k <= kMaxNearest, "expected 1 <= k <= ", kMaxNearest, ", got k = ", k);
  p.k = static_cast<int32_t>(k);
  set_counts(p, counts, tokens);

  Tensor centers = empty({p.tokens.batch, p.clusters}, ScalarType::Long, tokens);
  Tensor owner = empty({p.tokens.batch, p.tokens.count}, ScalarType::Long, tokens);
  p.centers = static_cast<int64_t*>(centers.mutable_data_ptr());
  p.owner = static_cast<int64_t*>(owner.mutable_data_ptr());
  if (p.tokens.batch == 0 || p.tokens.count == 0) return {centers, owner};
#if defined(VTK_BACKEND_CUDA)
  Tensor workspace = empty({cluster_dpc_knn_workspace(p)}, ScalarType::Byte, tokens);
  p.workspace = workspace.mutable_data_ptr();
#endif
  VTK_LAUNCH(kOp, cluster_dpc_knn, p, tokens);
  return {centers, owner};
}

#if defined(VTK_DEFINES_SCHEMAS)
VTK_FRAGMENT(m) {
  // Density peaks over the k nearest tokens; the others go to their nearest center.
  m.def(
      "cluster_dpc_knn(Tensor tokens, SymInt clusters, *, int k=7, Tensor? valid=None, Tensor? counts=None) -> (Tensor "
      "centers, Tensor owner)");
}
#endif

VTK_IMPL(m) { m.impl("cluster_dpc_knn", TORCH_BOX(&cluster_dpc_knn)); }

}  // namespace
}  // namespace vtk
