// The one way a kernel is launched, and the one spelling of dynamic shared memory, so that the same kernel
// source runs on a GPU and under the host emulation of the tests.
#pragma once
#include <cuda_runtime.h>

#include <utility>

#if !defined(VTK_DYNAMIC_SHARED)  // the host emulation of the tests has its own
#define VTK_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace vtk {

// A kernel that uses more than 48 KiB, static and dynamic together, must opt in. Static use stays under 32 KiB.
inline constexpr size_t kOptInDynamicBytes = 16 << 10;

// Blocks that occupy a large GPU. Not asked of the device: how work is split must not depend on where it runs.
inline constexpr int64_t kFillBlocks = 512;

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;      // blocks a cluster along x, sm_90 and later
  bool cooperative = false;  // all blocks resident at once: a grid-wide barrier is allowed
};

template <class... Expected, class... Actual>
inline cudaError_t launch(void (*kernel)(Expected...), const LaunchShape& shape, cudaStream_t stream,
                          Actual&&... args) {
  if (shape.shared_bytes > kOptInDynamicBytes) {
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {shape.cluster, 1, 1};
  }
  if (shape.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  config.attrs = attributes;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Actual>(args)...);
}

// Multiprocessors of the current device; asked once per device, cudaDeviceGetAttribute is fast but not free.
inline int num_multiprocessors() {
  static thread_local int cached_device = -1, cached_count = 0;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (device != cached_device) {
    if (cudaDeviceGetAttribute(&cached_count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
    cached_device = device;
  }
  return cached_count;
}

// What a block of the current device can opt in to, static and dynamic together.
inline int max_shared_bytes() {
  int device = 0, bytes = 48 << 10;
  if (cudaGetDevice(&device) != cudaSuccess) return bytes;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 48 << 10;
  return bytes;
}

}  // namespace vtk
