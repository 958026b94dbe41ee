// cluster_kmedoids on CUDA: one persistent launch, seeds, iterations and the stop decided on the device.
//
//   grid    groups x blocks; a group serves batch items group, group + groups, ...; all blocks are resident
//   block   512 threads own a contiguous slice of tokens, one warp a token, one warp a distance
//   seed    a grid barrier a medoid: every block offers its farthest token, all agree
//   iterate three barriers: nearest medoids; sums of distances in the cluster, of which each cluster keeps the smallest
//           by an integer maximum; block 0 moves the medoids and decides whether to stop
//
// Sums run over the tokens in ascending order, a sum of movements over the medoids; no float atomics. Nothing depends
// on the number of blocks.
//
//   shared  16 ranks and 16 counts, 192 bytes
//   bound   L2: K N rows a seeding and an iteration, and the squares of the cluster sizes; rows are not kept in
//           registers, since a warp reads its own row once a distance from L1
#include "merge/cluster_kmedoids.h"

#include <algorithm>

#include "device/greedy_pick.cuh"
#include "device/launch.h"
#include "device/order_key.cuh"
#include "device/tile.h"
#include "merge/cluster_distance.cuh"

namespace vtk {
namespace {

constexpr float kUnusable = -2.0f, kPicked = -1.0f;  // states in place of a squared distance

using Rank = unsigned long long;

struct SharedMemory {
  Rank ranks[kGreedyWarps];
  int32_t counts[kGreedyWarps];
};

struct Geometry {
  int groups, blocks;  // batch items in work at once, blocks of each
  char* counters;      // [groups] of kBarrierBytes
  Rank* best;          // [groups, K]: of each seed, then of each cluster; zero where nothing was offered
  float* nearest;      // [groups, N]: squared distance to the nearest seed, or a state
  float* moved;        // [groups, K]
  int32_t* cluster;    // [groups, N], -1: not usable
  int32_t* medoids;    // [groups, 2, K]: in the order of the seeds, and ascending
  int32_t* stop;       // [groups]
  int32_t slice;       // tokens of a block
  int64_t zeroed;      // bytes that the launcher clears: counters, best
  int64_t bytes;
};

// One group's view of an item.
template <class T>
struct Item {
  const ClusterKmedoidsParams& p;
  GridBarrier& barrier;
  SharedMemory& shared;
  const bool leads;             // block 0 of the group
  const int32_t b, begin, end;  // the item, the slice
  Rank* best;
  float *nearest, *moved;
  int32_t *cluster, *medoids, *sorted, *stop;
  int32_t clusters = 0;  // with a medoid

  __device__ Item(const ClusterKmedoidsParams& p, const Geometry& g, GridBarrier& barrier, SharedMemory& shared,
                  int32_t index, int32_t b)
      : p(p),
        barrier(barrier),
        shared(shared),
        leads(blockIdx.x % g.blocks == 0),
        b(b),
        begin(min(static_cast<int32_t>(blockIdx.x % g.blocks) * g.slice, p.tokens.count)),
        end(min(begin + g.slice, p.tokens.count)),
        best(g.best + static_cast<int64_t>(index) * p.clusters),
        nearest(g.nearest + static_cast<int64_t>(index) * p.tokens.count),
        moved(g.moved + static_cast<int64_t>(index) * p.clusters),
        cluster(g.cluster + static_cast<int64_t>(index) * p.tokens.count),
        medoids(g.medoids + static_cast<int64_t>(index) * 2 * p.clusters),
        sorted(medoids + p.clusters),
        stop(g.stop + index) {}

  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int warp() { return threadIdx.x / 32; }
  __device__ float distance(int32_t i, int32_t j) const {
    return warp_squared_distance(token_row<T>(p.tokens, b, i), token_row<T>(p.tokens, b, j), p.tokens.channels);
  }

  // The token that the group offers for seed k, in all threads of all its blocks.
  __device__ int32_t agree(Rank own, int32_t k) {
    own = block_reduce<kGreedyThreads>(own, Max{}, shared.ranks);
    if (threadIdx.x == 0) atomicMax(&best[k], own);
    barrier.wait();
    return index_of(best[k]);
  }

  __device__ void seed() {
    if (p.clusters == 0) return;
    // The largest norm.
    Rank own = 0;
    for (int32_t n = begin + warp(); n < end; n += kGreedyWarps) {
      const float squared = warp_squared_norm(token_row<T>(p.tokens, b, n), p.tokens.channels);
      const bool usable = is_valid(p.tokens, b, n) && squared < kMaxSquaredNorm;
      if (lane() == 0) nearest[n] = usable ? INFINITY : kUnusable;
      if (usable) own = max(own, make_rank(order_key(squared), n));
    }
    int32_t pick = agree(own, 0);
    int32_t usable = 0;
    for (int32_t n = threadIdx.x; n < p.tokens.count; n += kGreedyThreads) usable += nearest[n] != kUnusable;
    clusters = min(p.clusters, block_reduce<kGreedyThreads>(usable, Sum{}, shared.counts));
    barrier.wait();  // everybody has counted

    // Farthest first.
    for (int32_t k = 0; k < clusters; ++k) {
      if (leads && threadIdx.x == 0) medoids[k] = pick;
      if (k + 1 == clusters) break;
      own = 0;
      for (int32_t n = begin + warp(); n < end; n += kGreedyWarps) {
        if (nearest[n] == kUnusable) continue;
        float squared = fminf(nearest[n], distance(n, pick));
        if (n == pick) squared = kPicked;
        __syncwarp();
        if (lane() == 0) nearest[n] = squared;
        own = max(own, make_rank(order_key(squared), n));
      }
      pick = agree(own, k + 1);
    }
    barrier.wait();
    clear_best();
  }

  // Somebody else's barrier comes before the next offer.
  __device__ void clear_best() {
    for (int32_t k = threadIdx.x; leads && k < p.clusters; k += kGreedyThreads) best[k] = 0;
  }

  // The nearest of `list`, the first of equals; a member of the list has itself.
  __device__ int32_t nearest_of(int32_t n, const int32_t* list) const {
    int32_t own = -1;
    float least = 0.0f;
    for (int32_t k = 0; k < clusters; ++k) {
      const float squared = list[k] == n ? -1.0f : distance(n, list[k]);
      if (own >= 0 && squared >= least) continue;
      least = squared;
      own = k;
    }
    return own;
  }

  __device__ void assign() {
    for (int32_t n = begin + warp(); n < end; n += kGreedyWarps) {
      const int32_t own = nearest[n] != kUnusable ? nearest_of(n, medoids) : -1;
      if (lane() == 0) cluster[n] = own;
    }
    barrier.wait();
  }

  // Offers every token of the slice as the center of its cluster.
  __device__ void offer_centers() {
    for (int32_t n = begin + warp(); n < end; n += kGreedyWarps) {
      const int32_t own = cluster[n];
      if (own < 0) continue;
      float cost = 0.0f;
      for (int32_t first = 0; first < p.tokens.count; first += 32) {
        const bool member = first + lane() < p.tokens.count && cluster[first + lane()] == own;
        for (unsigned left = __ballot_sync(kAllLanes, member); left != 0; left &= left - 1)
          cost += __fsqrt_rn(distance(n, first + __ffs(left) - 1));
      }
      if (lane() == 0) atomicMax(&best[own], make_rank(order_key(-cost), n));
    }
    barrier.wait();
  }

  // Block 0 moves the medoids; returns whether to stop.
  __device__ bool move_medoids() {
    if (leads) {
      for (int32_t k = warp(); k < clusters; k += kGreedyWarps) {
        const int32_t center = index_of(best[k]);
        const float shift = __fsqrt_rn(distance(medoids[k], center));
        __syncwarp();
        if (lane() == 0) {
          moved[k] = shift;
          medoids[k] = center;
          best[k] = 0;
        }
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        float total = 0.0f;
        for (int32_t k = 0; k < clusters; ++k) total += moved[k];
        *stop = total < p.tolerance;
      }
    }
    barrier.wait();
    return *stop != 0;
  }

  __device__ void finish() {
    int64_t* gMedoids = p.medoids + static_cast<int64_t>(b) * p.clusters;
    if (leads) {
      // Medoids are distinct: each one's place is the number of smaller ones.
      for (int32_t k = threadIdx.x; k < clusters; k += kGreedyThreads) {
        int32_t place = 0;
        for (int32_t other = 0; other < clusters; ++other) place += medoids[other] < medoids[k];
        sorted[place] = medoids[k];
        gMedoids[place] = medoids[k];
      }
      for (int32_t k = clusters + threadIdx.x; k < p.clusters; k += kGreedyThreads) gMedoids[k] = -1;
    }
    barrier.wait();
    for (int32_t n = begin + warp(); n < end; n += kGreedyWarps) {
      const int32_t own = clusters > 0 && nearest[n] != kUnusable ? nearest_of(n, sorted) : -1;
      if (lane() == 0) p.owner[static_cast<int64_t>(b) * p.tokens.count + n] = own;
    }
    barrier.wait();  // before the next item
  }
};

template <class T>
__global__ void __launch_bounds__(kGreedyThreads, 1)
    cluster_kmedoids_kernel(const __grid_constant__ ClusterKmedoidsParams p, const __grid_constant__ Geometry g) {
  __shared__ SharedMemory shared;
  const int32_t index = blockIdx.x / g.blocks;
  GridBarrier barrier = {reinterpret_cast<unsigned*>(g.counters + index * kBarrierBytes),
                         static_cast<unsigned>(g.blocks)};
  for (int32_t b = index; b < p.tokens.batch; b += g.groups) {
    Item<T> item(p, g, barrier, shared, index, b);
    item.seed();
    for (int64_t i = 0; i < p.iterations && item.clusters > 0; ++i) {
      item.assign();
      item.offer_centers();
      if (item.move_medoids()) break;
    }
    item.finish();
  }
}

Geometry geometry(const ClusterKmedoidsParams& p) {
  Geometry g = {};
  const GreedyShape shape = greedy_shape(p.tokens.batch, ceil_div(p.tokens.count, kGreedyWarps), num_multiprocessors());
  g.groups = shape.groups;
  g.blocks = shape.blocks;
  g.slice = ceil_div(p.tokens.count, shape.blocks);
  char* next = static_cast<char*>(p.workspace);
  auto take = [&](auto*& array, int64_t count) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(next);
    next += round_up<int64_t>(shape.groups * count * sizeof(*array), 16);
  };
  take(g.counters, kBarrierBytes);
  take(g.best, p.clusters);
  g.zeroed = next - static_cast<char*>(p.workspace);
  take(g.nearest, p.tokens.count);
  take(g.moved, p.clusters);
  take(g.cluster, p.tokens.count);
  take(g.medoids, 2 * int64_t{p.clusters});
  take(g.stop, 1);
  g.bytes = next - static_cast<char*>(p.workspace);
  return g;
}

template <class T>
cudaError_t run(const ClusterKmedoidsParams& p, const Geometry& g, cudaStream_t stream) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(g.groups * g.blocks));
  shape.block = dim3(kGreedyThreads);
  shape.cooperative = g.blocks > 1;
  return launch(cluster_kmedoids_kernel<T>, shape, stream, p, g);
}

}  // namespace

int64_t cluster_kmedoids_workspace(const ClusterKmedoidsParams& p) { return geometry(p).bytes; }

cudaError_t cluster_kmedoids_cuda(const ClusterKmedoidsParams& p, cudaStream_t stream) {
  const Geometry g = geometry(p);
  // NOTE: a memset is a node of a captured graph, so a replay starts from zero again.
  cudaError_t error = cudaMemsetAsync(p.workspace, 0, static_cast<size_t>(g.zeroed), stream);
  if (error != cudaSuccess) return error;
  switch (p.tokens.dtype) {
    case DType::kFloat32: return run<float>(p, g, stream);
    case DType::kFloat16: return run<__half>(p, g, stream);
    default: return run<__nv_bfloat16>(p, g, stream);
  }
}

}  // namespace vtk
