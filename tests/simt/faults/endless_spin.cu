// Thread 0 waits for a flag that nobody sets.
#include "fault.h"

__global__ void endless_spin_kernel(int* flag, int broken) {
  if (threadIdx.x == 1 && !broken) atomicExch(flag, 1);
  if (threadIdx.x == 0)
    while (*static_cast<volatile int*>(flag) == 0) __nanosleep(100);
}

FAULT(endless_spin) {
  static int flag;
  flag = 0;
  return run_fault(endless_spin_kernel, 32, 0, &flag, broken);
}
