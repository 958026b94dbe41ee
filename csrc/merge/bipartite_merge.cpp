// bipartite_merge: the kernels of bipartite_match and merge_apply in one call. It has none of its own.
#include "common/backend.h"
#include "common/check.h"
#include "common/empty.h"
#include "merge/apply_arguments.h"
#include "merge/match_arguments.h"

namespace vtk {
namespace {

constexpr const char* kOp = "bipartite_merge";

MergeOrder parse_merge_order(const std::string& text) {
  if (text == "position") return MergeOrder::kPosition;
  if (text == "tome") return MergeOrder::kTome;
  fail(kOp, "expected order to be \"position\" or \"tome\", got \"", text, "\"");
}

// On the CPU r is clamped to the sources that protect leaves in every row. On CUDA the output has the size that the
// shape promises, and sources without an edge are dropped instead: reading protect needs a sync.
#if defined(VTK_BACKEND_CUDA)
void clamp_to_protect(BipartiteMatchParams& p) { p.exact = true; }
#else
void clamp_to_protect(BipartiteMatchParams& p) {
  for (int64_t b = 0; p.protect.data != nullptr && b < p.batch; ++b) {
    int32_t allowed[2] = {0, 0};  // sources, destinations
    for (int64_t n = 0; n < p.num_tokens; ++n)
      allowed[n % 2] += !p.protect.data[b * p.protect.stride_row + n * p.protect.stride_col];
    p.merges = std::min(p.merges, allowed[1] > 0 ? allowed[0] : 0);
  }
}
#endif

// bipartite_merge(tokens [B, N, D], metric [B, N, C], r, size [B, N])
//   -> (merged [B, N - r, D], size float32 [B, N - r], owner int64 [B, N])
std::tuple<Tensor, Tensor, Tensor> bipartite_merge(const Tensor& tokens, const Tensor& metric, int64_t r,
                                                   const std::optional<Tensor>& size,
                                                   const std::optional<Tensor>& protect, const std::string& order) {
  MergeApplyParams apply = {};
  set_values(kOp, "tokens", apply, tokens);
  check_same_device(kOp, "metric", metric, "tokens", tokens);
  BipartiteMatchParams match = {};
  set_metric(kOp, match, metric, protect);
  VTK_CHECK(kOp, match.batch == apply.batch && match.num_tokens == apply.num_tokens,
            "expected metric of shape [B, N, C] with [B, N] = [", apply.batch, ", ", apply.num_tokens, "], got ",
            shape_text(metric));
  match.order = parse_merge_order(order);
  set_merges(kOp, match, r);
  set_weight(kOp, "size", apply, size, "tokens", tokens);
  clamp_to_protect(match);

  Tensor owner = empty({match.batch, match.num_tokens}, ScalarType::Long, tokens);
  match.owner = static_cast<int64_t*>(owner.mutable_data_ptr());
  run_match(kOp, match, tokens);
  apply.owner = match.owner;
  apply.owner_stride_batch = match.num_tokens;
  apply.owner_stride_token = 1;
  apply.out_len = match.num_tokens - match.merges;
  apply.reduce = MergeReduce::kWeightedMean;
  auto [merged, merged_size] = run_apply(kOp, apply, tokens);
  return {merged, merged_size, owner};
}

#if defined(VTK_DEFINES_SCHEMAS)
VTK_FRAGMENT(m) {
  // Token merging in one call: match by the metric, merge the tokens as size-weighted means.
  m.def(
      "bipartite_merge(Tensor tokens, Tensor metric, SymInt r, *, Tensor? size=None, Tensor? protect=None, str "
      "order=\"position\") -> (Tensor merged, Tensor size, Tensor owner)");
}
#endif

VTK_IMPL(m) { m.impl("bipartite_merge", TORCH_BOX(&bipartite_merge)); }

}  // namespace
}  // namespace vtk
