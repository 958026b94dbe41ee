// select_cover: schema, checks, allocation, launch.
#include "select/select_cover.h"

#include "common/backend.h"
#include "common/check.h"
#include "common/empty.h"

namespace vtk {
namespace {

using OptTensor = std::optional<Tensor>;
constexpr const char* kOp = "select_cover";

#if defined(VTK_BACKEND_CUDA)
void run(SelectCoverParams& p, const Tensor& like) {
  Tensor workspace = empty({select_cover_workspace(p)}, ScalarType::Byte, like);
  p.workspace = workspace.mutable_data_ptr();
  VTK_LAUNCH(kOp, select_cover, p, like);
}
#else
// On CUDA too small a choice is clamped without a sync, see select_cover.cu.
void run(SelectCoverParams& p, const Tensor&) {
  for (int64_t b = 0; p.drop_mask.data != nullptr && b < p.batch; ++b) {
    int64_t allowed = 0;
    for (int64_t n = 0; n < p.num_tokens; ++n)
      allowed += !p.drop_mask.data[b * p.drop_mask.stride_row + n * p.drop_mask.stride_col];
    VTK_CHECK(kOp, allowed >= p.keep, "drop_mask leaves ", allowed, " tokens of batch row ", b, " but keep = ", p.keep);
  }
  VTK_LAUNCH(kOp, select_cover, p, like);
}
#endif

// select_cover(gains [B, R, N], keep) -> indices int64 [B, keep]
Tensor select_cover(const Tensor& gains, int64_t keep, const OptTensor& drop_mask, const std::string& order) {
  SelectCoverParams p = {};
  check_dim(kOp, "gains", gains, 3, "[B, R, N]");
  p.dtype = float_dtype(kOp, "gains", gains);
  check_contiguous_last(kOp, "gains", gains);
  p.batch = check_count(kOp, "batch size", gains.size(0));
  p.num_rows = check_count(kOp, "row count", gains.size(1));
  p.num_tokens = check_count(kOp, "token count", gains.size(2));
  VTK_CHECK(kOp, keep >= 0 && keep <= p.num_tokens, "expected 0 <= keep <= N = ", p.num_tokens, ", got keep = ", keep);
  p.keep = static_cast<int32_t>(keep);
  p.order = parse_order(kOp, order, "pick");
  p.gains = gains.const_data_ptr();
  p.stride_batch = gains.stride(0);
  p.stride_row = gains.stride(1);
  p.drop_mask = mask_view(kOp, "drop_mask", drop_mask, "[B, N]", {p.batch, p.num_tokens}, "gains", gains);

  Tensor indices = empty({p.batch, keep}, ScalarType::Long, gains);
  p.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  if (p.batch > 0 && keep > 0) run(p, gains);
  return indices;
}

#if defined(VTK_DEFINES_SCHEMAS)
VTK_FRAGMENT(m) {
  // Greedy maximum coverage: each pick adds the most of sum_r max(gains[r, j] - covered_r, 0); ties: lower index.
  m.def("select_cover(Tensor gains, SymInt keep, *, Tensor? drop_mask=None, str order=\"position\") -> Tensor indices");
}
#endif

VTK_IMPL(m) { m.impl("select_cover", TORCH_BOX(&select_cover)); }

}  // namespace
}  // namespace vtk
