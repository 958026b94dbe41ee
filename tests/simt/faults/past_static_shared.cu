// Writes one element past a static shared array, into what the linker put next to it.
#include "fault.h"

__global__ void past_static_shared_kernel(int* out, int broken) {
  __shared__ int first[64];
  __shared__ int second[64];
  first[threadIdx.x] = 1;
  second[threadIdx.x + (broken ? 1 : 0)] = 2;
  __syncthreads();
  out[threadIdx.x] = first[63 - threadIdx.x] + second[63 - threadIdx.x];
}

FAULT(past_static_shared) {
  static int out[64];
  return run_fault(past_static_shared_kernel, 64, 0, out, broken);
}
