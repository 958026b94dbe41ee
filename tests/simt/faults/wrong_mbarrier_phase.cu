// Waits twice for the same phase of an mbarrier: the second time it has ended long ago, and nothing is waited for.
#include "device/ptx.cuh"
#include "fault.h"

namespace ptx = vtk::ptx;

__global__ void wrong_mbarrier_phase_kernel(const int4* in, int* out, int broken) {
  __shared__ int4 values[2][32];
  __shared__ uint64_t full;
  if (threadIdx.x == 0) ptx::mbarrier_init(&full, 1);
  __syncthreads();
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect(&full, sizeof values[round]);
      ptx::bulk_copy(values[round], in, sizeof values[round], &full);
    }
    ptx::mbarrier_wait(&full, broken ? 0 : round);
    out[threadIdx.x] = values[round][threadIdx.x].x;
    __syncthreads();
  }
}

FAULT(wrong_mbarrier_phase) {
  static int4 in[32];
  static int out[32];
  return run_fault(wrong_mbarrier_phase_kernel, 32, 0, static_cast<const int4*>(in), &out[0], broken);
}
