// Packed codes (device/bits.cuh) as pairs of float16 or bfloat16 numbers in a register, ready for an mma.
//
// The trick: an integer c ORed into the low bits of the mantissa of 2^m (m mantissa bits: 10 or 7) is the number
// 2^m + c, and one fma takes 2^m and the zero point off again. A code that lies `place` bits higher reads as 2^place c,
// and the same fma scales it back, so shifts are needed only where the mantissa ends: float16 takes five pairs of
// 2-bit codes from one word without a shift, one lop3 and one fma each. All of it is exact.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "device/bits.cuh"
#include "device/ptx.cuh"

namespace vtk {

template <class T>
struct PairFormat;
template <>
struct PairFormat<__half> {
  static constexpr int kMantissa = 10, kBias = 15;
};
template <>
struct PairFormat<__nv_bfloat16> {
  static constexpr int kMantissa = 7, kBias = 127;
};

VTK_HOST_DEVICE constexpr uint32_t both_lanes(uint32_t x) { return x << 16 | x; }

// Two numbers as the 16-bit lanes of a register.
template <class T>
__device__ inline uint32_t pack_pair(float low, float high);
template <>
__device__ inline uint32_t pack_pair<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ inline uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Bits of (2^exponent + low / 2^(mantissa - exponent)) in both lanes: `low` counts in the last place.
template <class T>
VTK_HOST_DEVICE constexpr uint32_t pair_of(int exponent, uint32_t low = 0) {
  using F = PairFormat<T>;
  return both_lanes(static_cast<uint32_t>(F::kBias + exponent) << F::kMantissa | low);
}

inline constexpr uint32_t kPairSigns = 0x80008000u;

// c - kZero for the integers c < 2^kBits at bit kPlace of both lanes of `word`; other bits do not matter.
template <class T, int kBits, int kPlace, int kZero>
__device__ inline uint32_t integer_pair(uint32_t word) {
  constexpr int kMantissa = PairFormat<T>::kMantissa;
  static_assert(kPlace + kBits <= kMantissa, "the code must lie in the mantissa");
  static_assert(kZero >= 0 && kZero < 1 << (kMantissa - kPlace), "the zero point must be exact");
  constexpr uint32_t kMask = both_lanes(((1u << kBits) - 1) << kPlace);
  const uint32_t number = ptx::lop3<(ptx::kA & ptx::kB) | ptx::kC>(word, kMask, pair_of<T>(kMantissa));
  constexpr uint32_t kOffset = kPairSigns | pair_of<T>(kMantissa - kPlace, static_cast<uint32_t>(kZero) << kPlace);
  return ptx::fma_pair<T>(number, pair_of<T>(-kPlace), kOffset);
}

// code - kZero for codes 2 kPair and 2 kPair + 1 of a word.
template <class T, int kBits, int kPair, int kZero = 0>
__device__ inline uint32_t code_pair(uint32_t word) {
  constexpr int kRoom = PairFormat<T>::kMantissa / kBits;  // pairs that need no shift
  return integer_pair<T, kBits, kPair % kRoom * kBits, kZero>(word >> kPair / kRoom * kRoom * kBits);
}

// x with the signs of the set bits 2 kPair and 2 kPair + 1 of `negative` flipped.
template <int kPair>
__device__ inline uint32_t flip_pair(uint32_t x, uint32_t negative) {
  return ptx::lop3<(ptx::kA & ptx::kB) ^ ptx::kC>(negative << (15 - kPair), kPairSigns, x);
}

// +1 for a clear bit, -1 for a set one: bits 2 kPair and 2 kPair + 1 of a word.
template <class T, int kPair>
__device__ inline uint32_t sign_pair(uint32_t word) {
  return flip_pair<kPair>(pair_of<T>(0), word);
}

// -1, 0 or +1: values 2 kPair and 2 kPair + 1.
template <class T, int kPair>
__device__ inline uint32_t ternary_pair(TernaryPlanes planes) {
  return flip_pair<kPair>(code_pair<T, 1, kPair>(planes.nonzero), planes.negative);
}

// trit - 1 for trit kTrit of bytes 2 kHalf and 2 kHalf + 1 of a word.
template <class T, int kTrit, int kHalf>
__device__ inline uint32_t trit_pair(uint32_t word) {
  constexpr uint32_t kPowers[kTritsPerByte] = {1, 3, 9, 27, 81}, kPower = kPowers[kTrit];
  const uint32_t bytes = ptx::prmt(word, 0, kHalf ? 0x4342 : 0x4140);
  const uint32_t digits = 3 * (bytes * kPower & 0x00ff00ffu);  // no carry between the lanes: 255 * 81 < 2^16
  constexpr int kPlace = PairFormat<T>::kMantissa >= 10 ? 8 : 0;
  return integer_pair<T, 2, kPlace, 1>(digits >> (8 - kPlace));
}

// The e4m3 numbers of bytes kPair and kPair + 2 of a word, as float16. Its exponent has 8 less of bias.
template <int kPair>
__device__ inline uint32_t fp8_pair(uint32_t word) {
  const uint32_t high = kPair == 0 ? word << 8 : word;
  const uint32_t number = ptx::lop3<(ptx::kA & ptx::kB) | ptx::kC>(high, kPairSigns, high >> 1 & 0x3f803f80u);
  return ptx::fma_pair<__half>(number, pair_of<__half>(8), 0);
}

}  // namespace vtk
