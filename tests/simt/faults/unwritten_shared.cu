// Sums 64 elements of which 63 were written.
#include "fault.h"

__global__ void unwritten_shared_kernel(float* out, int broken) {
  __shared__ float values[64];
  if (threadIdx.x < (broken ? 63 : 64)) values[threadIdx.x] = 1.0f;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0.0f;
    for (int i = 0; i < 64; ++i) sum += values[i];
    *out = sum;
  }
}

FAULT(unwritten_shared) {
  static float out;
  return run_fault(unwritten_shared_kernel, 64, 0, &out, broken);
}
