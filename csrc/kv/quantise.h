// One group of values to a scale, a zero and codes, and back; the definition for all kernels. Every step is one IEEE
// float32 operation in a fixed order, so that processors, compilers and the reference agree in every bit.
//
//   int       x = s c + z        z = low rounded down, s = (high - z) / most rounded up: |error| <= s / 2
//   fp8       x = s e4m3(c)      s = max|x| / 448 rounded up
//   ternary   x = s (c - 1)      codes away from 1 where |x| > threshold * mean|x|; s = the mean of |x| there
//   sign      x = s (1 - 2 c)    s = mean|x|
//
// s and z are float16 and codes are chosen for the rounded ones. A group with a NaN or an infinity has s = NaN.
#pragma once
#include <cstdint>
#include <cstring>

#include "kv/page.h"

namespace vtk {

inline constexpr uint16_t kHalfNaN = 0x7e00u;
inline constexpr float kHalfMost = 65504.0f;
inline constexpr float kFp8Most = 448.0f;

// ---- Arithmetic of a float or of a vector of floats F, and of the unsigned integers I of the same width ----

template <class F>
VTK_HOST_DEVICE inline F constant(float x) {
  return F{} + x;
}

template <class To, class From>
VTK_HOST_DEVICE inline To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  memcpy(&out, &x, sizeof out);
  return out;
}

template <class F>
VTK_HOST_DEVICE inline F magnitude(F x) {
  return x < 0.0f ? -x : x;
}

// 0 <= x < 2^22, ties to even.
template <class I, class F>
VTK_HOST_DEVICE inline I nearest_integer(F x) {
  return bits_as<I>(x + 0x1p23f) - 0x4b000000u;
}

template <class F, class I>
VTK_HOST_DEVICE inline F float_of(I x) {  // x < 2^23
  return bits_as<F>(x | 0x4b000000u) - 0x1p23f;
}

// e4m3 (4 bits of exponent, bias 7, 3 of mantissa) nearest to 0 <= x <= 448, ties to even.
template <class I, class F>
VTK_HOST_DEVICE inline I fp8_of(F x) {
  const I bits = bits_as<I>(x);
  const I normal = ((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3);
  const I denormal = bits_as<I>(x + 0x1p14f) - 0x46800000u;  // in units of 2^-9
  return x < 0x1p-6f ? denormal : normal;
}

template <class F, class I>
VTK_HOST_DEVICE inline F fp8_value(I code) {
  const I bits = code & 127u;
  return bits < 8u ? float_of<F>(bits) * 0x1p-9f : bits_as<F>((bits << 20) + (120u << 23));
}

// ---- A group's scale and zero ----

template <class F>
struct KvStatistics {
  F low, high, sum, kept, count;  // sum and kept: of magnitudes
  F poison;                       // 0, or NaN once a value was not finite
};

template <class F>
VTK_HOST_DEVICE inline KvStatistics<F> begin_statistics(F first) {
  const F zero = constant<F>(0.0f);
  return {first, first, zero, zero, zero, zero};
}

template <class F>
VTK_HOST_DEVICE inline void observe(KvStatistics<F>& stats, F x) {
  stats.low = x < stats.low ? x : stats.low;
  stats.high = x > stats.high ? x : stats.high;
  stats.sum = stats.sum + magnitude(x);
  stats.poison = stats.poison + (x - x);
}

// The second pass of ternary: the values beyond the limit.
template <class F>
VTK_HOST_DEVICE inline void observe_kept(KvStatistics<F>& stats, F x, F limit) {
  const F a = magnitude(x);
  stats.kept = a > limit ? stats.kept + a : stats.kept;
  stats.count = a > limit ? stats.count + 1.0f : stats.count;
}

struct KvMeta {
  uint16_t scale, zero;  // float16
};

// Half converts: from(float), to nearest even, and to(uint16_t).
template <class Half>
VTK_HOST_DEVICE inline uint16_t half_down(float x) {
  x = x < -kHalfMost ? -kHalfMost : x > kHalfMost ? kHalfMost : x;
  const uint16_t bits = Half::from(x + 0.0f);  // +0 for -0
  if (!(Half::to(bits) > x)) return bits;
  if ((bits & 0x7fffu) == 0) return 0x8001u;
  return static_cast<uint16_t>((bits & 0x8000u) != 0 ? bits + 1 : bits - 1);
}

template <class Half>
VTK_HOST_DEVICE inline uint16_t half_up(float x) {  // x >= 0
  if (!(x < kHalfMost)) return 0x7bffu;
  const uint16_t bits = Half::from(x + 0.0f);
  return static_cast<uint16_t>(Half::to(bits) < x ? bits + 1 : bits);
}

template <class Half>
VTK_HOST_DEVICE inline KvMeta meta_of(KvScheme scheme, const KvStatistics<float>& stats, float group) {
  if (stats.poison != stats.poison) return {kHalfNaN, kHalfNaN};
  if (largest_code(scheme) > 0) {
    const uint16_t zero = half_down<Half>(stats.low);
    return {half_up<Half>((stats.high - Half::to(zero)) / static_cast<float>(largest_code(scheme))), zero};
  }
  if (scheme == KvScheme::kFp8) {
    const float top = stats.high > -stats.low ? stats.high : -stats.low;
    return {half_up<Half>(top / kFp8Most), 0};
  }
  float scale = stats.sum / group;
  if (scheme != KvScheme::kSign) scale = stats.count > 0.0f ? stats.kept / stats.count : 0.0f;
  return {Half::from(scale < kHalfMost ? scale : kHalfMost), 0};
}

// ---- Codes and values ----

template <class I, class F>
VTK_HOST_DEVICE inline I kv_code(KvScheme scheme, F x, F scale, F zero, F limit) {
  const F none = constant<F>(0.0f), one = constant<F>(1.0f);
  if (scheme == KvScheme::kSign) return nearest_integer<I>(x < 0.0f ? one : none);
  if (scheme == KvScheme::kTernary || scheme == KvScheme::kTernary5)
    return nearest_integer<I>(x > limit ? one + 1.0f : (x < -limit ? none : one));
  if (scheme == KvScheme::kFp8) {
    F y = scale > 0.0f ? magnitude(x) / scale : none;
    y = y < kFp8Most ? y : constant<F>(kFp8Most);
    return fp8_of<I>(y) | (nearest_integer<I>(x < 0.0f ? one : none) << 7);
  }
  const float most = static_cast<float>(largest_code(scheme));
  F y = scale > 0.0f ? (x - zero) / scale : none;
  y = y > 0.0f ? y : none;
  y = y < most ? y : constant<F>(most);
  return nearest_integer<I>(y);
}

// What the scale multiplies.
template <class F, class I>
VTK_HOST_DEVICE inline F kv_digit(KvScheme scheme, I code) {
  if (scheme == KvScheme::kSign) return 1.0f - 2.0f * float_of<F>(code);
  if (scheme == KvScheme::kTernary || scheme == KvScheme::kTernary5) return float_of<F>(code) - 1.0f;
  if (scheme != KvScheme::kFp8) return float_of<F>(code);
  const F x = fp8_value<F>(code);
  return (code & 128u) != 0u ? -x : x;
}

// ---- The transform of a mix ----

// An orthonormal, symmetric matrix for any number of channels: Hadamard matrices of the powers of two that sum up to
// it, largest first, along the diagonal. Additions alone, in a fixed order: the bits are the same everywhere, which a
// cosine transform would not give.
VTK_HOST_DEVICE constexpr int32_t hadamard_block(int32_t count) {
  int32_t block = 1;
  while (2 * block <= count) block *= 2;
  return block;
}

// block^-1/2
VTK_HOST_DEVICE inline float hadamard_norm(int32_t block) {
  float norm = 1.0f;
  for (; block >= 4; block /= 4) norm *= 0.5f;
  return block == 2 ? norm * 0.70710678f : norm;
}

}  // namespace vtk
