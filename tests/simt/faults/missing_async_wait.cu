// Reads what a cp.async copies without waiting for it.
#include "device/ptx.cuh"
#include "fault.h"

namespace ptx = vtk::ptx;

__global__ void missing_async_wait_kernel(const int4* in, int* out, int broken) {
  __shared__ int4 values[32];
  ptx::cp_async_16(&values[threadIdx.x], &in[threadIdx.x], true);
  ptx::cp_async_commit();
  if (!broken) ptx::cp_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x].x;
  ptx::cp_async_wait<0>();
}

FAULT(missing_async_wait) {
  static int4 in[32];
  static int out[32];
  return run_fault(missing_async_wait_kernel, 32, 0, static_cast<const int4*>(in), &out[0], broken);
}
