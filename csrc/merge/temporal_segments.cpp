// temporal_segments: schema, checks, allocation, launch.
#include "merge/temporal_segments.h"

#include <algorithm>
#include <tuple>

#include "common/backend.h"
#include "common/check.h"
#include "common/empty.h"

namespace vtk {
namespace {

constexpr const char* kOp = "temporal_segments";

// temporal_segments(similarity [B, F - 1, S]) -> (segment int64 [B, F], is_static bool [B, F, S], gain int64 [B])
std::tuple<Tensor, Tensor, Tensor> temporal_segments(const Tensor& similarity, double threshold, int64_t max_window) {
  TemporalSegmentsParams p = {};
  check_dim(kOp, "similarity", similarity, 3, "[B, F - 1, S]");
  p.dtype = float_dtype(kOp, "similarity", similarity);
  check_contiguous_last(kOp, "similarity", similarity);
  VTK_CHECK(kOp, threshold == threshold, "expected threshold to be a number, got NaN");
  VTK_CHECK(kOp, max_window >= 1, "expected max_window >= 1, got ", max_window);
  p.batch = check_count(kOp, "batch size", similarity.size(0));
  p.frames = check_count(kOp, "frame count", similarity.size(1) + 1);
  p.positions = check_count(kOp, "position count", similarity.size(2));
  check_count(kOp, "token count F * S", int64_t{p.frames} * p.positions);
  p.similarity = similarity.const_data_ptr();
  p.stride_batch = similarity.stride(0);
  p.stride_pair = similarity.stride(1);
  p.threshold = static_cast<float>(threshold);
  p.max_pairs = static_cast<int32_t>(std::min<int64_t>(max_window, p.frames)) - 1;

  Tensor segment = empty({p.batch, p.frames}, ScalarType::Long, similarity);
  Tensor is_static = empty({p.batch, p.frames, p.positions}, ScalarType::Bool, similarity);
  Tensor gain = empty({p.batch}, ScalarType::Long, similarity);
  p.segment = static_cast<int64_t*>(segment.mutable_data_ptr());
  p.is_static = static_cast<bool*>(is_static.mutable_data_ptr());
  p.gain = static_cast<int64_t*>(gain.mutable_data_ptr());
  if (p.batch == 0) return {segment, is_static, gain};
#if defined(VTK_BACKEND_CUDA)
  Tensor workspace = empty({temporal_segments_workspace(p)}, ScalarType::Byte, similarity);
  p.workspace = workspace.mutable_data_ptr();
#endif
  VTK_LAUNCH(kOp, temporal_segments, p, similarity);
  return {segment, is_static, gain};
}

#if defined(VTK_DEFINES_SCHEMAS)
VTK_FRAGMENT(m) {
  // The cut of a video whose static positions, stored once a segment, save the most tokens.
  m.def(
      "temporal_segments(Tensor similarity, *, float threshold, SymInt max_window=1024) -> (Tensor segment, Tensor "
      "is_static, Tensor gain)");
}
#endif

VTK_IMPL(m) { m.impl("temporal_segments", TORCH_BOX(&temporal_segments)); }

}  // namespace
}  // namespace vtk
