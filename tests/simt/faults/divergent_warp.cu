// Lanes of one warp meet at different shuffles.
#include "fault.h"

__global__ void divergent_warp_kernel(int* out, int broken) {
  int x = threadIdx.x;
  if (broken && threadIdx.x < 8) {
    x = __shfl_sync(0xffffffffu, x, 0);
  } else {
    x = __shfl_sync(0xffffffffu, x, 1);
  }
  out[threadIdx.x] = x;
}

FAULT(divergent_warp) {
  static int out[32];
  return run_fault(divergent_warp_kernel, 32, 0, out, broken);
}
