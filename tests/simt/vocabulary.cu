// Small kernels whose results tests/simt/test_simt.py computes itself: the emulation's own semantics.
#include <cooperative_groups.h>

#include "device/launch.h"
#include "device/ptx.cuh"

namespace cg = cooperative_groups;
namespace ptx = vtk::ptx;

#define EXPORT extern "C" __attribute__((visibility("default"))) const char*

template <class... Args>
static const char* run(void (*kernel)(Args...), vtk::LaunchShape shape, Args... args) {
  cudaError_t error = vtk::launch(kernel, shape, nullptr, args...);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

// out [16, 32]: one row an intrinsic.
__global__ void warp_kernel(const int* in, int* out, int width) {
  const unsigned all = 0xffffffffu;
  const int lane = threadIdx.x, x = in[lane];
  int row = 0;
  auto put = [&](int value) { out[32 * row++ + lane] = value; };
  put(__shfl_sync(all, x, lane + 3, width));
  put(__shfl_up_sync(all, x, 3, width));
  put(__shfl_down_sync(all, x, 3, width));
  put(__shfl_xor_sync(all, x, 5, width));
  put(__ballot_sync(all, x & 1));
  put(__any_sync(all, x == 7));
  put(__all_sync(all, x < 100));
  put(__match_any_sync(all, x % 5));
  put(__reduce_add_sync(all, x));
  put(__reduce_min_sync(all, x - 50));
  put(__reduce_max_sync(all, static_cast<unsigned>(x - 50)));
  put(__reduce_xor_sync(all, static_cast<unsigned>(x)));
  // Half warps apart, at the same time.
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  put(lane < 16 ? __reduce_add_sync(half, x) : __reduce_max_sync(half, x));
  put(static_cast<int>(__shfl_xor_sync(all, static_cast<double>(x), 1) * 2));
  put(static_cast<int>(__byte_perm(0x33221100u, 0x77665544u, 0x7051 + lane % 4)));
  put(static_cast<int>(__brev(x)) + __clz(x) + __ffs(x) + __popc(x));
}
EXPORT vocabulary_warp(const int* in, int* out, int width) {
  return run(warp_kernel, {.grid = dim3(1), .block = dim3(32)}, in, out, width);
}

// A grid barrier by hand: the last block to come resets the counter. out [blocks]: the sum over all blocks' values.
__global__ void grid_barrier_kernel(unsigned* counter, int* values, int* out) {
  __shared__ int total;
  if (threadIdx.x == 0) {
    values[blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
    __threadfence();
    atomicAdd(counter, 1u);
    while (*static_cast<volatile unsigned*>(counter) < gridDim.x) __nanosleep(20);
    total = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) total += values[b];
  }
  __syncthreads();
  if (threadIdx.x == blockDim.x - 1) out[blockIdx.x] = total;
}
EXPORT vocabulary_grid_barrier(unsigned* counter, int* values, int* out, int blocks, int cooperative) {
  return run(grid_barrier_kernel, {.grid = dim3(blocks), .block = dim3(64), .cooperative = cooperative != 0}, counter,
             values, out);
}

// Each block of a cluster of 4 reads the next block's static and dynamic shared memory. out [blocks, 32].
__global__ void cluster_kernel(int* out, int synced) {
  VTK_DYNAMIC_SHARED(dynamic_shared);
  __shared__ int own[32];
  int* sOther = reinterpret_cast<int*>(dynamic_shared);
  cg::cluster_group cluster = cg::this_cluster();
  own[threadIdx.x] = static_cast<int>(100 * blockIdx.x + threadIdx.x);
  sOther[threadIdx.x] = 7;
  if (synced) cluster.sync();
  const unsigned next = (cluster.block_rank() + 1) % cluster.num_blocks();
  const int value =
      cluster.map_shared_rank(own, next)[threadIdx.x] + cluster.map_shared_rank(sOther, next)[threadIdx.x];
  cluster.sync();  // nobody leaves while its memory is read
  out[32 * blockIdx.x + threadIdx.x] = value;
}
EXPORT vocabulary_cluster(int* out, int synced) {
  return run(cluster_kernel, {.grid = dim3(8), .block = dim3(32), .shared_bytes = 128, .cluster = 4}, out, synced);
}

// Tiles, atomics, votes of the block and named barriers. out [8].
__global__ void block_kernel(int* out) {
  __shared__ int sums[4];
  __shared__ unsigned long long wide;
  __shared__ int handed;
  const int t = threadIdx.x;
  auto tile = cg::tiled_partition<16>(cg::this_thread_block());
  int x = t;
  for (int delta = 8; delta > 0; delta /= 2) x += tile.shfl_down(x, delta);
  if (tile.thread_rank() == 0) sums[tile.meta_group_rank()] = x;
  if (t == 0) wide = 1;
  const int even = __syncthreads_count(t % 2 == 0);
  atomicAdd(&wide, 1ull << 32);
  const int any = __syncthreads_or(t == 63), all = __syncthreads_and(t < 63);
  // Warp 0 hands a value to warp 1.
  if (t < 32) {
    if (t == 5) handed = 42;
    ptx::named_barrier_arrive(3, 64);
  } else {
    ptx::named_barrier_sync(3, 64);
    if (t == 40) out[7] = handed;
  }
  if (t == 0) {
    out[0] = sums[0] + sums[1] + sums[2] + sums[3];
    out[1] = even;
    out[2] = any;
    out[3] = all;
    out[4] = static_cast<int>(wide >> 32);
    out[5] = atomicCAS(&out[6], -1, 9);
  }
}
EXPORT vocabulary_block(int* out) { return run(block_kernel, {.grid = dim3(1), .block = dim3(64)}, out); }
