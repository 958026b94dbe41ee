// A barrier over a group of blocks that are all resident (LaunchShape.cooperative).
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace vtk {

inline constexpr int64_t kBarrierBytes = 128;  // a cache line a counter, so that groups do not disturb each other

// Writes before the barrier, of any thread of the group, are visible after it. The counter starts at zero and only
// grows; differences are taken modulo 2^32.
struct GridBarrier {
  unsigned* counter;
  unsigned blocks;
  unsigned target = 0;

  // All threads of all blocks of the group call it equally often.
  __device__ void wait() {
    __syncthreads();
    if (blocks == 1) return;
    target += blocks;
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(counter, 1u);
      while (static_cast<int>(*static_cast<volatile unsigned*>(counter) - target) < 0) __nanosleep(20);
      __threadfence();
    }
    __syncthreads();
  }
};

}  // namespace vtk
