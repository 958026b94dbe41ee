// Half of the block takes a branch with a barrier in it.
#include "fault.h"

__global__ void divergent_barrier_kernel(int* out, int broken) {
  __shared__ int values[64];
  values[threadIdx.x] = threadIdx.x;
  if (!broken || threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = threadIdx.x < 32 || !broken ? values[threadIdx.x ^ 1] : 0;
}

FAULT(divergent_barrier) {
  static int out[64];
  return run_fault(divergent_barrier_kernel, 64, 0, out, broken);
}
