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

// What is one for all tensors.
void set_reduction(MergeApplyParams& p, const Tensor& values, const Tensor& owner, int64_t out_len,
                   const std::optional<Tensor>& weight, const std::string& reduce, const std::optional<Tensor>& center,
                   double beta) {
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
}

// merge_apply(values [B, N, D], owner int64 [B, N], out_len) -> (merged [B, out_len, D], weight float32 [B, out_len])
std::tuple<Tensor, Tensor> merge_apply(const Tensor& values, const Tensor& owner, int64_t out_len,
                                       const std::optional<Tensor>& weight, const std::string& reduce,
                                       const std::optional<Tensor>& center, double beta) {
  MergeApplyParams p = {};
  set_values(kOp, "values", p, values);
  set_reduction(p, values, owner, out_len, weight, reduce, center, beta);
  Tensor merged = empty_merged(p, 0, values);
  return {merged, run_apply(kOp, p, values)};
}

// merge_apply.tensors: one owner map over several tensors [B, N, D] or [B, N], in one launch.
std::tuple<std::vector<Tensor>, Tensor> merge_apply_tensors(const std::vector<Tensor>& values, const Tensor& owner,
                                                            int64_t out_len, const std::optional<Tensor>& weight,
                                                            const std::string& reduce,
                                                            const std::optional<Tensor>& center, double beta) {
  VTK_CHECK(kOp, !values.empty() && values.size() <= kMaxMergeTensors, "expected 1 to ", kMaxMergeTensors,
            " tensors in values, got ", values.size());
  check_dim(kOp, "owner", owner, 2, "[B, N]");
  MergeApplyParams p = {};
  p.batch = check_count(kOp, "batch size", owner.size(0));
  p.num_tokens = check_count(kOp, "token count", owner.size(1));
  for (size_t t = 0; t < values.size(); ++t) {
    const std::string name = "values[" + std::to_string(t) + "]";
    VTK_CHECK(kOp,
              (values[t].dim() == 2 || values[t].dim() == 3) && values[t].size(0) == p.batch &&
                  values[t].size(1) == p.num_tokens,
              "expected ", name, " of shape [B, N, D] or [B, N] with [B, N] = ", shape_text(owner),
              " as in owner, got ", shape_text(values[t]));
    check_same_device(kOp, name.c_str(), values[t], "values[0]", values[0]);
    add_values(kOp, name.c_str(), p, values[t], 1);
  }
  set_reduction(p, values[0], owner, out_len, weight, reduce, center, beta);
  std::vector<Tensor> merged;
  for (size_t t = 0; t < values.size(); ++t) merged.push_back(empty_merged(p, static_cast<int32_t>(t), values[t]));
  return {merged, run_apply(kOp, p, values[0])};
}

#if defined(VTK_DEFINES_SCHEMAS)
VTK_FRAGMENT(m) {
  // Reduces the tokens that share an owner into one row.
  m.def(
      "merge_apply(Tensor values, Tensor owner, SymInt out_len, *, Tensor? weight=None, str "
      "reduce=\"weighted_mean\", Tensor? center=None, float beta=0.6) -> (Tensor merged, Tensor weight)");
  // One owner map over several tensors of any width and float type.
  m.def(
      "merge_apply.tensors(Tensor[] values, Tensor owner, SymInt out_len, *, Tensor? weight=None, str "
      "reduce=\"weighted_mean\", Tensor? center=None, float beta=0.6) -> (Tensor[] merged, Tensor weight)");
}
#endif

VTK_IMPL(m) {
  m.impl("merge_apply", TORCH_BOX(&merge_apply));
  m.impl("merge_apply.tensors", TORCH_BOX(&merge_apply_tensors));
}

}  // namespace
}  // namespace vtk
