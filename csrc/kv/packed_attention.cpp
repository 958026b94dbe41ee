// packed_attention: schema, checks, allocation, launch.
#include "kv/packed_attention.h"

#include <cmath>
#include <tuple>

#include "common/backend.h"
#include "common/empty.h"
#include "kv/kv_arguments.h"

namespace vtk {
namespace {

constexpr const char* kOp = "packed_attention";

KvView<const char> byte_view(const Tensor& x) {
  const int64_t element = static_cast<int64_t>(x.element_size());
  return {static_cast<const char*>(x.const_data_ptr()), x.stride(0) * element, x.stride(1) * element,
          x.stride(2) * element};
}

void set_query(PackedAttentionParams& p, const Tensor& query, const std::optional<double>& scale) {
  check_dim(kOp, "query", query, 4, "[B, H, Q, D]");
  p.dtype = float_dtype(kOp, "query", query);
  check_contiguous_last(kOp, "query", query);
  p.batch = check_count(kOp, "batch size", query.size(0));
  p.heads = check_count(kOp, "query head count", query.size(1));
  p.num_queries = check_count(kOp, "query row count", query.size(2));
  p.query = byte_view(query);
  const double factor = scale.value_or(1.0 / std::sqrt(static_cast<double>(query.size(3))));
  VTK_CHECK(kOp, std::isfinite(factor), "expected a finite scale, got ", factor);
  p.scale = static_cast<float>(factor);
}

void set_residual(PackedAttentionParams& p, const OptTensor& k, const OptTensor& v, const Tensor& query) {
  VTK_CHECK(kOp, k.has_value() == v.has_value(), "expected k_residual and v_residual together, got one of them");
  if (!k.has_value()) return;
  for (const auto& [name, x] : {std::pair{"k_residual", *k}, std::pair{"v_residual", *v}}) {
    check_dim(kOp, name, x, 4, "[B, Hk, R, D]");
    check_same_device(kOp, name, x, "query", query);
    check_dtype(kOp, name, x, query.scalar_type());
    check_shape(kOp, name, x, "[B, Hk, R, D]", {p.batch, p.key_heads, k->size(2), p.head_dim});
    check_contiguous_last(kOp, name, x);
  }
  p.residual = check_count(kOp, "residual token count", k->size(2));
  p.side[0].residual = byte_view(*k);
  p.side[1].residual = byte_view(*v);
}

// packed_attention(query [B, H, Q, D], packed pages, ...) -> out [B, H, Q, D], lse float32 [B, H, Q]
std::tuple<Tensor, Tensor> packed_attention(const Tensor& query, const Tensor& k_codes, const Tensor& k_meta,
                                            const Tensor& v_codes, const Tensor& v_meta, std::string k_scheme,
                                            std::string v_scheme, int64_t group, std::string k_axis, std::string v_axis,
                                            OptTensor k_order, OptTensor k_residual, OptTensor v_residual, bool causal,
                                            std::optional<double> scale) {
  PackedAttentionParams p = {};
  set_query(p, query, scale);
  const KvFormat format = parse_format(kOp, k_scheme, v_scheme, group, k_axis, v_axis);
  check_head_dim(kOp, format, query.size(3));
  p.head_dim = static_cast<int32_t>(query.size(3));
  check_same_device(kOp, "k_codes", k_codes, "query", query);
  const PageCounts counts = page_counts(kOp, k_codes);
  VTK_CHECK(kOp, counts.batch == p.batch, "expected k_codes of shape [B, Hk, pages, bytes] with B = ", p.batch,
            " as in query, got ", shape_text(k_codes));
  VTK_CHECK(kOp, counts.heads > 0 ? p.heads % counts.heads == 0 : p.heads == 0,
            "expected k_codes with a head count that divides the ", p.heads, " heads of query, got ",
            shape_text(k_codes));
  p.key_heads = counts.heads;
  p.pages = counts.pages;
  for (int side = 0; side < 2; ++side) {
    PackedSource& s = p.side[side];
    s.page = page_of(format, side, p.head_dim, p.dtype);
    const PagesView pages =
        pages_view(kOp, side, side == 0 ? k_codes : v_codes, side == 0 ? k_meta : v_meta, counts, s.page, k_codes);
    s.codes = pages.codes;
    s.meta = pages.meta;
  }
  p.order = order_of(kOp, format, k_order, p.batch, p.key_heads, p.head_dim, "query", query);
  set_residual(p, k_residual, v_residual, query);
  p.causal = causal;
  VTK_CHECK(kOp, !causal || p.num_queries <= p.residual, "with causal expected k_residual to hold the keys of the ",
            p.num_queries, " queries, got ", p.residual, " tokens");

  Tensor out = empty({p.batch, p.heads, p.num_queries, p.head_dim}, query.scalar_type(), query);
  Tensor lse = empty({p.batch, p.heads, p.num_queries}, ScalarType::Float, query);
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (int64_t{p.batch} * p.heads * p.num_queries == 0) return {out, lse};
#if defined(VTK_BACKEND_CUDA)
  Tensor workspace = empty({packed_attention_workspace(p)}, ScalarType::Float, query);
  p.workspace = static_cast<float*>(workspace.mutable_data_ptr());
#endif
  VTK_LAUNCH(kOp, packed_attention, p, query);
  return {out, lse};
}

#if defined(VTK_DEFINES_SCHEMAS)
VTK_FRAGMENT(m) {
  // Attention over packed pages, read as they are, and over the tokens that are in no page.
  m.def(
      "packed_attention(Tensor query, Tensor k_codes, Tensor k_meta, Tensor v_codes, Tensor v_meta, *, str k_scheme, "
      "str v_scheme, int group=64, str k_axis=\"channel\", str v_axis=\"channel\", Tensor? k_order=None, "
      "Tensor? k_residual=None, Tensor? v_residual=None, bool causal=False, float? scale=None) "
      "-> (Tensor out, Tensor lse)");
}
#endif

VTK_IMPL(m) { m.impl("packed_attention", TORCH_BOX(&packed_attention)); }

}  // namespace
}  // namespace vtk
