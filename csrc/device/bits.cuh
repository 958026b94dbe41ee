// Low-bit codes in 32-bit words, for CPU and CUDA kernels. Turning them into numbers is device/code_pairs.cuh.
#pragma once
#include <cstdint>

#include "device/host_device.h"

namespace vtk {

// ---- Codes of 1, 2, 4 or 8 bits ----
// Pair order: codes 2 i and 2 i + 1 lie at bit kBits i of the lower and of the upper half of the word, so that one
// shift and mask bring a pair of neighbours into the two 16-bit lanes of a register.

template <int kBits>
inline constexpr int kCodesPerWord = 32 / kBits;

template <int kBits>
VTK_HOST_DEVICE constexpr int code_shift(int i) {
  static_assert(kBits == 1 || kBits == 2 || kBits == 4 || kBits == 8);
  return kBits * (i / 2) + 16 * (i % 2);
}

// code_at(i) < 2^kBits, i in [0, kCodesPerWord).
template <int kBits, class CodeAt>
VTK_HOST_DEVICE uint32_t pack_codes(const CodeAt& code_at) {
  uint32_t word = 0;
  for (int i = 0; i < kCodesPerWord<kBits>; ++i) word |= static_cast<uint32_t>(code_at(i)) << code_shift<kBits>(i);
  return word;
}

template <int kBits>
VTK_HOST_DEVICE constexpr uint32_t code_of(uint32_t word, int i) {
  return word >> code_shift<kBits>(i) & ((1u << kBits) - 1);
}

// ---- Ternary, two planes: 2 bits a value, cheap to decode ----

// 32 values of -1, 0, +1 in pair order. A zero is never negative.
struct TernaryPlanes {
  uint32_t nonzero, negative;
};

// value_at(i) in {-1, 0, 1}, i in [0, 32).
template <class ValueAt>
VTK_HOST_DEVICE TernaryPlanes pack_ternary(const ValueAt& value_at) {
  return {pack_codes<1>([&](int i) { return value_at(i) != 0; }),
          pack_codes<1>([&](int i) { return value_at(i) < 0; })};
}

VTK_HOST_DEVICE constexpr int ternary_of(TernaryPlanes planes, int i) {
  return static_cast<int>(code_of<1>(planes.nonzero, i)) - 2 * static_cast<int>(code_of<1>(planes.negative, i));
}

// ---- Ternary, five in a byte: 1.6 bits a value ----
// The five trits 0, 1, 2 are the digits of v in base 3, and the byte is v / 243 as a fraction of 256, rounded up:
// multiplying by 3 moves the next digit in front of the binary point, so decoding needs no division.

inline constexpr int kTritsPerByte = 5;

// trit_at(i) in {0, 1, 2}, i in [0, 5).
template <class TritAt>
VTK_HOST_DEVICE uint8_t pack_trits(const TritAt& trit_at) {
  uint32_t v = 0;
  for (int i = 0; i < kTritsPerByte; ++i) v = 3 * v + static_cast<uint32_t>(trit_at(i));
  return static_cast<uint8_t>((256 * v + 242) / 243);
}

VTK_HOST_DEVICE constexpr uint32_t trit_of(uint8_t byte, int i) {
  uint32_t fraction = byte;
  for (int digit = 0; digit < i; ++digit) fraction = 3 * fraction & 255u;
  return 3 * fraction >> 8;
}

}  // namespace vtk
