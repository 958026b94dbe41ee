// kv_pack: keys and values of whole pages to codes and metadata.
#pragma once
#include "common/cpu_isa.h"
#include "common/dtype.h"
#include "kv/page.h"

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
#include <cuda_runtime.h>
#endif

namespace vtk {

struct KvPackSide {
  KvView<const char> x;  // [B, Hk, N, D] of dtype, strides in bytes
  KvPage page;
  KvOrder order;
  KvView<uint8_t> codes;  // [B, Hk, pages, page.code_bytes]
  KvView<uint16_t> meta;  // float16 [B, Hk, pages, page.meta_count]
};

struct KvPackParams {
  KvPackSide side[2];  // keys, values
  DType dtype;
  int32_t batch;     // B
  int32_t heads;     // Hk
  int32_t pages;     // N / 128
  int32_t head_dim;  // D
  float ternary_threshold;
};

VTK_CPU_KERNEL(void, kv_pack_cpu, KvPackParams)

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
cudaError_t kv_pack_cuda(const KvPackParams& params, cudaStream_t stream);
#endif

}  // namespace vtk
