// energy_scores: schema, checks, allocation, launch.
#include "score/energy_scores.h"

#include <cmath>

#include "common/backend.h"
#include "common/check.h"
#include "common/empty.h"
#include "common/metric_argument.h"

namespace vtk {
namespace {

constexpr const char* kOp = "energy_scores";
constexpr double kLog2E = 1.4426950408889634, kSqrtTwoPi = 2.5066282746310002;

void set_kernel(EnergyScoresParams& p, const std::string& kind, double margin, double alpha) {
  VTK_CHECK(kOp, kind == "elu" || kind == "gaussian", "expected kind to be \"elu\" or \"gaussian\", got \"", kind,
            "\"");
  VTK_CHECK(kOp, std::isfinite(margin), "expected margin to be a finite number, got ", margin);
  VTK_CHECK(kOp, std::isfinite(alpha), "expected alpha to be a finite number, got ", alpha);
  p.kind = kind == "elu" ? EnergyKind::kElu : EnergyKind::kGaussian;
  p.margin = static_cast<float>(margin);
  p.alpha = static_cast<float>(alpha);
  p.scale = 1.0f;
  if (p.kind == EnergyKind::kElu) return;
  VTK_CHECK(kOp, margin < 1.0, "expected margin < 1 with kind \"gaussian\", whose width is 1 - margin, got ", margin);
  const double sigma = 1.0 - margin;
  p.sharpness = static_cast<float>(0.5 * kLog2E / (sigma * sigma));
  p.scale = static_cast<float>(1.0 / (sigma * kSqrtTwoPi));
}

// energy_scores(metric [B, N, C]) -> float32 [B, N]
Tensor energy_scores(const Tensor& metric, double margin, const std::string& kind, double alpha,
                     const std::optional<Tensor>& valid) {
  EnergyScoresParams p = {};
  set_metric(kOp, p, metric);
  p.valid = mask_view(kOp, "valid", valid, "[B, N]", {p.batch, p.num_tokens}, "metric", metric);
  set_kernel(p, kind, margin, alpha);

  Tensor out = empty({p.batch, p.num_tokens}, ScalarType::Float, metric);
  if (p.batch == 0 || p.num_tokens == 0) return out;
  p.out = static_cast<float*>(out.mutable_data_ptr());
#if defined(VTK_BACKEND_CUDA)
  Tensor workspace = empty({energy_scores_workspace(p)}, ScalarType::Byte, metric);
  p.workspace = workspace.mutable_data_ptr();
#endif
  VTK_LAUNCH(kOp, energy_scores, p, metric);
  return out;
}

#if defined(VTK_DEFINES_SCHEMAS)
VTK_FRAGMENT(m) {
  // Mean over all tokens of a function of the cosine: high where a token has many like it.
  m.def(
      "energy_scores(Tensor metric, *, float margin=0.9, str kind=\"elu\", float alpha=1.0, Tensor? valid=None) -> "
      "Tensor");
}
#endif

VTK_IMPL(m) { m.impl("energy_scores", TORCH_BOX(&energy_scores)); }

}  // namespace
}  // namespace vtk
