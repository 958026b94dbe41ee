// kv_compact: chosen tokens of dense keys and values, both in one launch.
#pragma once
#include "common/cpu_isa.h"
#include "kv/page.h"

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
#include <cuda_runtime.h>
#endif

namespace vtk {

struct KvCompactParams {
  KvView<const char> from[2];  // keys, values [B, Hk, N, row_bytes], strides in bytes
  char* to[2];                 // [B, Hk, K, row_bytes], contiguous
  int64_t row_bytes;
  const int64_t* indices;  // [B, Hk, K]; CUDA clamps them to [0, N)
  int64_t indices_stride_batch, indices_stride_head, indices_stride_entry;
  int32_t batch;       // B
  int32_t heads;       // Hk
  int32_t num_tokens;  // N
  int32_t kept;        // K

  VTK_HOST_DEVICE int64_t index(int64_t b, int64_t h, int64_t i) const {
    return indices[b * indices_stride_batch + h * indices_stride_head + i * indices_stride_entry];
  }
};

VTK_CPU_KERNEL(void, kv_compact_cpu, KvCompactParams)

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
cudaError_t kv_compact_cuda(const KvCompactParams& params, cudaStream_t stream);
#endif

}  // namespace vtk
