// cluster_kmedoids: schema, checks, allocation, launch.
#include "merge/cluster_kmedoids.h"

#include <tuple>

#include "common/backend.h"
#include "merge/cluster_arguments.h"

namespace vtk {
namespace {

constexpr const char* kOp = "cluster_kmedoids";

// cluster_kmedoids(tokens [B, N, D], clusters) -> (medoids int64 [B, clusters], owner int64 [B, N])
std::tuple<Tensor, Tensor> cluster_kmedoids(const Tensor& tokens, int64_t clusters, int64_t iterations,
                                            double tolerance, const std::optional<Tensor>& valid) {
  ClusterKmedoidsParams p = {};
  p.tokens = cluster_tokens(kOp, tokens, valid);
  p.clusters = cluster_count(kOp, clusters, p.tokens);
  VTK_CHECK(kOp, iterations >= 0, "expected iterations >= 0, got ", iterations);
  VTK_CHECK(kOp, tolerance >= 0, "expected tolerance >= 0, got ", tolerance);
  p.iterations = iterations;
  p.tolerance = static_cast<float>(tolerance);

  Tensor medoids = empty({p.tokens.batch, p.clusters}, ScalarType::Long, tokens);
  Tensor owner = empty({p.tokens.batch, p.tokens.count}, ScalarType::Long, tokens);
  p.medoids = static_cast<int64_t*>(medoids.mutable_data_ptr());
  p.owner = static_cast<int64_t*>(owner.mutable_data_ptr());
  if (p.tokens.batch == 0 || p.tokens.count == 0) return {medoids, owner};
#if defined(VTK_BACKEND_CUDA)
  Tensor workspace = empty({cluster_kmedoids_workspace(p)}, ScalarType::Byte, tokens);
  p.workspace = workspace.mutable_data_ptr();
#endif
  VTK_LAUNCH(kOp, cluster_kmedoids, p, tokens);
  return {medoids, owner};
}

#if defined(VTK_DEFINES_SCHEMAS)
VTK_FRAGMENT(m) {
  // k-medoids by Euclidean distance with farthest-first (KKZ) seeds.
  m.def(
      "cluster_kmedoids(Tensor tokens, SymInt clusters, *, int iterations=100, float tolerance=1e-6, Tensor? "
      "valid=None) -> (Tensor medoids, Tensor owner)");
}
#endif

VTK_IMPL(m) { m.impl("cluster_kmedoids", TORCH_BOX(&cluster_kmedoids)); }

}  // namespace
}  // namespace vtk
