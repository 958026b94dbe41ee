// attention_scores on CUDA.
//
// score(n) = reduce over heads of reduce over rows i of exp(scale q_i k_n - lse_i), logits in powers of two
//
//   few rows   attention_scores_few_rows.cuh: K is read once, bandwidth and launches bound it
//   many rows  attention_scores_many_rows.cuh: two passes of tensor-core tiles
//
// Blocks whose results must be summed write partial results that are reduced in ascending order: no atomics, and the
// cut into parts depends on shapes alone, so the bits do not depend on the device.
#include "score/attention_scores_few_rows.cuh"
#include "score/attention_scores_many_rows.cuh"

namespace vtk {
namespace {

template <class T>
cudaError_t launch_scores(const AttentionScoresParams& p, cudaStream_t stream) {
  const Plan plan = make_plan(p);
  return plan.few_rows ? launch_few_rows<T>(p, plan, stream) : launch_many_rows<T>(p, plan, stream);
}

}  // namespace

int64_t attention_scores_workspace(const AttentionScoresParams& p) { return make_plan(p).workspace_floats; }

cudaError_t attention_scores_cuda(const AttentionScoresParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::kFloat32: return launch_scores<float>(p, stream);
    case DType::kFloat16: return launch_scores<__half>(p, stream);
    default: return launch_scores<__nv_bfloat16>(p, stream);
  }
}

}  // namespace vtk
