// Overwrites a shared array without a __syncwarp after the reads of the round before. In lockstep, and with the
// lanes run in order, the result is right; a lane that runs ahead spoils what a slower one has yet to read.
#include "fault.h"

__global__ void missing_syncwarp_kernel(int* out, int broken) {
  __shared__ int values[32];
  const int lane = threadIdx.x;
  for (int round = 0; round < 4; ++round) {
    values[lane] = round * 100 + lane;
    __syncwarp();
    out[lane] = values[31 - lane];
    if (!broken) __syncwarp();  // the next round overwrites what a slower lane may still have to read
  }
}

FAULT(missing_syncwarp) {
  static int out[32];
  return run_fault(missing_syncwarp_kernel, 32, 0, out, broken);
}
