// merge_apply: reduces the rows that share an output row, in the order of their tokens.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/cpu_isa.h"
#include "common/dtype.h"
#include "device/host_device.h"

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
#include <cuda_runtime.h>
#endif

namespace vtk {

enum class MergeReduce : int32_t {
  kWeightedMean,
  kMean,
  kSum,
  kMax,
  // These tell the center of a row, into which the others merge, from the others, its sources.
  kTargetPlusMean,
  kBeta,
  kPivot,
  kSimilarityWeighted,
  kSequentialHalf,
  kPrune,  // sources are no tokens of the row
};

inline bool has_center(MergeReduce reduce) { return reduce >= MergeReduce::kTargetPlusMean; }

// Every reduction but the maximum is sum(coefficient * value) / divisor over the tokens of a row.
struct RowReduction {
  MergeReduce reduce;
  float beta;
  int32_t sources;  // tokens of the row but one
  float weight;     // of all of them

  // before: sources of the row before this token.
  VTK_HOST_DEVICE float coefficient(bool is_center, float weight_of_token, int32_t before) const {
    switch (reduce) {
      case MergeReduce::kWeightedMean: return weight_of_token;
      case MergeReduce::kTargetPlusMean: return is_center ? static_cast<float>(sources) : 1.0f;
      case MergeReduce::kBeta: return is_center ? beta * static_cast<float>(sources) : 1.0f - beta;
      case MergeReduce::kPivot: return is_center ? static_cast<float>(sources + 2) : 1.0f;
      case MergeReduce::kSimilarityWeighted: return is_center ? 1.0f : weight_of_token;
      case MergeReduce::kSequentialHalf: return ldexpf(1.0f, (is_center ? 0 : before) - sources);
      default: return 1.0f;
    }
  }

  VTK_HOST_DEVICE float divisor() const {
    switch (reduce) {
      case MergeReduce::kWeightedMean: return weight;
      case MergeReduce::kMean:
      case MergeReduce::kSimilarityWeighted: return static_cast<float>(sources + 1);
      case MergeReduce::kTargetPlusMean:
      case MergeReduce::kBeta: return static_cast<float>(sources);
      case MergeReduce::kPivot: return static_cast<float>(2 * (sources + 1));
      default: return 1.0f;
    }
  }
};

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
  // [B, M], null unless has_center(reduce). On CUDA nobody has read it yet: a center that is no token of its row leaves
  // the row without one.
  const int64_t* center;
  int64_t center_stride_batch, center_stride_row;
  int32_t batch;       // B
  int32_t num_tokens;  // N
  int32_t channels;    // D
  int32_t out_len;     // M
  MergeReduce reduce;
  float beta;
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
