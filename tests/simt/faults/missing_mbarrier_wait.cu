// Reads what a bulk copy brings without waiting at its mbarrier.
#include "device/ptx.cuh"
#include "fault.h"

namespace ptx = vtk::ptx;

__global__ void missing_mbarrier_wait_kernel(const int4* in, int* out, int broken) {
  __shared__ int4 values[32];
  __shared__ uint64_t full;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&full, 1);
    ptx::mbarrier_arrive_expect(&full, sizeof values);
    ptx::bulk_copy(values, in, sizeof values, &full);
  }
  __syncthreads();
  if (!broken) ptx::mbarrier_wait(&full, 0);
  out[threadIdx.x] = values[threadIdx.x].x;
}

FAULT(missing_mbarrier_wait) {
  static int4 in[32];
  static int out[32];
  return run_fault(missing_mbarrier_wait_kernel, 32, 0, static_cast<const int4*>(in), &out[0], broken);
}
