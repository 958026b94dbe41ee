// Loads of the three float types as float32.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/dtype.h"

namespace vtk {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// For code that reads few elements and need not be specialised by type.
__device__ inline float load_float(const void* base, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat32: return static_cast<const float*>(base)[index];
    case DType::kFloat16: return to_float(static_cast<const __half*>(base)[index]);
    default: return to_float(static_cast<const __nv_bfloat16*>(base)[index]);
  }
}

}  // namespace vtk
