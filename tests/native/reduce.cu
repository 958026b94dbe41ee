// Reductions and scans of a warp and of a block.
#include "device/reduce.cuh"

#include "device/launch.h"
#include "native.h"

namespace vtk::native {
namespace {

template <class T, class Op, int kLanes, int kStride>
__global__ void warp_reduce_kernel(const T* x, T* out) {
  out[threadIdx.x] = vtk::warp_reduce<kLanes, kStride>(x[threadIdx.x], Op{});
}

// Three times over the same scratch: as it comes, with the threads turned around, and as it comes again.
template <class T, class Op, int kThreads>
__global__ void block_reduce_kernel(const T* x, T* out) {
  __shared__ T sWarps[kThreads / 32];
  const int t = threadIdx.x;
  const T first = vtk::block_reduce<kThreads>(x[t], Op{}, sWarps);
  vtk::block_reduce<kThreads>(x[kThreads - 1 - t], Op{}, sWarps);
  const T again = vtk::block_reduce<kThreads>(x[t], Op{}, sWarps);
  out[t] = first;
  out[kThreads + t] = again;
}

template <class T, int kThreads>
__global__ void block_prefix_kernel(const T* x, T* before, T* total) {
  __shared__ T sWarps[kThreads / 32];
  const int t = threadIdx.x;
  vtk::block_prefix<kThreads>(x[kThreads - 1 - t], sWarps);  // leaves something in the scratch
  const Prefix<T> prefix = vtk::block_prefix<kThreads>(x[t], sWarps);
  before[t] = prefix.before;
  total[t] = prefix.total;
}

template <class T, class... Args>
cudaError_t run(void (*kernel)(const T*, Args...), int32_t threads, const T* x, Args... args) {
  LaunchShape shape;
  shape.grid = dim3(1);
  shape.block = dim3(static_cast<unsigned>(threads));
  return launch(kernel, shape, nullptr, x, args...);
}

template <class T, class Op>
cudaError_t warp_reduce_by(const T* x, int32_t lanes, int32_t stride, T* out) {
  if (lanes == 32) return run(warp_reduce_kernel<T, Op, 32, 1>, 32, x, out);
  if (lanes == 4 && stride == 1) return run(warp_reduce_kernel<T, Op, 4, 1>, 32, x, out);
  if (lanes == 8 && stride == 4) return run(warp_reduce_kernel<T, Op, 8, 4>, 32, x, out);
  if (lanes == 1) return run(warp_reduce_kernel<T, Op, 1, 1>, 32, x, out);
  return cudaErrorInvalidValue;
}

template <class T, class Op>
cudaError_t block_reduce_by(const T* x, int32_t threads, T* out) {
  switch (threads) {
    case 32: return run(block_reduce_kernel<T, Op, 32>, threads, x, out);
    case 64: return run(block_reduce_kernel<T, Op, 64>, threads, x, out);
    case 256: return run(block_reduce_kernel<T, Op, 256>, threads, x, out);
    case 1024: return run(block_reduce_kernel<T, Op, 1024>, threads, x, out);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

template <class T>
cudaError_t warp_reduce(const T* x, int32_t op, int32_t lanes, int32_t stride, T* out) {
  switch (op) {
    case 0: return warp_reduce_by<T, Sum>(x, lanes, stride, out);
    case 1: return warp_reduce_by<T, Max>(x, lanes, stride, out);
    default: return warp_reduce_by<T, Min>(x, lanes, stride, out);
  }
}

template <class T>
cudaError_t block_reduce(const T* x, int32_t threads, int32_t op, T* out) {
  switch (op) {
    case 0: return block_reduce_by<T, Sum>(x, threads, out);
    case 1: return block_reduce_by<T, Max>(x, threads, out);
    default: return block_reduce_by<T, Min>(x, threads, out);
  }
}

template <class T>
cudaError_t block_prefix(const T* x, int32_t threads, T* before, T* total) {
  switch (threads) {
    case 32: return run(block_prefix_kernel<T, 32>, threads, x, before, total);
    case 96: return run(block_prefix_kernel<T, 96>, threads, x, before, total);
    case 1024: return run(block_prefix_kernel<T, 1024>, threads, x, before, total);
    default: return cudaErrorInvalidValue;
  }
}

#define VTK_INSTANTIATE(T)                                                      \
  template cudaError_t warp_reduce<T>(const T*, int32_t, int32_t, int32_t, T*); \
  template cudaError_t block_reduce<T>(const T*, int32_t, int32_t, T*);         \
  template cudaError_t block_prefix<T>(const T*, int32_t, T*, T*);
VTK_INSTANTIATE(float)
VTK_INSTANTIATE(int32_t)

}  // namespace vtk::native
