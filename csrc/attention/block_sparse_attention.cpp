// block_sparse_attention: schema, checks, launch.
#include "attention/block_sparse_arguments.h"
#include "attention/block_sparse_launch.h"

namespace vtk {
namespace {

constexpr const char* kOp = "block_sparse_attention";

// block_sparse_attention(query [B, H, Q, D], key and value [B, Hk, N, D], lists) -> (out [B, H, Q, D], lse [B, H, Q])
std::tuple<Tensor, Tensor> block_sparse_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                                  const Tensor& block_counts, const Tensor& block_indices,
                                                  int64_t block_q, int64_t block_k, bool causal,
                                                  std::optional<double> scale, const OptTensor& full_counts,
                                                  const OptTensor& full_indices, const OptTensor& column_counts,
                                                  const OptTensor& column_indices, const OptTensor& key_bias,
                                                  const OptTensor& seqlens_k, bool token_offsets) {
  BlockSparseAttentionParams p = {};
  set_query(kOp, p, query);
  set_key_value(kOp, p, key, value, query);
  set_options(kOp, p, block_q, block_k, causal, scale);
  set_lists(kOp, p, block_counts, block_indices, full_counts, full_indices, column_counts, column_indices,
            token_offsets, query);
  set_key_bias(kOp, p, key_bias, query);
  set_seqlens(kOp, p, seqlens_k, query);
  return launch_forward(kOp, p, query);
}

#if defined(VTK_DEFINES_SCHEMAS)
VTK_FRAGMENT(m) {
  // Attention over listed key blocks and single keys, with the log-sum-exp of every row.
  m.def(
      "block_sparse_attention(Tensor query, Tensor key, Tensor value, Tensor block_counts, Tensor block_indices, *, "
      "int block_q=128, int block_k=128, bool causal=False, float? scale=None, Tensor? full_counts=None, "
      "Tensor? full_indices=None, Tensor? column_counts=None, Tensor? column_indices=None, Tensor? key_bias=None, "
      "Tensor? seqlens_k=None, bool token_offsets=False) -> (Tensor out, Tensor lse)");
}
#endif

VTK_IMPL(m) { m.impl("block_sparse_attention", TORCH_BOX(&block_sparse_attention)); }

}  // namespace
}  // namespace vtk
