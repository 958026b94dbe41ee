// select_cover: greedy maximum coverage of nonnegative gains.
#pragma once
#include <cstdint>

#include "common/cpu_isa.h"
#include "common/dtype.h"

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
#include <cuda_runtime.h>
#endif

namespace vtk {

struct SelectCoverParams {
  const void* gains;  // [B, R, N], the last dimension contiguous; strides in elements
  DType dtype;
  int64_t stride_batch, stride_row;
  MaskView drop_mask;  // [B, N]
  int32_t batch;       // B
  int32_t num_rows;    // R
  int32_t num_tokens;  // N
  int32_t keep;        // 1 <= keep <= N; the op returns early for 0
  Order order;
  int64_t* indices;  // [B, keep]
  void* workspace;   // CUDA only: select_cover_workspace(params) bytes, not initialised
};

VTK_CPU_KERNEL(void, select_cover_cpu, SelectCoverParams)

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
int64_t select_cover_workspace(const SelectCoverParams& params);
cudaError_t select_cover_cuda(const SelectCoverParams& params, cudaStream_t stream);
#endif

}  // namespace vtk
