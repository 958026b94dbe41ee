// Dynamic shared memory above 48 KiB without the opt-in attribute: the launch fails, as on a device.
#include "fault.h"

__global__ void too_much_shared_kernel(int*) {}

FAULT(too_much_shared) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(32);
  config.dynamicSmemBytes = broken ? (48 << 10) + 1 : 48 << 10;
  cudaError_t error = cudaLaunchKernelEx(&config, too_much_shared_kernel, static_cast<int*>(nullptr));
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}
