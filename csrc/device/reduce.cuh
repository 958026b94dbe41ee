// Reductions and scans over the lanes of a warp and the threads of a one-dimensional block. Operands are combined in
// an order that the width alone decides, so a floating-point sum has the same bits in every run.
//
// The place of a maximum: reduce ranks (device/order_key.cuh) by Max; among equal keys the lower index wins.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace vtk {

inline constexpr unsigned kAllLanes = 0xffffffffu;

// Operators are commutative, so that both partners of an exchange get the same bits.
struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {  // a NaN loses against a number
  template <class T>
  __device__ T operator()(T a, T b) const {
    return max(a, b);
  }
};
struct Min {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return min(a, b);
  }
};

// The value of the lane whose number differs in the bits of `lanes`. A struct brings its own overload.
template <class T>
__device__ inline T shuffle_xor(T x, int lanes) {
  return __shfl_xor_sync(kAllLanes, x, lanes);
}

// Over kLanes lanes that stand kStride apart; every one of them gets the result. All lanes of the warp call it. With
// the fragments of an mma, <4> reduces along a row and <8, 4> along a column.
template <int kLanes = 32, int kStride = 1, class T, class Op>
__device__ inline T warp_reduce(T x, const Op& op) {
  static_assert(kLanes >= 1 && kLanes * kStride <= 32 && (kLanes & (kLanes - 1)) == 0 &&
                (kStride & (kStride - 1)) == 0);
#pragma unroll
  for (int lanes = kLanes / 2 * kStride; lanes >= kStride; lanes /= 2) x = op(x, shuffle_xor(x, lanes));
  return x;
}

// The sum up to and including this lane.
template <class T>
__device__ inline T warp_inclusive_sum(T x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const T other = __shfl_up_sync(kAllLanes, x, delta);
    if (lane >= delta) x += other;
  }
  return x;
}

// Over the kThreads threads of the block; every thread gets the result. sWarps [kThreads / 32] may be used again at
// once by the next call, but by nobody else without a barrier.
template <int kThreads, class T, class Op>
__device__ inline T block_reduce(T x, const Op& op, T* sWarps) {
  constexpr int kWarps = kThreads / 32;
  static_assert(kThreads % 32 == 0 && kWarps <= 32 && (kWarps & (kWarps - 1)) == 0);
  x = warp_reduce(x, op);
  __syncthreads();  // the readers of the call before are done
  if (threadIdx.x % 32 == 0) sWarps[threadIdx.x / 32] = x;
  __syncthreads();
  x = sWarps[threadIdx.x % kWarps];
  return warp_reduce<kWarps>(x, op);
}

template <class T>
struct Prefix {
  T before;  // the sum over the threads before this one
  T total;   // and over all
};

// As block_reduce.
template <int kThreads, class T>
__device__ inline Prefix<T> block_prefix(T x, T* sWarps) {
  constexpr int kWarps = kThreads / 32;
  static_assert(kThreads % 32 == 0 && kWarps <= 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const T through = warp_inclusive_sum(x);
  T before = __shfl_up_sync(kAllLanes, through, 1);
  if (lane == 0) before = T{};
  __syncthreads();  // the readers of the call before are done
  if (lane == 31) sWarps[warp] = through;
  __syncthreads();
  T warps_before = T{}, total = T{};
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) warps_before = total;
    total += sWarps[w];
  }
  return {warps_before + before, total};
}

}  // namespace vtk
