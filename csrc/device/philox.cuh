// Random numbers by counter: Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
// 1, 2, 3" (SC 2011). A number is a function of what it is drawn for and of nothing else: the same request gets the
// same numbers in any batch, for any split of the work, on the CPU and on the GPU.
#pragma once
#include <cstdint>

#include "device/host_device.h"

namespace vtk {

struct RandomWords {
  uint32_t word[4];
};

VTK_HOST_DEVICE inline RandomWords philox4x32(RandomWords counter, uint32_t key0, uint32_t key1) {
  RandomWords c = counter;
  for (int round = 0; round < 10; ++round) {
    const uint64_t even = uint64_t{0xd2511f53u} * c.word[0], odd = uint64_t{0xcd9e8d57u} * c.word[2];
    c = {{static_cast<uint32_t>(odd >> 32) ^ c.word[1] ^ key0, static_cast<uint32_t>(odd),
          static_cast<uint32_t>(even >> 32) ^ c.word[3] ^ key1, static_cast<uint32_t>(even)}};
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return c;
}

// The numbers of one decision: blocks of four words, counted by `index`. Decisions that differ in a field are
// independent; a field that an op does not need is zero.
struct RandomStream {
  uint64_t seed;      // of the request
  uint32_t position;  // of the token in its sequence
  uint32_t node;      // of the draft tree
  uint32_t purpose;   // an op that draws for several reasons numbers them

  VTK_HOST_DEVICE RandomWords words(uint32_t index) const {
    return philox4x32({{index, node, position, purpose}}, static_cast<uint32_t>(seed),
                      static_cast<uint32_t>(seed >> 32));
  }
};

// [0, 1): the multiples of 2^-24, equally likely and exact in float32. For `u < p`: never true at p = 0, always at 1.
VTK_HOST_DEVICE inline float uniform_below_one(uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; }

// (0, 1]: (word + 1/2) 2^-32, rounded to float32. For log(u): finite, and as fine towards 0 as the word is.
VTK_HOST_DEVICE inline float uniform_above_zero(uint32_t word) {
  return static_cast<float>(word) * 0x1p-32f + 0x1p-33f;  // the product is exact: the same with and without an fma
}

// (0, 1): (word + 1/2) 2^-32, exact in float64. For `u < p`: never true at p = 0, always at 1, as fine as the word is.
VTK_HOST_DEVICE inline double uniform_open(uint32_t word) { return (static_cast<double>(word) + 0.5) * 0x1p-32; }

}  // namespace vtk
