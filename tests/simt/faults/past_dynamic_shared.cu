// Asks for one element less of dynamic shared memory than it uses.
#include "fault.h"

__global__ void past_dynamic_shared_kernel(int* out) {
  VTK_DYNAMIC_SHARED(dynamic_shared);
  int* values = reinterpret_cast<int*>(dynamic_shared);
  values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = values[63 - threadIdx.x];
}

FAULT(past_dynamic_shared) {
  static int out[64];
  return run_fault(past_dynamic_shared_kernel, 64, (64 - broken) * sizeof(int), &out[0]);
}
