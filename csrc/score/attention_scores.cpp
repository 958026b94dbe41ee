// attention_scores: schema, checks, allocation, launch.
#include "score/attention_scores.h"

#include <cmath>

#include "common/backend.h"
#include "common/check.h"
#include "common/empty.h"

namespace vtk {
namespace {

using OptTensor = std::optional<Tensor>;
constexpr const char* kOp = "attention_scores";

void set_query(AttentionScoresParams& p, const Tensor& query) {
  check_dim(kOp, "query", query, 4, "[B, H, Q, D]");
  p.dtype = float_dtype(kOp, "query", query);
  check_contiguous_last(kOp, "query", query);
  p.batch = check_count(kOp, "batch size", query.size(0));
  p.num_heads = check_count(kOp, "query head count", query.size(1));
  p.num_queries = check_count(kOp, "query row count", query.size(2));
  p.head_dim = check_count(kOp, "head dimension", query.size(3));
  VTK_CHECK(kOp, p.num_heads > 0 && p.num_queries > 0 && p.head_dim > 0,
            "expected query of shape [B, H, Q, D] with H, Q and D at least 1, got ", shape_text(query));
  p.query = query.const_data_ptr();
  p.query_stride_batch = query.stride(0);
  p.query_stride_head = query.stride(1);
  p.query_stride_row = query.stride(2);
}

void set_key(AttentionScoresParams& p, const Tensor& key, const Tensor& query) {
  check_dim(kOp, "key", key, 4, "[B, Hk, N, D]");
  check_same_device(kOp, "key", key, "query", query);
  check_dtype(kOp, "key", key, query.scalar_type());
  check_contiguous_last(kOp, "key", key);
  VTK_CHECK(kOp, key.size(0) == query.size(0) && key.size(3) == query.size(3),
            "expected key of shape [B, Hk, N, D] with B = ", query.size(0), " and D = ", query.size(3),
            " as in query, got ", shape_text(key));
  VTK_CHECK(kOp, key.size(1) > 0 && query.size(1) % key.size(1) == 0,
            "expected key with a head count that divides the ", query.size(1), " heads of query, got ",
            shape_text(key));
  p.key_heads = static_cast<int32_t>(key.size(1));
  p.num_keys = check_count(kOp, "key count", key.size(2));
  p.key = key.const_data_ptr();
  p.key_stride_batch = key.stride(0);
  p.key_stride_head = key.stride(1);
  p.key_stride_row = key.stride(2);
}

void set_lse(AttentionScoresParams& p, const OptTensor& lse, const Tensor& query) {
  if (!lse.has_value()) return;
  check_same_device(kOp, "lse", *lse, "query", query);
  check_dtype(kOp, "lse", *lse, ScalarType::Float);
  check_shape(kOp, "lse", *lse, "[B, H, Q]", {p.batch, p.num_heads, p.num_queries});
  p.lse = static_cast<const float*>(lse->const_data_ptr());
  p.lse_stride_batch = lse->stride(0);
  p.lse_stride_head = lse->stride(1);
  p.lse_stride_row = lse->stride(2);
}

// attention_scores(query [B, H, Q, D], key [B, Hk, N, D]) -> [B, N], or [B, H, N] with head_reduce="none"
Tensor attention_scores(const Tensor& query, const Tensor& key, std::optional<double> scale, const OptTensor& lse,
                        const std::string& head_reduce, const std::string& query_reduce, bool causal,
                        const OptTensor& key_mask, const OptTensor& query_mask) {
  AttentionScoresParams p = {};
  set_query(p, query);
  set_key(p, key, query);
  set_lse(p, lse, query);
  p.key_mask = mask_view(kOp, "key_mask", key_mask, "[B, N]", {p.batch, p.num_keys}, "query", query);
  p.query_mask = mask_view(kOp, "query_mask", query_mask, "[B, Q]", {p.batch, p.num_queries}, "query", query);
  p.head_reduce = parse_reduce(kOp, "head_reduce", head_reduce, true);
  p.query_reduce = parse_reduce(kOp, "query_reduce", query_reduce, false);
  p.scale = static_cast<float>(scale.has_value() ? *scale : 1.0 / std::sqrt(static_cast<double>(p.head_dim)));
  p.causal = causal;

  std::vector<int64_t> shape = {p.batch, p.num_keys};
  if (p.head_reduce == Reduce::kNone) shape = {p.batch, p.num_heads, p.num_keys};
  Tensor out = empty(shape, ScalarType::Float, query);
  if (p.batch == 0 || p.num_keys == 0) return out;
  p.out = static_cast<float*>(out.mutable_data_ptr());
#if defined(VTK_BACKEND_CUDA)
  VTK_CHECK(kOp, p.head_dim <= 4096, "expected query with D of at most 4096 on CUDA, got ", p.head_dim);
  Tensor workspace = empty({attention_scores_workspace(p)}, ScalarType::Float, query);
  p.workspace = static_cast<float*>(workspace.mutable_data_ptr());
#endif
  VTK_LAUNCH(kOp, attention_scores, p, query);
  return out;
}

#if defined(VTK_DEFINES_SCHEMAS)
VTK_FRAGMENT(m) {
  // Reduce softmax(scale q k^T), or exp(scale q k^T - lse), over query rows, then over heads.
  m.def(
      "attention_scores(Tensor query, Tensor key, *, float? scale=None, Tensor? lse=None, str head_reduce=\"mean\", "
      "str query_reduce=\"mean\", bool causal=False, Tensor? key_mask=None, Tensor? query_mask=None) -> Tensor");
}
#endif

VTK_IMPL(m) { m.impl("attention_scores", TORCH_BOX(&attention_scores)); }

}  // namespace
}  // namespace vtk
