// Reads the neighbour's element of a shared array without the barrier after the write.
#include "fault.h"

__global__ void missing_syncthreads_kernel(int* out, int broken) {
  __shared__ int values[128];
  values[threadIdx.x] = threadIdx.x;
  if (!broken) __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 64) % 128];
}

FAULT(missing_syncthreads) {
  static int out[128];
  return run_fault(missing_syncthreads_kernel, 128, 0, out, broken);
}
