// block_sparse_attention_backward: schema, checks, allocation, launch.
#include "attention/block_sparse_attention_backward.h"

#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "attention/block_sparse_arguments.h"
#include "common/backend.h"
#include "common/empty.h"

namespace vtk {
namespace {

constexpr const char* kOp = "block_sparse_attention_backward";

void check_contiguous(const char* name, const Tensor& x) {
  VTK_CHECK(kOp, x.is_contiguous(), "expected ", name, " to be contiguous; call ", name, ".contiguous() first");
}

// What the forward pass returned, and the gradients of it.
void set_results(BlockSparseAttentionBackwardParams& p, const Tensor& grad_out, const Tensor& out, const Tensor& lse,
                 const OptTensor& grad_lse, const Tensor& query) {
  const std::vector<int64_t> rows = {p.forward.batch, p.forward.num_heads, p.forward.num_queries};
  auto check = [&](const char* name, const Tensor& x, ScalarType type, bool has_channels) {
    check_same_device(kOp, name, x, "query", query);
    check_dtype(kOp, name, x, type);
    std::vector<int64_t> shape = rows;
    if (has_channels) shape.push_back(p.forward.head_dim);
    check_shape(kOp, name, x, has_channels ? "query.shape = [B, H, Q, D]" : "[B, H, Q]", shape);
  };
  check("grad_out", grad_out, query.scalar_type(), true);
  check_contiguous_last(kOp, "grad_out", grad_out);
  check("out", out, query.scalar_type(), true);
  check_contiguous("out", out);
  check("lse", lse, ScalarType::Float, false);
  check_contiguous("lse", lse);
  p.grad_out = heads_view(grad_out);
  // The kernels only read them.
  p.forward.out = const_cast<void*>(out.const_data_ptr());
  p.forward.lse = static_cast<float*>(const_cast<void*>(lse.const_data_ptr()));
  if (!grad_lse.has_value()) return;
  check("grad_lse", *grad_lse, ScalarType::Float, false);
  check_contiguous("grad_lse", *grad_lse);
  p.grad_lse = static_cast<const float*>(grad_lse->const_data_ptr());
}

// -> (grad_query [B, H, Q, D], grad_key [B, Hk, N, D], grad_value [B, Hk, N, D])
std::tuple<Tensor, Tensor, Tensor> block_sparse_attention_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& lse, const Tensor& block_counts, const Tensor& block_indices, int64_t block_q, int64_t block_k,
    bool causal, std::optional<double> scale, const OptTensor& full_counts, const OptTensor& full_indices,
    const OptTensor& column_counts, const OptTensor& column_indices, const OptTensor& key_bias,
    const OptTensor& seqlens_k, bool token_offsets, const OptTensor& grad_lse) {
  BlockSparseAttentionBackwardParams p = {};
  set_query(kOp, p.forward, query);
  set_key_value(kOp, p.forward, key, value, query);
  set_options(kOp, p.forward, block_q, block_k, causal, scale);
  set_lists(kOp, p.forward, block_counts, block_indices, full_counts, full_indices, column_counts, column_indices,
            token_offsets, query);
  set_key_bias(kOp, p.forward, key_bias, query);
  set_seqlens(kOp, p.forward, seqlens_k, query);
  set_results(p, grad_out, out, lse, grad_lse, query);

  const BlockSparseAttentionParams& f = p.forward;
  auto empty_gradient = [&](int64_t heads, int64_t rows) {
    return empty({f.batch, heads, rows, f.head_dim}, query.scalar_type(), query);
  };
  Tensor grad_query = empty_gradient(f.num_heads, f.num_queries), grad_key = empty_gradient(f.key_heads, f.num_keys),
         grad_value = empty_gradient(f.key_heads, f.num_keys);
  if (int64_t{f.batch} * f.num_heads * f.num_queries * f.num_keys == 0) {  // no pair
    for (Tensor* gradient : {&grad_query, &grad_key, &grad_value}) torch::stable::zero_(*gradient);
    return {grad_query, grad_key, grad_value};
  }
  p.grad_query = grad_query.mutable_data_ptr();
  p.grad_key = grad_key.mutable_data_ptr();
  p.grad_value = grad_value.mutable_data_ptr();
  Tensor delta = empty({f.batch, f.num_heads, f.num_queries}, ScalarType::Float, query);
  p.delta = static_cast<float*>(delta.mutable_data_ptr());
#if defined(VTK_BACKEND_CUDA)
  Tensor workspace = empty({block_sparse_attention_backward_workspace(p)}, ScalarType::Byte, query);
  p.workspace = workspace.mutable_data_ptr();
#endif
  VTK_LAUNCH(kOp, block_sparse_attention_backward, p, query);
  return {grad_query, grad_key, grad_value};
}

#if defined(VTK_DEFINES_SCHEMAS)
VTK_FRAGMENT(m) {
  // The gradients of block_sparse_attention for query, key and value; out and lse are what it returned.
  m.def(
      "block_sparse_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
      "Tensor lse, Tensor block_counts, Tensor block_indices, *, "
      "int block_q=128, int block_k=128, bool causal=False, float? scale=None, Tensor? full_counts=None, "
      "Tensor? full_indices=None, Tensor? column_counts=None, Tensor? column_indices=None, Tensor? key_bias=None, "
      "Tensor? seqlens_k=None, bool token_offsets=False, Tensor? grad_lse=None) "
      "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
}
#endif

VTK_IMPL(m) { m.impl("block_sparse_attention_backward", TORCH_BOX(&block_sparse_attention_backward)); }

}  // namespace
}  // namespace vtk
