// unmerge: every token gets the row that it was merged into.
#pragma once
#include <cstdint>

#include "common/cpu_isa.h"

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
#include <cuda_runtime.h>
#endif

namespace vtk {

struct UnmergeParams {
  const char* merged;  // [B, M, row_bytes], strides in bytes
  int64_t stride_batch, stride_row;
  int64_t row_bytes;
  const int64_t* owner;  // [B, N], strides in elements; entries outside [0, M) give rows of zeros
  int64_t owner_stride_batch, owner_stride_token;
  int32_t batch;       // B
  int32_t num_tokens;  // N
  int32_t num_rows;    // M
  char* out;           // [B, N, row_bytes], contiguous
};

VTK_CPU_KERNEL(void, unmerge_cpu, UnmergeParams)

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
cudaError_t unmerge_cuda(const UnmergeParams& params, cudaStream_t stream);
#endif

}  // namespace vtk
