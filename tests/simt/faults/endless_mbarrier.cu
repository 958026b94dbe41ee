// One of two threads that a phase needs never arrives.
#include "device/ptx.cuh"
#include "fault.h"

namespace ptx = vtk::ptx;

__global__ void endless_mbarrier_kernel(int* out, int broken) {
  __shared__ uint64_t done;
  if (threadIdx.x == 0) ptx::mbarrier_init(&done, 2);
  __syncthreads();
  if (threadIdx.x < (broken ? 1 : 2)) ptx::mbarrier_arrive(&done);
  ptx::mbarrier_wait(&done, 0);
  out[threadIdx.x] = 1;
}

FAULT(endless_mbarrier) {
  static int out[32];
  return run_fault(endless_mbarrier_kernel, 32, 0, &out[0], broken);
}
