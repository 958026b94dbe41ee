// kv_unpack: keys and values from the codes and metadata of kv_pack.
#pragma once
#include "common/cpu_isa.h"
#include "common/dtype.h"
#include "kv/page.h"

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
#include <cuda_runtime.h>
#endif

namespace vtk {

struct KvUnpackSide {
  KvView<const uint8_t> codes;  // [B, Hk, pages, page.code_bytes]
  KvView<const uint16_t> meta;  // float16 [B, Hk, pages, page.meta_count]
  KvPage page;
  KvOrder order;
  KvView<char> x;  // [B, Hk, pages * 128, D] of dtype, strides in bytes
};

struct KvUnpackParams {
  KvUnpackSide side[2];  // keys, values
  DType dtype;
  int32_t batch;  // B
  int32_t heads;  // Hk
  int32_t pages;
  int32_t head_dim;  // D
};

VTK_CPU_KERNEL(void, kv_unpack_cpu, KvUnpackParams)

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
cudaError_t kv_unpack_cuda(const KvUnpackParams& params, cudaStream_t stream);
#endif

}  // namespace vtk
