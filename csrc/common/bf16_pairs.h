// Products of bfloat16 in pairs: the sum of two products is added to a float, as VDPBF16PS does in one instruction.
// Include only from *_cpu.cpp files.
//
// Products of bfloat16 are exact in float32, so the sum is all that rounds: to nearest even, the second product first.
// The instruction takes denormal inputs and makes denormal sums zero; the code for other processors, which is there to
// test the kernels, does not.
#pragma once
#include "common/narrow.h"

namespace vtk {
namespace VTK_ISA {

struct Bf16Pair {
  uint32_t bits;  // the first in the low half
};
struct Bf16Pairs {
  u32v bits;  // a pair a lane
};

static inline Bf16Pairs load(const Bf16Pair* p) {
  Bf16Pairs pairs;
  std::memcpy(&pairs, p, sizeof pairs);
  return pairs;
}
static inline void store(Bf16Pair* p, Bf16Pairs pairs) { std::memcpy(p, &pairs, sizeof pairs); }

static inline Bf16Pair pair_of(bf16 first, bf16 second) {
  return {first.bits | static_cast<uint32_t>(second.bits) << 16};
}

// A pair a lane of elements of two arrays.
static inline Bf16Pairs load_pairs(const bf16* first, const bf16* second) {
  u16v low, high;
  std::memcpy(&low, first, sizeof low);
  std::memcpy(&high, second, sizeof high);
  return {__builtin_convertvector(low, u32v) | __builtin_convertvector(high, u32v) << 16};
}

// Rounded to nearest even.
static inline Bf16Pairs pairs_of(f32v first, f32v second) {
#if defined(__AVX512BF16__)
  const auto bits = [](f32v v) { return __builtin_convertvector((u16v)_mm512_cvtneps_pbh((__m512)v), u32v); };
#else
  const auto bits = [](f32v v) { return bf16_bits(v); };
#endif
  return {bits(first) | bits(second) << 16};
}

static inline void multiply_add(f32v& sum, Bf16Pair a, Bf16Pairs b) {
  const u32v pair = a.bits + u32v{};
#if defined(__AVX512BF16__)
  sum = (f32v)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pair, (__m512bh)b.bits);
#else
  sum += (f32v)(pair & 0xffff0000u) * (f32v)(b.bits & 0xffff0000u);
  sum += (f32v)(pair << 16) * (f32v)(b.bits << 16);
#endif
}

}  // namespace VTK_ISA
}  // namespace vtk
