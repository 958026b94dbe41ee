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
  set_metric(kOp, match, metric, false, protect);
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

// The rows that a packed match leaves. On CUDA the read is a synchronisation, which out_len avoids.
int64_t rows_left(const BipartiteMatchParams& p, [[maybe_unused]] const Tensor& like) {
#if defined(VTK_BACKEND_CUDA)
  int32_t rows = 0;
  DeviceGuard guard(like.get_device_index());
  cudaStream_t stream = current_stream(like.get_device_index());
  cudaError_t error = cudaMemcpyAsync(&rows, p.cu_merged + p.batch, sizeof rows, cudaMemcpyDeviceToHost, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  VTK_CHECK(kOp, error == cudaSuccess, "reading the number of rows failed: ", cudaGetErrorString(error),
            "; pass out_len to avoid the read (needed under CUDA-graph capture)");
  return rows;
#else
  return p.cu_merged[p.batch];
#endif
}

// bipartite_merge.varlen(tokens [T, D], metric [T, C], cu_seqlens int32 [S + 1], r int32 [S], size [T])
//   -> (merged [M, D], size float32 [M], owner int64 [T], cu_merged int32 [S + 1])
std::tuple<Tensor, Tensor, Tensor, Tensor> bipartite_merge_varlen(
    const Tensor& tokens, const Tensor& metric, const Tensor& cu_seqlens, const Tensor& r,
    const std::optional<Tensor>& size, const std::optional<Tensor>& protect, std::optional<double> threshold,
    const std::string& split, const std::string& order, std::optional<int64_t> out_len) {
  MergeApplyParams apply = {};
  set_values(kOp, "tokens", apply, tokens, true);
  check_same_device(kOp, "metric", metric, "tokens", tokens);
  BipartiteMatchParams match = {};
  set_metric(kOp, match, metric, true, protect);
  VTK_CHECK(kOp, match.num_tokens == apply.num_tokens, "expected metric of shape [T, C] with T = ", apply.num_tokens,
            ", got ", shape_text(metric));
  set_split(kOp, match, split, threshold);
  match.order = parse_merge_order(order);
  VTK_CHECK(kOp, match.split == MatchSplit::kEvenOdd || match.order == MergeOrder::kPosition,
            "expected order = \"position\" with split=\"causal\", got \"", order, "\"");
  set_weight(kOp, "size", apply, size, "tokens", tokens, true);
  VTK_CHECK(kOp, out_len.value_or(0) >= 0, "expected out_len >= 0, got ", out_len.value_or(0));
  Tensor cu_merged = set_segments(kOp, match, cu_seqlens, r, metric);

  Tensor owner = empty({match.num_tokens}, ScalarType::Long, tokens);
  match.owner = static_cast<int64_t*>(owner.mutable_data_ptr());
  run_match(kOp, match, tokens);
  apply.owner = match.owner;
  apply.owner_stride_token = 1;
  apply.out_len = check_count(kOp, "out_len", out_len.has_value() ? *out_len : rows_left(match, tokens));
#if !defined(VTK_BACKEND_CUDA)
  VTK_CHECK(kOp, apply.out_len >= match.cu_merged[match.batch], "expected out_len >= the rows that are left, ",
            match.cu_merged[match.batch], ", got ", apply.out_len);
#endif
  apply.reduce = MergeReduce::kWeightedMean;
  auto [merged, merged_size] = run_apply(kOp, apply, tokens, true);
  return {merged, merged_size, owner, cu_merged};
}

#if defined(VTK_DEFINES_SCHEMAS)
VTK_FRAGMENT(m) {
  // Token merging in one call: match by the metric, merge the tokens as size-weighted means.
  m.def(
      "bipartite_merge(Tensor tokens, Tensor metric, SymInt r, *, Tensor? size=None, Tensor? protect=None, str "
      "order=\"position\") -> (Tensor merged, Tensor size, Tensor owner)");
  // The same for every packed segment, each with its own r. out_len: rows of the output, when the caller knows it.
  m.def(
      "bipartite_merge.varlen(Tensor tokens, Tensor metric, Tensor cu_seqlens, Tensor r, *, Tensor? size=None, Tensor? "
      "protect=None, float? threshold=None, str split=\"even_odd\", str order=\"position\", SymInt? out_len=None) -> "
      "(Tensor merged, Tensor size, Tensor owner, Tensor cu_merged)");
}
#endif

VTK_IMPL(m) {
  m.impl("bipartite_merge", TORCH_BOX(&bipartite_merge));
  m.impl("bipartite_merge.varlen", TORCH_BOX(&bipartite_merge_varlen));
}

}  // namespace
}  // namespace vtk
