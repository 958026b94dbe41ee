// All 32 lanes call a shuffle whose mask names only half of them.
#include "fault.h"

__global__ void wrong_shuffle_mask_kernel(int* out, int broken) {
  int x = threadIdx.x;
  for (int delta = 16; delta > 0; delta /= 2) x += __shfl_xor_sync(broken ? 0x0000ffffu : 0xffffffffu, x, delta);
  out[threadIdx.x] = x;
}

FAULT(wrong_shuffle_mask) {
  static int out[32];
  return run_fault(wrong_shuffle_mask_kernel, 32, 0, out, broken);
}
