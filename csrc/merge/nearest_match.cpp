// nearest_match: schema, checks, allocation, launch.
#include "merge/nearest_match.h"

#include <tuple>
#include <vector>

#include "common/backend.h"
#include "common/check.h"
#include "common/empty.h"
#include "common/metric_argument.h"

namespace vtk {
namespace {

constexpr const char* kOp = "nearest_match";

Distance parse_distance(const std::string& text) {
  if (text == "cosine") return Distance::kCosine;
  if (text == "euclidean") return Distance::kEuclidean;
  fail(kOp, "expected distance to be \"cosine\" or \"euclidean\", got \"", text, "\"");
}

#if !defined(VTK_BACKEND_CUDA)
void check_centers(const NearestMatchParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    std::vector<int64_t> row_of(p.num_tokens, -1);
    for (int64_t k = 0; k < p.num_centers; ++k) {
      const int64_t n = p.centers[b * p.centers_stride_batch + k * p.centers_stride_row];
      VTK_CHECK(kOp, n >= -1 && n < p.num_tokens, "expected -1 <= centers < N = ", p.num_tokens, ", got centers[", b,
                ", ", k, "] = ", n);
      if (n == -1) continue;
      VTK_CHECK(kOp, row_of[n] == -1, "expected distinct centers, got centers[", b, ", ", k, "] = centers[", b, ", ",
                row_of[n], "] = ", n);
      VTK_CHECK(kOp, p.valid.data == nullptr || p.valid.data[b * p.valid.stride_row + n * p.valid.stride_col],
                "expected valid centers, got centers[", b, ", ", k, "] = ", n, " with valid[", b, ", ", n, "] = False");
      row_of[n] = k;
    }
  }
}
#endif

// nearest_match(metric [B, N, C], centers int64 [B, K]) -> (owner int64 [B, N], similarity float32 [B, N])
std::tuple<Tensor, Tensor> nearest_match(const Tensor& metric, const Tensor& centers,
                                         const std::optional<Tensor>& valid, const std::string& distance) {
  NearestMatchParams p = {};
  set_metric(kOp, p, metric);
  p.valid = mask_view(kOp, "valid", valid, "[B, N]", {p.batch, p.num_tokens}, "metric", metric);
  p.distance = parse_distance(distance);

  check_same_device(kOp, "centers", centers, "metric", metric);
  check_dtype(kOp, "centers", centers, ScalarType::Long);
  check_dim(kOp, "centers", centers, 2, "[B, K]");
  p.num_centers = check_count(kOp, "center count", centers.size(1));
  check_shape(kOp, "centers", centers, "[B, K]", {p.batch, p.num_centers});
  p.centers = static_cast<const int64_t*>(centers.const_data_ptr());
  p.centers_stride_batch = centers.stride(0);
  p.centers_stride_row = centers.stride(1);
#if !defined(VTK_BACKEND_CUDA)
  check_centers(p);
#endif

  Tensor owner = empty({p.batch, p.num_tokens}, ScalarType::Long, metric);
  Tensor similarity = empty({p.batch, p.num_tokens}, ScalarType::Float, metric);
  p.owner = static_cast<int64_t*>(owner.mutable_data_ptr());
  p.similarity = static_cast<float*>(similarity.mutable_data_ptr());
  if (p.batch == 0 || p.num_tokens == 0) return {owner, similarity};
#if defined(VTK_BACKEND_CUDA)
  Tensor workspace = empty({nearest_match_workspace(p)}, ScalarType::Byte, metric);
  p.workspace = workspace.mutable_data_ptr();
#endif
  VTK_LAUNCH(kOp, nearest_match, p, metric);
  return {owner, similarity};
}

#if defined(VTK_DEFINES_SCHEMAS)
VTK_FRAGMENT(m) {
  // The most similar center of every token, as the owner map of the merge of the tokens into the centers.
  m.def(
      "nearest_match(Tensor metric, Tensor centers, *, Tensor? valid=None, str distance=\"cosine\") -> (Tensor owner, "
      "Tensor similarity)");
}
#endif

VTK_IMPL(m) { m.impl("nearest_match", TORCH_BOX(&nearest_match)); }

}  // namespace
}  // namespace vtk
