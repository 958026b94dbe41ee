// bipartite_match on CUDA: three launches, no [N/2, N/2] in memory, no host synchronisation.
//
//   prepare  one block an item lists its sources and destinations in ascending order; the others: 1 / norm, a warp a
//            token
//   match    block = (item, 64 sources, part of the destinations): nearest_rows.cuh
//   merge    block = item: the r best edges by radix selection, then the output row of every token by prefix sums
//
//   shared  match: 68 KiB and 512 bytes of inverse norms; merge: 1.1 KiB
//   bound   N^2 / 2 * C operations an item; merging reads N keys about ten times from L2
//
// Clamped, because a report needs a sync (p.exact): where protect leaves fewer edges than merges, the lowest-indexed
// sources without an edge are dropped.
#include "merge/bipartite_match.h"

#include <algorithm>

#include "device/launch.h"
#include "device/radix_select.cuh"
#include "device/reduce.cuh"
#include "device/tile.h"
#include "merge/nearest_rows.cuh"

namespace vtk {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int32_t kSurvives = -1, kDropped = -2;
constexpr float kInfinity = INFINITY;

struct Counts {
  int32_t sources, destinations;
};

struct Workspace {
  int32_t most_sources, most_destinations;  // of an item
  int32_t parts, part_tiles;                // blocks that share a source tile, destination tiles of each
  EdgeRank* edges;                          // [B, parts, most_sources]
  float* inverse;                           // [B, N]: 1 / norm, 0 of a zero vector, NaN without a cosine
  int32_t* sources;                         // [B, most_sources], tokens of even rank
  int32_t* destinations;                    // [B, most_destinations], tokens of odd rank that are not protected
  uint32_t* keys;                           // [B, most_sources], 0: no edge that may merge
  int32_t* partners;                        // [B, most_sources], tokens
  int32_t* targets;                         // [B, N], the token to merge into, or kSurvives or kDropped
  Counts* counts;                           // [B]
  int64_t bytes;
};

Workspace make_workspace(const BipartiteMatchParams& p) {
  Workspace w = {};
  w.most_sources = p.rank == nullptr ? (p.num_tokens + 1) / 2 : p.num_tokens;
  w.most_destinations = std::max(p.rank == nullptr ? p.num_tokens / 2 : p.num_tokens, 1);
  const TileParts shared = share_tiles(p.batch, w.most_sources, w.most_destinations);
  w.parts = shared.parts;
  w.part_tiles = shared.part_tiles;

  WorkspaceLayout take{p.workspace};
  const int64_t tokens = int64_t{p.batch} * p.num_tokens, sources = int64_t{p.batch} * w.most_sources;
  take(w.edges, sources * w.parts);
  take(w.inverse, tokens);
  take(w.sources, sources);
  take(w.destinations, int64_t{p.batch} * w.most_destinations);
  take(w.keys, sources);
  take(w.partners, sources);
  take(w.targets, tokens);
  take(w.counts, p.batch);
  w.bytes = take.bytes;
  return w;
}

__device__ bool is_protected(const BipartiteMatchParams& p, int32_t b, int32_t n) {
  return p.protect.data != nullptr && p.protect.data[b * p.protect.stride_row + n * p.protect.stride_col];
}

__device__ bool is_source(const BipartiteMatchParams& p, int32_t b, int32_t n) {
  return (p.rank == nullptr ? n : p.rank[b * p.rank_stride_batch + n * p.rank_stride_token]) % 2 == 0;
}

// blockIdx.x = item * blocks + block; block 0 makes the lists.
template <class T>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const __grid_constant__ BipartiteMatchParams p, const __grid_constant__ Workspace w, int blocks) {
  __shared__ int32_t sWarps[kWarps];
  const int32_t b = blockIdx.x / blocks, block = blockIdx.x % blocks;
  if (block > 0) {
    const int32_t n = (block - 1) * kWarps + threadIdx.x / 32;
    if (n >= p.num_tokens) return;
    const T* row = static_cast<const T*>(p.metric) + b * p.stride_batch + n * p.stride_token;
    const float inverse = inverse_norm(squared_norm(row, p.channels));
    if (threadIdx.x % 32 == 0) w.inverse[static_cast<int64_t>(b) * p.num_tokens + n] = inverse;
    return;
  }
  int32_t* gSources = w.sources + static_cast<int64_t>(b) * w.most_sources;
  int32_t* gDestinations = w.destinations + static_cast<int64_t>(b) * w.most_destinations;
  Counts counts;
  counts.sources = enumerate<kThreads>(
      p.num_tokens, sWarps, [&](int32_t n) { return is_source(p, b, n); },
      [&](int32_t n, int32_t s) { gSources[s] = n; });
  counts.destinations = enumerate<kThreads>(
      p.num_tokens, sWarps, [&](int32_t n) { return !is_source(p, b, n) && !is_protected(p, b, n); },
      [&](int32_t n, int32_t d) { gDestinations[d] = n; });
  if (threadIdx.x == 0) w.counts[b] = counts;
}

// blockIdx.x = (item * source tiles + source tile) * parts + part.
template <class T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    match_kernel(const __grid_constant__ BipartiteMatchParams p, const __grid_constant__ Workspace w, bool aligned) {
  VTK_DYNAMIC_SHARED(shared);
  __shared__ float sInverse[2][kTile];
  const int32_t source_tiles = ceil_div(w.most_sources, kTile);
  const int32_t part = blockIdx.x % w.parts, tile = blockIdx.x / w.parts % source_tiles;
  const int32_t b = blockIdx.x / w.parts / source_tiles;
  const Counts counts = w.counts[b];
  if (tile * kTile >= counts.sources) return;
  const T* gMetric = static_cast<const T*>(p.metric) + b * p.stride_batch;
  const float* gInverse = w.inverse + static_cast<int64_t>(b) * p.num_tokens;
  const ListedRows<T> sources = {gMetric,  p.stride_token, w.sources + static_cast<int64_t>(b) * w.most_sources,
                                 gInverse, counts.sources, aligned};
  const ListedRows<T> destinations = {
      gMetric,  p.stride_token,      w.destinations + static_cast<int64_t>(b) * w.most_destinations,
      gInverse, counts.destinations, aligned};
  const int32_t first = part * w.part_tiles;
  const int32_t count = min(w.part_tiles, ceil_div(counts.destinations, kTile) - first);
  EdgeRank* gEdges = w.edges + (static_cast<int64_t>(b) * w.parts + part) * w.most_sources;
  nearest_rows<T>(
      shared, sInverse, sources, tile * kTile, destinations, first, count, p.channels,
      [](float product, float source, float destination) { return product * source * destination; },
      [&](int32_t s, EdgeRank edge) { gEdges[s] = edge; });
}

struct MergeShared {
  RadixSelectStorage select;
  int32_t warps[kWarps];
  int32_t eligible;
};

// One item's view of the workspace.
struct Item {
  const BipartiteMatchParams& p;
  const Workspace& w;
  const int32_t b;
  const Counts counts;
  const int32_t *sources, *destinations;
  uint32_t* keys;
  int32_t *partners, *targets;
  int64_t* owner;

  __device__ Item(const BipartiteMatchParams& p, const Workspace& w, int32_t b)
      : p(p),
        w(w),
        b(b),
        counts(w.counts[b]),
        sources(w.sources + static_cast<int64_t>(b) * w.most_sources),
        destinations(w.destinations + static_cast<int64_t>(b) * w.most_destinations),
        keys(w.keys + static_cast<int64_t>(b) * w.most_sources),
        partners(w.partners + static_cast<int64_t>(b) * w.most_sources),
        targets(w.targets + static_cast<int64_t>(b) * p.num_tokens),
        owner(p.owner + static_cast<int64_t>(b) * p.num_tokens) {}

  // Best edges over the parts, as keys; counts those that may merge.
  __device__ void collect(MergeShared& shared) const {
    float* gSimilarity = p.similarity != nullptr ? p.similarity + static_cast<int64_t>(b) * p.num_tokens : nullptr;
    if (threadIdx.x == 0) shared.eligible = 0;
    for (int32_t n = threadIdx.x; n < p.num_tokens; n += kThreads) {
      targets[n] = kSurvives;
      if (gSimilarity != nullptr) gSimilarity[n] = -kInfinity;
    }
    __syncthreads();
    int32_t eligible = 0;
    for (int32_t s = threadIdx.x; s < counts.sources; s += kThreads) {
      EdgeRank edge = 0;
      for (int32_t part = 0; part < w.parts; ++part) {
        edge = max(edge, w.edges[(static_cast<int64_t>(b) * w.parts + part) * w.most_sources + s]);
      }
      uint32_t key = is_protected(p, b, sources[s]) ? 0 : key_of(edge);
      if (key != 0 && gSimilarity != nullptr) gSimilarity[sources[s]] = similarity_of(key);
      if (p.has_threshold && !(similarity_of(key) > p.threshold)) key = 0;
      keys[s] = key;
      partners[s] = key != 0 ? destinations[index_of(edge)] : kDropped;
      eligible += key != 0;
    }
    atomicAdd(&shared.eligible, eligible);
    __syncthreads();
  }

  // Aims the `merges` best sources at their destinations; among equal keys the earlier source.
  __device__ void aim(int32_t merges, MergeShared& shared) const {
    if (merges == 0) return;
    const Threshold threshold = radix_select([&](int32_t s) { return keys[s]; }, counts.sources, merges, shared.select);
    enumerate<kThreads>(
        counts.sources, shared.warps, [&](int32_t s) { return keys[s] == threshold.key; },
        [&](int32_t s, int32_t tie) {
          if (tie < threshold.ties) targets[sources[s]] = partners[s];
        });
    for (int32_t s = threadIdx.x; s < counts.sources; s += kThreads)
      if (keys[s] > threshold.key) targets[sources[s]] = partners[s];
    __syncthreads();
  }

  __device__ void number_by_position(MergeShared& shared) const {
    enumerate<kThreads>(
        p.num_tokens, shared.warps, [&](int32_t n) { return targets[n] == kSurvives; },
        [&](int32_t n, int32_t row) { owner[n] = row; });
  }

  // ToMe lists unmerged sources by descending similarity, but by position as soon as a token is protected.
  __device__ void number_as_tome(int32_t merges, MergeShared& shared) const {
    if (p.protect.data != nullptr) {
      enumerate<kThreads>(
          counts.sources, shared.warps, [&](int32_t s) { return targets[sources[s]] == kSurvives; },
          [&](int32_t s, int32_t row) { owner[sources[s]] = row; });
    } else {
      // One warp a source: all merged sources are better, and `better` counts the others before it.
      for (int32_t s = threadIdx.x / 32; s < counts.sources; s += kWarps) {
        if (targets[sources[s]] != kSurvives) continue;
        int32_t better = 0;
        for (int32_t other = threadIdx.x % 32; other < counts.sources; other += 32)
          better += keys[other] > keys[s] || (keys[other] == keys[s] && other < s);
        better = __reduce_add_sync(0xffffffffu, better);
        if (threadIdx.x % 32 == 0) owner[sources[s]] = better - merges;
      }
    }
    for (int32_t n = 1 + 2 * threadIdx.x; n < p.num_tokens; n += 2 * kThreads)
      owner[n] = counts.sources - merges + n / 2;
  }

  __device__ void follow_targets() const {
    for (int32_t n = threadIdx.x; n < p.num_tokens; n += kThreads)
      if (targets[n] != kSurvives) owner[n] = targets[n] == kDropped ? -1 : owner[targets[n]];
  }
};

__global__ void __launch_bounds__(kThreads)
    merge_kernel(const __grid_constant__ BipartiteMatchParams p, const __grid_constant__ Workspace w) {
  __shared__ MergeShared shared;
  const Item item(p, w, blockIdx.x);
  item.collect(shared);
  const int32_t merges = p.exact ? p.merges : min(p.merges, shared.eligible);
  item.aim(merges, shared);
  if (p.order == MergeOrder::kPosition)
    item.number_by_position(shared);
  else
    item.number_as_tome(merges, shared);
  __syncthreads();
  item.follow_targets();
}

template <class T>
cudaError_t run(const BipartiteMatchParams& p, cudaStream_t stream) {
  const Workspace w = make_workspace(p);
  const uint64_t bits = reinterpret_cast<uint64_t>(p.metric) |
                        (static_cast<uint64_t>(p.stride_batch) | p.stride_token | p.channels) * sizeof(T);
  const int blocks = 1 + ceil_div(p.num_tokens, kWarps);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(p.batch) * blocks);
  shape.block = dim3(kThreads);
  cudaError_t error = launch(prepare_kernel<T>, shape, stream, p, w, blocks);
  if (error != cudaSuccess) return error;
  shape.grid = dim3(static_cast<unsigned>(p.batch) * ceil_div(w.most_sources, kTile) * w.parts);
  shape.block = dim3(kTileThreads);
  shape.shared_bytes = kTileProductBytes;
  error = launch(match_kernel<T>, shape, stream, p, w, bits % 16 == 0);
  if (error != cudaSuccess) return error;
  shape.grid = dim3(static_cast<unsigned>(p.batch));
  shape.block = dim3(kThreads);
  shape.shared_bytes = 0;
  return launch(merge_kernel, shape, stream, p, w);
}

}  // namespace

int64_t bipartite_match_workspace(const BipartiteMatchParams& p) { return make_workspace(p).bytes; }

cudaError_t bipartite_match_cuda(const BipartiteMatchParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::kFloat32: return run<float>(p, stream);
    case DType::kFloat16: return run<__half>(p, stream);
    default: return run<__nv_bfloat16>(p, stream);
  }
}

}  // namespace vtk
