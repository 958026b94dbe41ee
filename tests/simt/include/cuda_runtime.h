// Takes the place of the toolkit's cuda_runtime.h when a .cu file is compiled for the host (this folder comes first
// on the include path). Types and the declarations of the runtime API are the toolkit's; the keywords, built-in
// variables and intrinsics are here, as far as our kernels use them.
#pragma once
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "simt.h"

// ---- Keywords ----

#undef __host__
#undef __device__
#undef __global__
#undef __constant__
#undef __shared__
#undef __launch_bounds__
#undef __maxnreg__
#undef __grid_constant__
#undef __forceinline__
#define __host__
#define __device__
// NOTE: flatten, because g++ leaves the write of `place = call()` out of its instrumentation when a struct is returned.
#define __global__ __attribute__((flatten))
#define __constant__
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))

#define SIMT_JOIN_(a, b) a##b
#define SIMT_JOIN(a, b) SIMT_JOIN_(a, b)
// Thread-local, because a launch runs on a thread of its own: the emulator finds, poisons and checks the library's
// thread-local block as a whole. The redzone ends up next to the object; both are found through the symbol table.
#define __shared__                                                                                                \
  [[gnu::used]] static thread_local unsigned char SIMT_JOIN(simt_redzone_, __COUNTER__)[32] [[gnu::aligned(16)]]; \
  static thread_local
#define VTK_DYNAMIC_SHARED(name) unsigned char* name = ::simt::dynamic_shared()

// Constant for the thread that reads them; the scheduler sets them at every switch.
#pragma GCC visibility push(hidden)
extern const uint3 threadIdx, blockIdx;
extern const dim3 blockDim, gridDim;
#pragma GCC visibility pop
inline constexpr int warpSize = 32;

#define SIMT_SITE ::simt::Site site = {__builtin_FILE(), __builtin_LINE()}

// ---- Barriers and fences ----

inline void __syncthreads(SIMT_SITE) { simt::block_barrier(simt::BlockOp::kSync, 0, site); }
inline int __syncthreads_and(int x, SIMT_SITE) { return simt::block_barrier(simt::BlockOp::kAnd, x, site); }
inline int __syncthreads_or(int x, SIMT_SITE) { return simt::block_barrier(simt::BlockOp::kOr, x, site); }
inline int __syncthreads_count(int x, SIMT_SITE) { return simt::block_barrier(simt::BlockOp::kCount, x, site); }
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_SITE) {
  simt::warp_rendezvous(simt::WarpOp::kSync, mask, 0, 0, 32, site);
}
inline void simt_fence(simt::Site site) {
  simt::fence();
  simt::yield(site);
}
inline void __threadfence_block(SIMT_SITE) { simt_fence(site); }
inline void __threadfence(SIMT_SITE) { simt_fence(site); }
inline void __threadfence_system(SIMT_SITE) { simt_fence(site); }
inline void __nanosleep(unsigned, SIMT_SITE) { simt::yield(site); }

// ---- Warp operations ----

namespace simt {

template <class T>
inline uint64_t to_bits(T x) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  return bits;
}

template <class T>
inline T from_bits(uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}

template <class T>
inline T shuffle(WarpOp op, unsigned mask, T x, int argument, int width, Site site) {
  return from_bits<T>(warp_rendezvous(op, mask, to_bits(x), argument, width, site));
}

inline uint32_t vote(WarpOp op, unsigned mask, uint64_t x, Site site) {
  return static_cast<uint32_t>(warp_rendezvous(op, mask, x, 0, 32, site));
}

}  // namespace simt

template <class T>
inline T __shfl_sync(unsigned mask, T x, int lane, int width = 32, SIMT_SITE) {
  return simt::shuffle(simt::WarpOp::kShuffle, mask, x, lane, width, site);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T x, unsigned delta, int width = 32, SIMT_SITE) {
  return simt::shuffle(simt::WarpOp::kShuffleUp, mask, x, static_cast<int>(delta), width, site);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T x, unsigned delta, int width = 32, SIMT_SITE) {
  return simt::shuffle(simt::WarpOp::kShuffleDown, mask, x, static_cast<int>(delta), width, site);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T x, int lane_mask, int width = 32, SIMT_SITE) {
  return simt::shuffle(simt::WarpOp::kShuffleXor, mask, x, lane_mask, width, site);
}

inline unsigned __ballot_sync(unsigned mask, int x, SIMT_SITE) {
  return simt::vote(simt::WarpOp::kBallot, mask, x != 0, site);
}
inline int __any_sync(unsigned mask, int x, SIMT_SITE) {
  return static_cast<int>(simt::vote(simt::WarpOp::kAny, mask, x != 0, site));
}
inline int __all_sync(unsigned mask, int x, SIMT_SITE) {
  return static_cast<int>(simt::vote(simt::WarpOp::kAll, mask, x != 0, site));
}
template <class T>
inline unsigned __match_any_sync(unsigned mask, T x, SIMT_SITE) {
  return simt::vote(simt::WarpOp::kMatchAny, mask, simt::to_bits(x), site);
}
template <class T>
inline unsigned __match_all_sync(unsigned mask, T x, int* all, SIMT_SITE) {
  unsigned members = simt::vote(simt::WarpOp::kMatchAll, mask, simt::to_bits(x), site);
  *all = members != 0;
  return members;
}

#define SIMT_REDUCE(name, type, op)                                                               \
  inline type name(unsigned mask, type x, SIMT_SITE) {                                            \
    return static_cast<type>(simt::vote(simt::WarpOp::op, mask, static_cast<uint32_t>(x), site)); \
  }
SIMT_REDUCE(__reduce_add_sync, unsigned, kAdd)
SIMT_REDUCE(__reduce_add_sync, int, kAdd)
SIMT_REDUCE(__reduce_min_sync, unsigned, kMinUnsigned)
SIMT_REDUCE(__reduce_min_sync, int, kMinSigned)
SIMT_REDUCE(__reduce_max_sync, unsigned, kMaxUnsigned)
SIMT_REDUCE(__reduce_max_sync, int, kMaxSigned)
SIMT_REDUCE(__reduce_and_sync, unsigned, kAnd)
SIMT_REDUCE(__reduce_or_sync, unsigned, kOr)
SIMT_REDUCE(__reduce_xor_sync, unsigned, kXor)
#undef SIMT_REDUCE

// ---- Atomics: one operating-system thread runs them all, so the plain operation is atomic ----

namespace simt {

template <class T, class Update>
__attribute__((no_sanitize("thread"))) inline T atomic(T* address, const Update& update) {
  atomic_access(address, sizeof(T));
  T old = *address;
  *address = update(old);
  return old;
}

}  // namespace simt

#define SIMT_ATOMIC(name, expression)                                     \
  template <class T>                                                      \
  inline T name(T* address, std::type_identity_t<T> x) {                  \
    return simt::atomic(address, [=](T old) -> T { return expression; }); \
  }
SIMT_ATOMIC(atomicAdd, old + x)
SIMT_ATOMIC(atomicSub, old - x)
SIMT_ATOMIC(atomicMax, old > x ? old : x)
SIMT_ATOMIC(atomicMin, old < x ? old : x)
SIMT_ATOMIC(atomicAnd, old& x)
SIMT_ATOMIC(atomicOr, old | x)
SIMT_ATOMIC(atomicXor, old ^ x)
SIMT_ATOMIC(atomicExch, (static_cast<void>(old), x))
SIMT_ATOMIC(atomicInc, old >= x ? 0 : old + 1)
#undef SIMT_ATOMIC
template <class T>
inline T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> x) {
  return simt::atomic(address, [=](T old) -> T { return old == compare ? x : old; });
}

// ---- Bits and arithmetic ----

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned out = 0;
  for (int i = 0; i < 32; ++i) out |= (x >> i & 1u) << (31 - i);
  return out;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = selector >> (4 * i);
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (nibble & 7))) & 0xffu;
    if (nibble & 8) byte = byte & 0x80u ? 0xffu : 0u;
    out |= byte << (8 * i);
  }
  return out;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __saturatef(float x) { return x > 0.0f ? std::min(x, 1.0f) : 0.0f; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

template <class T>
inline T __ldg(const T* address) {
  return *address;
}

// As in CUDA: mixed types follow the usual conversions, and a NaN loses.
#define SIMT_MIN_MAX(type)                                  \
  inline type min(type a, type b) { return b < a ? b : a; } \
  inline type max(type a, type b) { return a < b ? b : a; }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
#undef SIMT_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

// ---- The C++ half of the runtime API that launchers call ----

namespace simt {

// Each thread gets its own copy of the arguments, as each CUDA thread does.
template <class... Expected>
struct Call {
  void (*kernel)(Expected...);
  std::tuple<std::decay_t<Expected>...> arguments;
  static void invoke(void* self) {
    Call* call = static_cast<Call*>(self);
    std::apply(call->kernel, call->arguments);
  }
};

}  // namespace simt

template <class... Expected, class... Actual>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... args) {
  simt::Call<Expected...> call{kernel, {std::forward<Actual>(args)...}};
  return simt::launch(*config, reinterpret_cast<const void*>(kernel), &call.invoke, &call);
}
template <class... Args>
inline cudaError_t cudaFuncSetAttribute(void (*kernel)(Args...), cudaFuncAttribute attribute, int value) {
  return simt::allow_shared(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <class... Args>
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Args...), int threads,
                                                                 size_t shared_bytes) {
  *blocks = simt::blocks_per_multiprocessor(threads, shared_bytes);
  return cudaSuccess;
}
