// The k-th largest of a block's keys: four passes of 8 bits over a 256-bin histogram in shared memory.
// Counts are integers, so the result does not depend on the order of the atomics.
#pragma once
#include <cstdint>

#include "device/reduce.cuh"

namespace vtk {

struct RadixSelectStorage {
  uint32_t histogram[256];
  uint32_t digit;
  int32_t remaining;
};

struct Threshold {
  uint32_t key;
  int32_t ties;  // how many tokens equal to the key are kept
};

// key_at(i), i in [0, count): any callable; 1 <= k <= count. All threads of the block call it.
template <class KeyAt>
__device__ Threshold radix_select(const KeyAt& key_at, int32_t count, int32_t k, RadixSelectStorage& storage) {
  uint32_t prefix = 0, prefix_mask = 0;
  int32_t remaining = k;
  for (int shift = 24; shift >= 0; shift -= 8) {
    // Clear.
    for (int bin = threadIdx.x; bin < 256; bin += blockDim.x) storage.histogram[bin] = 0;
    __syncthreads();
    // Count the digits of the keys that share the prefix found so far.
    for (int32_t i = threadIdx.x; i < count; i += blockDim.x) {
      uint32_t key = key_at(i);
      if ((key & prefix_mask) == prefix) atomicAdd(&storage.histogram[(key >> shift) & 255u], 1u);
    }
    __syncthreads();
    // One warp walks the bins from the top: lane l owns bins 255 - 8l ... 248 - 8l.
    if (threadIdx.x < 32) {
      int lane = threadIdx.x, top = 255 - 8 * lane;
      int32_t own = 0;
      for (int b = 0; b < 8; ++b) own += static_cast<int32_t>(storage.histogram[top - b]);
      const int32_t above = warp_inclusive_sum(own) - own;
      if (above < remaining && remaining <= above + own) {  // exactly one lane holds the k-th key
        int bin = top;
        int32_t left = remaining - above;
        while (static_cast<int32_t>(storage.histogram[bin]) < left)
          left -= static_cast<int32_t>(storage.histogram[bin--]);
        storage.digit = static_cast<uint32_t>(bin);
        storage.remaining = left;
      }
    }
    __syncthreads();
    prefix |= storage.digit << shift;
    prefix_mask |= 255u << shift;
    remaining = storage.remaining;
    // NOTE: the next pass clears the histogram only; digit and remaining are rewritten after two barriers.
  }
  return {prefix, remaining};
}

}  // namespace vtk
