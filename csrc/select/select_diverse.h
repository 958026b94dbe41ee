// select_diverse: greedy selection of tokens that are unlike each other, by cosine similarity.
#pragma once
#include <cstdint>

#include "common/cosine.h"
#include "common/cpu_isa.h"
#include "common/dtype.h"

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
#include <cuda_runtime.h>
#endif

namespace vtk {

enum class DiverseMode : int32_t { kMaxMin, kMaxSum };

struct SelectDiverseParams {
  const void* features;  // [B, N, C], the last dimension contiguous; strides in elements
  DType dtype;
  int64_t stride_batch, stride_token;
  const int64_t* seed;  // [B], null: the lowest allowed token. The CPU op has checked it; on CUDA nobody has read it
  int64_t seed_stride;
  MaskView drop_mask;  // [B, N]
  int32_t batch;       // B
  int32_t num_tokens;  // N
  int32_t channels;    // C
  int32_t keep;        // 1 <= keep <= N; the op returns early for 0
  DiverseMode mode;
  Order order;
  int64_t* indices;  // [B, keep]
  void* workspace;   // CUDA only: select_diverse_workspace(params) bytes, not initialised
};

VTK_CPU_KERNEL(void, select_diverse_cpu, SelectDiverseParams)

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
int64_t select_diverse_workspace(const SelectDiverseParams& params);
cudaError_t select_diverse_cuda(const SelectDiverseParams& params, cudaStream_t stream);
#endif

}  // namespace vtk
