// The part of cooperative groups that kernels here use: the block, tiles of a warp, the cluster and the grid.
#pragma once
#include <cuda_runtime.h>

namespace cooperative_groups {

struct thread_block {
  void sync(SIMT_SITE) const { __syncthreads(site); }
  unsigned thread_rank() const { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
  unsigned size() const { return blockDim.x * blockDim.y * blockDim.z; }
  unsigned num_threads() const { return size(); }
  dim3 group_index() const { return blockIdx; }
  dim3 thread_index() const { return threadIdx; }
};
inline thread_block this_thread_block() { return {}; }

template <unsigned Size>
struct thread_block_tile {
  static_assert(Size >= 1 && Size <= 32 && (Size & (Size - 1)) == 0, "tiles lie within a warp");
  static unsigned linear() { return this_thread_block().thread_rank(); }
  static unsigned mask() { return Size == 32 ? 0xffffffffu : ((1u << Size) - 1) << (linear() % 32 / Size * Size); }
  unsigned thread_rank() const { return linear() % Size; }
  unsigned meta_group_rank() const { return linear() / Size; }
  unsigned meta_group_size() const { return (this_thread_block().size() + Size - 1) / Size; }
  static constexpr unsigned size() { return Size; }
  static constexpr unsigned num_threads() { return Size; }
  void sync(SIMT_SITE) const { __syncwarp(mask(), site); }
  template <class T>
  T shfl(T x, int rank, SIMT_SITE) const {
    return __shfl_sync(mask(), x, rank, Size, site);
  }
  template <class T>
  T shfl_up(T x, unsigned delta, SIMT_SITE) const {
    return __shfl_up_sync(mask(), x, delta, Size, site);
  }
  template <class T>
  T shfl_down(T x, unsigned delta, SIMT_SITE) const {
    return __shfl_down_sync(mask(), x, delta, Size, site);
  }
  template <class T>
  T shfl_xor(T x, unsigned m, SIMT_SITE) const {
    return __shfl_xor_sync(mask(), x, static_cast<int>(m), Size, site);
  }
  int any(int x, SIMT_SITE) const { return __any_sync(mask(), x, site); }
  int all(int x, SIMT_SITE) const { return __all_sync(mask(), x, site); }
  unsigned ballot(int x, SIMT_SITE) const { return __ballot_sync(mask(), x, site) >> (linear() % 32 / Size * Size); }
};
template <unsigned Size>
inline thread_block_tile<Size> tiled_partition(const thread_block&) {
  return {};
}

struct grid_group {
  void sync(SIMT_SITE) const { simt::resident_barrier("grid.sync", site); }
  unsigned long long size() const { return 1ull * gridDim.x * gridDim.y * gridDim.z * this_thread_block().size(); }
  unsigned long long thread_rank() const {
    return (blockIdx.x + 1ull * gridDim.x * (blockIdx.y + 1ull * gridDim.y * blockIdx.z)) * this_thread_block().size() +
           this_thread_block().thread_rank();
  }
};
inline grid_group this_grid() { return {}; }

struct cluster_group {
  void sync(SIMT_SITE) const { simt::resident_barrier("cluster.sync", site); }
  unsigned block_rank() const { return simt::block_rank(); }
  unsigned num_blocks() const { return simt::cluster_size(); }
  template <class T>
  T* map_shared_rank(T* address, unsigned rank) const {
    return static_cast<T*>(simt::map_shared_rank(address, rank));
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
