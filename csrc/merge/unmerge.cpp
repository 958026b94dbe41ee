// unmerge: schema, checks, allocation, launch.
#include "merge/unmerge.h"

#include "common/backend.h"
#include "common/check.h"
#include "common/empty.h"
#include "merge/owner_argument.h"

namespace vtk {
namespace {

constexpr const char* kOp = "unmerge";

// unmerge(merged [B, M, D], owner int64 [B, N]) -> [B, N, D]
Tensor unmerge(const Tensor& merged, const Tensor& owner) {
  check_dim(kOp, "merged", merged, 3, "[B, M, D]");
  float_dtype(kOp, "merged", merged);
  check_contiguous_last(kOp, "merged", merged);
  check_width(kOp, "merged", merged);
  check_dim(kOp, "owner", owner, 2, "[B, N]");
  UnmergeParams p = {};
  p.batch = check_count(kOp, "batch size", merged.size(0));
  p.num_rows = check_count(kOp, "row count", merged.size(1));
  p.num_tokens = check_count(kOp, "token count", owner.size(1));
  check_owner(kOp, owner, p.batch, p.num_tokens, p.num_rows, "M", "merged", merged);
  const int64_t element = static_cast<int64_t>(merged.element_size());
  p.merged = static_cast<const char*>(merged.const_data_ptr());
  p.stride_batch = merged.stride(0) * element;
  p.stride_row = merged.stride(1) * element;
  p.row_bytes = merged.size(2) * element;
  p.owner = static_cast<const int64_t*>(owner.const_data_ptr());
  p.owner_stride_batch = owner.stride(0);
  p.owner_stride_token = owner.stride(1);

  Tensor out = empty({p.batch, p.num_tokens, merged.size(2)}, merged.scalar_type(), merged);
  p.out = static_cast<char*>(out.mutable_data_ptr());
  if (p.batch > 0 && p.num_tokens > 0 && p.row_bytes > 0) VTK_LAUNCH(kOp, unmerge, p, merged);
  return out;
}

#if defined(VTK_DEFINES_SCHEMAS)
VTK_FRAGMENT(m) {
  // The row that each token was merged into; zeros for a dropped token.
  m.def("unmerge(Tensor merged, Tensor owner) -> Tensor");
}
#endif

VTK_IMPL(m) { m.impl("unmerge", TORCH_BOX(&unmerge)); }

}  // namespace
}  // namespace vtk
