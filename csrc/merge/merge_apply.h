// merge_apply: reduces the rows that share an output row, in the order of their tokens.
#pragma once
#include <cstdint>

#include "common/cpu_isa.h"
#include "common/dtype.h"

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
#include <cuda_runtime.h>
#endif

namespace vtk {

enum class MergeReduce : int32_t { kWeightedMean, kMean, kSum, kMax };

// Strides in elements.
struct MergeApplyParams {
  const void* values;  // [B, N, D], the last dimension contiguous
  DType dtype;
  int64_t stride_batch, stride_token;
  // [B, N]. The CPU op has checked it; on CUDA nobody has read it yet: entries outside [0, out_len) count as dropped.
  const int64_t* owner;
  int64_t owner_stride_batch, owner_stride_token;
  const void* weight;  // [B, N], null: ones
  DType weight_dtype;
  int64_t weight_stride_batch, weight_stride_token;
  int32_t batch;       // B
  int32_t num_tokens;  // N
  int32_t channels;    // D
  int32_t out_len;     // M
  MergeReduce reduce;
  void* merged;       // [B, M, D]
  float* weight_out;  // [B, M]
};

// The first weight that is not a finite number above 0; batch -1 when there is none.
struct WeightConflict {
  int32_t batch = -1, token = -1;
  float value = 0.0f;
};

VTK_CPU_KERNEL(void, merge_apply_cpu, MergeApplyParams)
VTK_CPU_KERNEL(WeightConflict, check_weight_cpu, MergeApplyParams)

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
cudaError_t merge_apply_cuda(const MergeApplyParams& params, cudaStream_t stream);
#endif

}  // namespace vtk
