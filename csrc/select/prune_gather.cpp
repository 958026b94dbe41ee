// prune_gather and its overloads: schemas, checks, allocation, launch.
#include "select/prune_gather.h"

#include <algorithm>
#include <array>
#include <tuple>

#include "common/backend.h"
#include "common/check.h"
#include "common/empty.h"

namespace vtk {
namespace {

using OptTensor = std::optional<Tensor>;
constexpr const char* kOp = "prune_gather";

// The shape of the selection, from scores [B, N] or [B, H, N]; packed scores are [T] or [H, T].
void set_scores(PruneGatherParams& p, const Tensor& scores, bool packed, const std::string& head_reduce) {
  const char* names = packed ? "[T] or [H, T]" : "[B, N] or [B, H, N]";
  const int64_t flat = packed ? 1 : 2;
  VTK_CHECK(kOp, scores.dim() == flat || scores.dim() == flat + 1, "expected scores of shape ", names, ", got ",
            shape_text(scores));
  const bool heads = scores.dim() == flat + 1;
  const int64_t token_dim = scores.dim() - 1;
  p.scores = scores.const_data_ptr();
  p.scores_dtype = float_dtype(kOp, "scores", scores);
  p.scores_stride_token = scores.stride(token_dim);
  p.scores_stride_head = heads ? scores.stride(token_dim - 1) : 0;
  p.scores_stride_batch = packed ? 0 : scores.stride(0);
  p.num_heads = heads ? check_count(kOp, "scores head count", scores.size(token_dim - 1)) : 1;
  VTK_CHECK(kOp, p.num_heads > 0, "expected scores with at least one head, got ", shape_text(scores));
  p.head_reduce = heads ? parse_reduce(kOp, "head_reduce", head_reduce, false) : Reduce::kSum;
  if (!heads) parse_reduce(kOp, "head_reduce", head_reduce, false);
  p.num_segments = packed ? 0 : check_count(kOp, "batch size", scores.size(0));
  p.num_tokens = check_count(kOp, "token count", scores.size(token_dim));
}

void set_masks(PruneGatherParams& p, const Tensor& scores, bool packed, const OptTensor& keep_mask,
               const OptTensor& drop_mask) {
  std::vector<int64_t> shape = {p.num_segments, p.num_tokens};
  const char* names = "[B, N]";
  if (packed) shape = {p.num_tokens}, names = "[T]";
  p.keep_mask = mask_view(kOp, "keep_mask", keep_mask, names, shape, "scores", scores);
  p.drop_mask = mask_view(kOp, "drop_mask", drop_mask, names, shape, "scores", scores);
}

void check_keep(int64_t keep, int64_t tokens) {
  VTK_CHECK(kOp, keep >= 0 && keep <= tokens, "expected 0 <= keep <= N = ", tokens, ", got keep = ", keep);
}

// Fills rows for `tensor`, whose dimension `token_dim` counts tokens and the one before it the batch (1 or B), and
// returns the output. Everything after token_dim is one row and must be dense.
Tensor add_rows(PruneGatherParams& p, const char* name, const Tensor& tensor, int64_t token_dim) {
  const int64_t dims = tensor.dim();
  VTK_CHECK(kOp, token_dim >= 1 && token_dim < dims, "expected a token dimension between 1 and ", dims - 1, " for ",
            name, " of shape ", shape_text(tensor), ", got ", token_dim);
  const int64_t batch = tensor.size(token_dim - 1);
  VTK_CHECK(kOp, tensor.size(token_dim) == p.num_tokens && (batch == p.num_segments || batch == 1), "expected ", name,
            " with batch dimension ", p.num_segments, " (or 1) and ", p.num_tokens, " tokens in dimensions ",
            token_dim - 1, " and ", token_dim, ", got ", shape_text(tensor));

  const int64_t element = static_cast<int64_t>(tensor.element_size());
  GatherRows rows = {};
  rows.row_bytes = element;
  for (int64_t d = dims - 1; d > token_dim; --d) {
    VTK_CHECK(kOp, tensor.size(d) <= 1 || tensor.stride(d) * element == rows.row_bytes, "expected ", name,
              " with a contiguous last dimension (dense rows after dimension ", token_dim, "), got strides ",
              shape_text({tensor.strides().begin(), tensor.strides().end()}), "; call .contiguous() first");
    rows.row_bytes *= tensor.size(d);
  }
  rows.outer = 1;
  for (int64_t d = token_dim - 2; d >= 0; --d) {
    VTK_CHECK(kOp, d == token_dim - 2 || tensor.stride(d) == tensor.stride(d + 1) * tensor.size(d + 1),
              "expected dimensions before the batch dimension of ", name, " to be dense, got shape ",
              shape_text(tensor));
    rows.outer *= tensor.size(d);
  }
  rows.stride_outer = token_dim >= 2 ? tensor.stride(token_dim - 2) * element : 0;
  rows.stride_batch = batch == 1 && p.num_segments != 1 ? 0 : tensor.stride(token_dim - 1) * element;
  rows.stride_token = tensor.stride(token_dim) * element;
  rows.in = static_cast<const char*>(tensor.const_data_ptr());

  std::vector<int64_t> shape(tensor.sizes().begin(), tensor.sizes().end());
  shape[token_dim - 1] = p.num_segments;
  shape[token_dim] = p.keep;
  Tensor out = empty(shape, tensor.scalar_type(), tensor);
  rows.out = static_cast<char*>(out.mutable_data_ptr());
  p.rows[p.num_rows++] = rows;
  return out;
}

void check_tokens(const Tensor& tokens, const Tensor& like, const char* like_name, int64_t dim, const char* names) {
  check_same_device(kOp, like_name, like, "tokens", tokens);
  check_dim(kOp, "tokens", tokens, dim, names);
  float_dtype(kOp, "tokens", tokens);
  check_contiguous_last(kOp, "tokens", tokens);
}

#if defined(VTK_BACKEND_CUDA)
void run(const PruneGatherParams& p, const Tensor& like, const char*) {
  if (p.total_keep > 0 || p.cu_seqlens != nullptr) VTK_LAUNCH(kOp, prune_gather, p, like);
}
#else
void check_conflict(const PruneGatherConflict& c, const char* row_name) {
  using Kind = PruneGatherConflict::Kind;
  VTK_CHECK(kOp, c.kind != Kind::kKeptAndDropped, "token ", c.count, " of ", row_name, " ", c.segment,
            " is set in both keep_mask and drop_mask");
  VTK_CHECK(kOp, c.kind != Kind::kTooManyForced, "keep_mask forces ", c.count, " tokens of ", row_name, " ", c.segment,
            " but keep = ", c.keep);
  VTK_CHECK(kOp, c.kind != Kind::kTooFewAllowed, "drop_mask leaves ", c.count, " tokens of ", row_name, " ", c.segment,
            " but keep = ", c.keep);
}

void run(const PruneGatherParams& p, const Tensor&, const char* row_name) {
  check_conflict(VTK_LAUNCH(kOp, prune_gather, p, like), row_name);
}
#endif

// prune_gather(tokens [B, N, D], scores [B, N] or [B, H, N], keep) -> (kept [B, keep, D], indices [B, keep])
std::tuple<Tensor, Tensor> prune_gather(const Tensor& tokens, const Tensor& scores, int64_t keep,
                                        const OptTensor& keep_mask, const OptTensor& drop_mask,
                                        const std::string& head_reduce, const std::string& order) {
  check_tokens(tokens, scores, "scores", 3, "[B, N, D]");
  PruneGatherParams p = {};
  set_scores(p, scores, false, head_reduce);
  VTK_CHECK(kOp, scores.size(0) == tokens.size(0) && p.num_tokens == tokens.size(1),
            "expected scores.shape = [B, N] = [", tokens.size(0), ", ", tokens.size(1), "] or [B, H, N], got ",
            shape_text(scores));
  check_keep(keep, p.num_tokens);
  set_masks(p, scores, false, keep_mask, drop_mask);
  p.keep = static_cast<int32_t>(keep);
  p.order = parse_order(kOp, order, "score");
  p.total_keep = int64_t{p.num_segments} * keep;
  Tensor kept = add_rows(p, "tokens", tokens, 1);
  Tensor indices = empty({p.num_segments, keep}, ScalarType::Long, tokens);
  p.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  run(p, tokens, "batch row");
  return {kept, indices};
}

// prune_gather.tensors: one selection applied to several tensors of any dtype, in one launch.
std::tuple<std::vector<Tensor>, Tensor> prune_gather_tensors(const std::vector<Tensor>& tensors, const Tensor& scores,
                                                             int64_t keep,
                                                             const std::optional<std::vector<int64_t>>& token_dims,
                                                             const OptTensor& keep_mask, const OptTensor& drop_mask,
                                                             const std::string& head_reduce, const std::string& order) {
  VTK_CHECK(kOp, !tensors.empty() && tensors.size() <= kMaxGatherTensors, "expected 1 to ", kMaxGatherTensors,
            " tensors, got ", tensors.size());
  VTK_CHECK(kOp, !token_dims.has_value() || token_dims->size() == tensors.size(),
            "expected one token_dims entry for each of the ", tensors.size(), " tensors, got ",
            token_dims.has_value() ? token_dims->size() : 0);
  PruneGatherParams p = {};
  set_scores(p, scores, false, head_reduce);
  check_keep(keep, p.num_tokens);
  set_masks(p, scores, false, keep_mask, drop_mask);
  p.keep = static_cast<int32_t>(keep);
  p.order = parse_order(kOp, order, "score");
  p.total_keep = int64_t{p.num_segments} * keep;
  std::vector<Tensor> kept;
  for (size_t t = 0; t < tensors.size(); ++t) {
    std::string name = "tensors[" + std::to_string(t) + "]";
    check_same_device(kOp, name.c_str(), tensors[t], "scores", scores);
    kept.push_back(add_rows(p, name.c_str(), tensors[t], token_dims.has_value() ? (*token_dims)[t] : 1));
  }
  Tensor indices = empty({p.num_segments, keep}, ScalarType::Long, scores);
  p.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  run(p, scores, "batch row");
  return {kept, indices};
}

#if !defined(VTK_BACKEND_CUDA)
// On the CPU the segments are read here, once, before anything is allocated or indexed by them.
int64_t sum_of_keeps(const Tensor& cu_seqlens, const Tensor& keep, int64_t tokens) {
  const int32_t* bounds = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const int32_t* keeps = static_cast<const int32_t*>(keep.const_data_ptr());
  const int64_t segments = keep.size(0);
  VTK_CHECK(kOp, bounds[0] == 0 && bounds[segments] == tokens, "expected cu_seqlens to run from 0 to T = ", tokens,
            ", got ", bounds[0], " to ", bounds[segments]);
  int64_t total = 0;
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t length = int64_t{bounds[s + 1]} - bounds[s];
    VTK_CHECK(kOp, length >= 0, "expected ascending cu_seqlens, got ", bounds[s], " then ", bounds[s + 1]);
    VTK_CHECK(kOp, keeps[s] >= 0 && keeps[s] <= length, "expected 0 <= keep[", s, "] <= the segment's ", length,
              " tokens, got ", keeps[s]);
    total += keeps[s];
  }
  return total;
}
#else
// On CUDA the sum is the one documented synchronisation of the package; total_keep avoids it.
int64_t sum_of_keeps(const Tensor& cu_seqlens, const Tensor& keep, int64_t tokens) {
  std::vector<int32_t> bounds(cu_seqlens.size(0)), keeps(keep.size(0));
  DeviceGuard guard(keep.get_device_index());
  cudaStream_t stream = current_stream(keep.get_device_index());
  cudaError_t error = cudaMemcpyAsync(bounds.data(), cu_seqlens.const_data_ptr(), bounds.size() * sizeof(int32_t),
                                      cudaMemcpyDeviceToHost, stream);
  if (error == cudaSuccess)
    error = cudaMemcpyAsync(keeps.data(), keep.const_data_ptr(), keeps.size() * sizeof(int32_t), cudaMemcpyDeviceToHost,
                            stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  VTK_CHECK(kOp, error == cudaSuccess, "reading keep failed: ", cudaGetErrorString(error),
            "; pass total_keep to avoid the read (needed under CUDA-graph capture)");
  // Clamped as the kernel clamps.
  int64_t total = 0;
  for (size_t s = 0; s < keeps.size(); ++s) {
    auto bound = [&](size_t i) { return std::min<int64_t>(std::max(bounds[i], 0), tokens); };
    total += std::min<int64_t>(std::max(keeps[s], 0), std::max<int64_t>(bound(s + 1) - bound(s), 0));
  }
  return total;
}
#endif

// prune_gather.varlen(tokens [T, D], scores [T] or [H, T], cu_seqlens int32 [S + 1], keep int32 [S])
//   -> (kept [sum(keep), D], indices [sum(keep)], cu_kept int32 [S + 1])
std::tuple<Tensor, Tensor, Tensor> prune_gather_varlen(const Tensor& tokens, const Tensor& scores,
                                                       const Tensor& cu_seqlens, const Tensor& keep,
                                                       const OptTensor& keep_mask, const OptTensor& drop_mask,
                                                       const std::string& head_reduce, const std::string& order,
                                                       std::optional<int64_t> total_keep) {
  check_tokens(tokens, scores, "scores", 2, "[T, D]");
  PruneGatherParams p = {};
  set_scores(p, scores, true, head_reduce);
  VTK_CHECK(kOp, p.num_tokens == tokens.size(0), "expected scores.shape = [T] = [", tokens.size(0), "] or [H, T], got ",
            shape_text(scores));
  set_masks(p, scores, true, keep_mask, drop_mask);
  p.order = parse_order(kOp, order, "score");

  check_dtype(kOp, "keep", keep, ScalarType::Int);
  check_dtype(kOp, "cu_seqlens", cu_seqlens, ScalarType::Int);
  check_dim(kOp, "keep", keep, 1, "[segments]");
  check_contiguous_last(kOp, "keep", keep);
  check_contiguous_last(kOp, "cu_seqlens", cu_seqlens);
  check_same_device(kOp, "keep", keep, "tokens", tokens);
  check_same_device(kOp, "cu_seqlens", cu_seqlens, "tokens", tokens);
  check_shape(kOp, "cu_seqlens", cu_seqlens, "[segments + 1]", {keep.size(0) + 1});
  p.num_segments = check_count(kOp, "segment count", keep.size(0));
  VTK_CHECK(kOp, !total_keep.has_value() || (*total_keep >= 0 && *total_keep <= p.num_tokens),
            "expected 0 <= total_keep <= T = ", p.num_tokens, ", got ", total_keep.value_or(0));
#if defined(VTK_BACKEND_CUDA)
  p.total_keep = total_keep.has_value() ? *total_keep : sum_of_keeps(cu_seqlens, keep, p.num_tokens);
#else
  p.total_keep = sum_of_keeps(cu_seqlens, keep, p.num_tokens);
  VTK_CHECK(kOp, total_keep.value_or(p.total_keep) == p.total_keep, "expected total_keep = sum(keep) = ", p.total_keep,
            ", got ", total_keep.value_or(0));
#endif
  p.cu_seqlens = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  p.keeps = static_cast<const int32_t*>(keep.const_data_ptr());

  Tensor kept = empty({p.total_keep, tokens.size(1)}, tokens.scalar_type(), tokens);
  Tensor indices = empty({p.total_keep}, ScalarType::Long, tokens);
  Tensor cu_kept = empty({int64_t{p.num_segments} + 1}, ScalarType::Int, tokens);
  p.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  p.cu_kept = static_cast<int32_t*>(cu_kept.mutable_data_ptr());
  const int64_t element = static_cast<int64_t>(tokens.element_size());
  GatherRows& rows = p.rows[p.num_rows++];
  rows.in = static_cast<const char*>(tokens.const_data_ptr());
  rows.out = static_cast<char*>(kept.mutable_data_ptr());
  rows.row_bytes = tokens.size(1) * element;
  rows.stride_token = tokens.stride(0) * element;
  rows.outer = 1;
  run(p, tokens, "segment");
  return {kept, indices, cu_kept};
}

// The score family is reached through the dispatcher: families do not include each other.
Tensor attention_scores(const Tensor& query, const Tensor& key, std::optional<double> scale, const OptTensor& lse,
                        const std::string& head_reduce, const std::string& query_reduce) {
  using torch::stable::detail::from;
  std::array<StableIValue, 9> stack = {from(query), from(key),         from(scale),
                                       from(lse),   from(head_reduce), from(query_reduce),
                                       from(false), from(OptTensor{}), from(OptTensor{})};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(VTK_OP_NAME("attention_scores"), "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// prune_gather.attention: the scores come from query [B, H, Q, D] and key [B, Hk, N, D].
std::tuple<Tensor, Tensor, Tensor> prune_gather_attention(const Tensor& tokens, const Tensor& query, const Tensor& key,
                                                          int64_t keep, std::optional<double> scale,
                                                          const OptTensor& lse, const std::string& head_reduce,
                                                          const std::string& query_reduce, const OptTensor& keep_mask,
                                                          const OptTensor& drop_mask, const std::string& order) {
  check_tokens(tokens, query, "query", 3, "[B, N, D]");
  parse_reduce(kOp, "head_reduce", head_reduce, false);
  VTK_CHECK(kOp, key.dim() == 4 && key.size(2) == tokens.size(1),
            "expected key of shape [B, Hk, N, D] with N = ", tokens.size(1), " as in tokens, got ", shape_text(key));
  Tensor scores = attention_scores(query, key, scale, lse, head_reduce, query_reduce);
  auto [kept, indices] = prune_gather(tokens, scores, keep, keep_mask, drop_mask, "mean", order);
  return {kept, indices, scores};
}

#if defined(VTK_DEFINES_SCHEMAS)
VTK_FRAGMENT(m) {
  // Keep the `keep` highest scores of each batch row; ties: lower index; NaN below -inf.
  m.def(
      "prune_gather(Tensor tokens, Tensor scores, SymInt keep, *, Tensor? keep_mask=None, Tensor? drop_mask=None, "
      "str head_reduce=\"mean\", str order=\"position\") -> (Tensor kept, Tensor indices)");
  // The same, scored by attention_scores(query, key).
  m.def(
      "prune_gather.attention(Tensor tokens, Tensor query, Tensor key, SymInt keep, *, float? scale=None, "
      "Tensor? lse=None, str head_reduce=\"mean\", str query_reduce=\"mean\", Tensor? keep_mask=None, "
      "Tensor? drop_mask=None, str order=\"position\") -> (Tensor kept, Tensor indices, Tensor scores)");
  // Packed sequences, each with its own budget. total_keep = sum(keep), when the caller knows it.
  m.def(
      "prune_gather.varlen(Tensor tokens, Tensor scores, Tensor cu_seqlens, Tensor keep, *, Tensor? keep_mask=None, "
      "Tensor? drop_mask=None, str head_reduce=\"mean\", str order=\"position\", SymInt? total_keep=None) "
      "-> (Tensor kept, Tensor indices, Tensor cu_kept)");
  // One selection over several tensors of any dtype; token_dims names each tensor's token dimension (default 1).
  m.def(
      "prune_gather.tensors(Tensor[] tensors, Tensor scores, SymInt keep, *, int[]? token_dims=None, "
      "Tensor? keep_mask=None, Tensor? drop_mask=None, str head_reduce=\"mean\", str order=\"position\") "
      "-> (Tensor[] kept, Tensor indices)");
}
#endif

VTK_IMPL(m) {
  m.impl("prune_gather", TORCH_BOX(&prune_gather));
  m.impl("prune_gather.attention", TORCH_BOX(&prune_gather_attention));
  m.impl("prune_gather.varlen", TORCH_BOX(&prune_gather_varlen));
  m.impl("prune_gather.tensors", TORCH_BOX(&prune_gather_tensors));
}

}  // namespace
}  // namespace vtk
