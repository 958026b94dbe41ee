// temporal_segments: the cut of a video into runs of frames that saves the most tokens.
//
// A position is similar over a pair of adjacent frames when its similarity is above the threshold (NaN is not). It is
// static in a segment when it is similar over every pair of it. gain(s..e) = static positions * (e - s): what is left
// out when each of them is stored once. The cut has the largest sum of gains; where the last segment may be shorter
// without loss, it is.
#pragma once
#include <cstdint>

#include "common/cpu_isa.h"
#include "common/dtype.h"

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
#include <cuda_runtime.h>
#endif

namespace vtk {

struct TemporalSegmentsParams {
  const void* similarity;  // [B, F - 1, S], the last dimension contiguous; strides in elements
  DType dtype;
  int64_t stride_batch, stride_pair;
  int32_t batch;      // B
  int32_t frames;     // F >= 1
  int32_t positions;  // S, F * S < 2^31
  float threshold;
  int32_t max_pairs;  // of a segment, at most F - 1

  int64_t* segment;  // [B, F], ascending from 0
  bool* is_static;   // [B, F, S]
  int64_t* gain;     // [B]
  void* workspace;   // CUDA only: temporal_segments_workspace(params) bytes, not initialised
};

VTK_CPU_KERNEL(void, temporal_segments_cpu, TemporalSegmentsParams)

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
int64_t temporal_segments_workspace(const TemporalSegmentsParams& params);
cudaError_t temporal_segments_cuda(const TemporalSegmentsParams& params, cudaStream_t stream);
#endif

}  // namespace vtk
