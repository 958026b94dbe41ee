// merge_apply: schema, checks, allocation, launch.
#include "merge/merge_apply.h"

#include <cmath>

#include "common/backend.h"
#include "common/check.h"
#include "merge/apply_arguments.h"
#include "merge/owner_argument.h"

namespace vtk {
namespace {

constexpr const char* kOp = "merge_apply";

MergeReduce parse_merge_reduce(const std::string& text) {
  if (text == "weighted_mean") return MergeReduce::kWeightedMean;
  if (text == "mean") return MergeReduce::kMean;
  if (text == "sum") return MergeReduce::kSum;
  if (text == "max") return MergeReduce::kMax;
  if (text == "target_plus_mean") return MergeReduce::kTargetPlusMean;
  if (text == "beta") return MergeReduce::kBeta;
  if (text == "pivot") return MergeReduce::kPivot;
  if (text == "similarity_weighted") return MergeReduce::kSimilarityWeighted;
  if (text == "sequential_half") return MergeReduce::kSequentialHalf;
  if (text == "prune") return MergeReduce::kPrune;
  fail(kOp,
       "expected reduce to be \"weighted_mean\", \"mean\", \"sum\", \"max\", \"target_plus_mean\", \"beta\", "
       "\"pivot\", \"similarity_weighted\", \"sequential_half\" or \"prune\", got \"",
       text, "\"");
}

// merge_apply(values [B, N, D], owner int64 [B, N], out_len) -> (merged [B, out_len, D], weight float32 [B, out_len])
std::tuple<Tensor, Tensor> merge_apply(const Tensor& values, const Tensor& owner, int64_t out_len,
                                       const std::optional<Tensor>& weight, const std::string& reduce,
                                       const std::optional<Tensor>& center, double beta) {
  MergeApplyParams p = {};
  set_values(kOp, "values", p, values);
  VTK_CHECK(kOp, out_len >= 0, "expected out_len >= 0, got ", out_len);
  p.out_len = check_count(kOp, "out_len", out_len);
  p.reduce = parse_merge_reduce(reduce);
  p.beta = static_cast<float>(beta);
  VTK_CHECK(kOp, std::isfinite(p.beta), "expected beta to be a finite number, got ", beta);
  check_owner(kOp, owner, p.batch, p.num_tokens, out_len, "out_len", "values", values);
  p.owner = static_cast<const int64_t*>(owner.const_data_ptr());
  p.owner_stride_batch = owner.stride(0);
  p.owner_stride_token = owner.stride(1);
  VTK_CHECK(kOp, center.has_value() == has_center(p.reduce), "expected ", has_center(p.reduce) ? "" : "no ",
            "center with reduce=\"", reduce, "\"");
  if (center.has_value()) set_center(kOp, p, *center, values);
  set_weight(kOp, "weight", p, weight, "values", values);
  return run_apply(kOp, p, values);
}

#if defined(VTK_DEFINES_SCHEMAS)
VTK_FRAGMENT(m) {
  // Reduces the tokens that share an owner into one row.
  m.def(
      "merge_apply(Tensor values, Tensor owner, SymInt out_len, *, Tensor? weight=None, str "
      "reduce=\"weighted_mean\", Tensor? center=None, float beta=0.6) -> (Tensor merged, Tensor weight)");
}
#endif

VTK_IMPL(m) { m.impl("merge_apply", TORCH_BOX(&merge_apply)); }

}  // namespace
}  // namespace vtk
