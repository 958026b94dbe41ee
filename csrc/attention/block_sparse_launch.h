// Allocates the outputs of the attention ops and launches them. Include only from an op's .cpp.
#pragma once
#include <tuple>

#include "attention/block_sparse_attention.h"
#include "common/backend.h"
#include "common/check.h"
#include "common/empty.h"

namespace vtk {
namespace {

inline std::tuple<Tensor, Tensor> launch_forward([[maybe_unused]] const char* op, BlockSparseAttentionParams& p,
                                                 const Tensor& query) {
  Tensor out = empty({p.batch, p.num_heads, p.num_queries, p.head_dim}, query.scalar_type(), query);
  Tensor lse = empty({p.batch, p.num_heads, p.num_queries}, ScalarType::Float, query);
  if (int64_t{p.batch} * p.num_heads * p.num_queries == 0) return {out, lse};
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
#if defined(VTK_BACKEND_CUDA)
  Tensor workspace = empty({block_sparse_attention_workspace(p)}, ScalarType::Float, query);
  p.workspace = static_cast<float*>(workspace.mutable_data_ptr());
#endif
  VTK_LAUNCH(op, block_sparse_attention, p, query);
  return {out, lse};
}

}  // namespace
}  // namespace vtk
