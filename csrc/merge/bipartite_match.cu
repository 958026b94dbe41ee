// bipartite_match on CUDA: one launch, no [N/2, N/2] in memory, no host synchronisation.
//
//   grid     groups x blocks, all resident; a group serves items group, group + groups, ...
//   prepare  block 0 of the group lists sources and destinations in ascending order; all: 1 / norm, a warp a token
//   match    pairs of a source tile and a destination tile, shared out evenly: nearest_rows.cuh. Blocks that share a
//            source tile agree by a maximum over integers
//   merge    block 0: the r best edges by radix selection, then the output row of every token by prefix sums. The
//            others are on their way to the next item
//   number   packed segments only, after a barrier of the whole grid: the rows of a segment follow those before it
//
//   shared   68 KiB of tiles, 1.6 KiB static; three blocks a multiprocessor of sm_90
//   bound    N^2 / 2 * C operations an item; merging reads N keys about ten times from L2, a barrier takes about 1.5 us
//
// Clamped, because a report needs a sync (p.exact): where protect leaves fewer edges than merges, the lowest-indexed
// sources without an edge are dropped. Segments that do not ascend from 0 to T drop every token.
#include "merge/bipartite_match.h"

#include <algorithm>

#include "device/grid_barrier.cuh"
#include "device/launch.h"
#include "device/radix_select.cuh"
#include "device/reduce.cuh"
#include "device/tile.h"
#include "merge/nearest_rows.cuh"

namespace vtk {
namespace {

constexpr int kThreads = kTileThreads;
constexpr int kWarps = kThreads / 32;
constexpr int32_t kSurvives = -1, kDropped = -2;

struct Counts {
  int32_t sources, destinations;
};

// What belongs to tokens lies as they do: an item's part of an array starts at its first token.
struct Workspace {
  int32_t groups, blocks;
  char* counters;         // [groups + 1] barriers, the last that of the grid; zeroed by the launcher
  EdgeRank* edges;        // [B, N] or [T], the best edge of each source; its place is one in `destinations`
  float* inverse;         // [B, N] or [T]: 1 / norm, 0 of a zero vector, NaN without a cosine
  int32_t* sources;       // [B, N] or [T], ascending positions; causal: not those that are protected
  int32_t* destinations;  // [B, N] or [T], those that are not protected
  int32_t* targets;       // [B, N] or [T], the position to merge into, or kSurvives or kDropped
  Counts* counts;         // [B]
  int32_t* rows;          // [B], that an item leaves
  int64_t bytes;
};

struct SharedMemory {
  RadixSelectStorage select;
  int32_t warps[kWarps];
  float terms[2][kTile];
};

// One item's view of its tokens, which positions from 0 number, and of the workspace.
struct Item {
  const BipartiteMatchParams& p;
  const Workspace& w;
  const int32_t b;
  const int32_t first;  // packed: the first token
  const int32_t tokens;
  const int64_t offset;  // of the item's part in arrays of all tokens
  EdgeRank* const edges;
  float* const inverse;
  int32_t *const sources, *const destinations, *const targets;
  int64_t* const owner;

  __device__ Item(const BipartiteMatchParams& p, const Workspace& w, int32_t b)
      : p(p),
        w(w),
        b(b),
        first(p.cu_seqlens != nullptr ? p.cu_seqlens[b] : 0),
        tokens(p.cu_seqlens != nullptr ? p.cu_seqlens[b + 1] - first : p.num_tokens),
        offset(p.cu_seqlens != nullptr ? first : static_cast<int64_t>(b) * p.num_tokens),
        edges(w.edges + offset),
        inverse(w.inverse + offset),
        sources(w.sources + offset),
        destinations(p.split == MatchSplit::kCausal ? sources : w.destinations + offset),
        targets(w.targets + offset),
        owner(p.owner + offset) {}

  template <class T>
  __device__ const T* metric() const {
    return static_cast<const T*>(p.metric) + b * p.stride_batch + first * p.stride_token;
  }

  __device__ bool is_protected(int32_t n) const {
    return p.protect.data != nullptr &&
           p.protect.data[b * p.protect.stride_row + static_cast<int64_t>(first + n) * p.protect.stride_col];
  }

  __device__ bool is_source(int32_t n) const {
    if (p.split == MatchSplit::kCausal) return !is_protected(n);
    if (p.rank == nullptr) return n % 2 == 0;
    return p.rank[b * p.rank_stride_batch + static_cast<int64_t>(first + n) * p.rank_stride_token] % 2 == 0;
  }

  __device__ void list_tokens(int32_t* sWarps) const {
    Counts counts;
    counts.sources = enumerate<kThreads>(
        tokens, sWarps, [&](int32_t n) { return is_source(n); }, [&](int32_t n, int32_t s) { sources[s] = n; });
    counts.destinations = counts.sources;
    if (p.split != MatchSplit::kCausal)
      counts.destinations = enumerate<kThreads>(
          tokens, sWarps, [&](int32_t n) { return !is_source(n) && !is_protected(n); },
          [&](int32_t n, int32_t d) { destinations[d] = n; });
    if (threadIdx.x == 0) w.counts[b] = counts;
  }

  // This block's share of the norms, and no edges yet.
  template <class T>
  __device__ void measure(int32_t block) const {
    for (int32_t n = block * kWarps + threadIdx.x / 32; n < tokens; n += w.blocks * kWarps) {
      const float norm = inverse_norm(squared_norm(metric<T>() + n * p.stride_token, p.channels));
      if (threadIdx.x % 32 != 0) continue;
      inverse[n] = norm;
      edges[n] = 0;
    }
  }

  // This block's share of the pairs of tiles, source tile by source tile. Causal: a source tile meets those up to
  // itself.
  template <class T, bool kCausal>
  __device__ void match(int32_t block, bool aligned, unsigned char* tiles, SharedMemory& shared) const {
    const Counts counts = w.counts[b];
    const ListedRows<T> from = {metric<T>(), p.stride_token, sources, inverse, counts.sources, aligned};
    const ListedRows<T> to = {metric<T>(), p.stride_token, destinations, inverse, counts.destinations, aligned};
    const int32_t source_tiles = ceil_div(counts.sources, kTile);
    const int32_t destination_tiles = ceil_div(counts.destinations, kTile);
    const int64_t pairs = kCausal ? static_cast<int64_t>(source_tiles) * (source_tiles + 1) / 2
                                  : static_cast<int64_t>(source_tiles) * destination_tiles;
    const int64_t begin = pairs * block / w.blocks, end = pairs * (block + 1) / w.blocks;
    int64_t before = 0;  // pairs of the source tiles before this one
    for (int32_t tile = 0; tile < source_tiles && before < end; ++tile) {
      const int32_t width = kCausal ? tile + 1 : destination_tiles;
      const int32_t low = static_cast<int32_t>(max(begin - before, static_cast<int64_t>(0)));
      const int32_t high = static_cast<int32_t>(min(end - before, static_cast<int64_t>(width)));
      before += width;
      if (low >= high) continue;
      nearest_rows<T, kCausal>(
          tiles, shared.terms, from, tile * kTile, to, low, high - low, p.channels,
          [](float product, float source, float destination) { return product * source * destination; },
          [&](int32_t s, EdgeRank edge) { atomicMax(&edges[s], edge); });
    }
  }

  __device__ uint32_t key_at(int32_t s) const { return key_of(edges[s]); }

  // No edges for protected sources; the similarities; returns how many edges may merge.
  __device__ int32_t collect(int32_t num_sources, SharedMemory& shared) const {
    float* gSimilarity = p.similarity != nullptr ? p.similarity + offset : nullptr;
    for (int32_t n = threadIdx.x; n < tokens; n += kThreads) {
      targets[n] = kSurvives;
      if (gSimilarity != nullptr) gSimilarity[n] = -INFINITY;
    }
    __syncthreads();
    int32_t eligible = 0;
    for (int32_t s = threadIdx.x; s < num_sources; s += kThreads) {
      if (is_protected(sources[s])) edges[s] = 0;
      if (edges[s] == 0) continue;
      const float similarity = similarity_of(key_at(s));
      if (gSimilarity != nullptr) gSimilarity[sources[s]] = similarity;
      eligible += !p.has_threshold || similarity > p.threshold;
    }
    return block_reduce<kThreads>(eligible, Sum{}, shared.warps);
  }

  // Aims the `merges` best sources at their destinations; among equal keys the earlier source.
  __device__ void aim(int32_t num_sources, int32_t merges, SharedMemory& shared) const {
    if (merges == 0) return;
    auto target_of = [&](int32_t s) { return edges[s] != 0 ? destinations[index_of(edges[s])] : kDropped; };
    const Threshold threshold = radix_select([&](int32_t s) { return key_at(s); }, num_sources, merges, shared.select);
    enumerate<kThreads>(
        num_sources, shared.warps, [&](int32_t s) { return key_at(s) == threshold.key; },
        [&](int32_t s, int32_t tie) {
          if (tie < threshold.ties) targets[sources[s]] = target_of(s);
        });
    for (int32_t s = threadIdx.x; s < num_sources; s += kThreads)
      if (key_at(s) > threshold.key) targets[sources[s]] = target_of(s);
    __syncthreads();
  }

  __device__ void number_by_position(SharedMemory& shared) const {
    enumerate<kThreads>(
        tokens, shared.warps, [&](int32_t n) { return targets[n] == kSurvives; },
        [&](int32_t n, int32_t row) { owner[n] = row; });
  }

  // ToMe lists unmerged sources by descending similarity, but by position as soon as a token is protected.
  __device__ void number_as_tome(int32_t num_sources, int32_t merges, SharedMemory& shared) const {
    if (p.protect.data != nullptr) {
      enumerate<kThreads>(
          num_sources, shared.warps, [&](int32_t s) { return targets[sources[s]] == kSurvives; },
          [&](int32_t s, int32_t row) { owner[sources[s]] = row; });
    } else {
      // One warp a source: all merged sources are better, and `better` counts the others before it.
      for (int32_t s = threadIdx.x / 32; s < num_sources; s += kWarps) {
        if (targets[sources[s]] != kSurvives) continue;
        int32_t better = 0;
        for (int32_t other = threadIdx.x % 32; other < num_sources; other += 32)
          better += key_at(other) > key_at(s) || (key_at(other) == key_at(s) && other < s);
        better = __reduce_add_sync(kAllLanes, better);
        if (threadIdx.x % 32 == 0) owner[sources[s]] = better - merges;
      }
    }
    for (int32_t n = 1 + 2 * threadIdx.x; n < tokens; n += 2 * kThreads) owner[n] = num_sources - merges + n / 2;
  }

  // A target that is merged itself has no row.
  __device__ void follow_targets() const {
    for (int32_t n = threadIdx.x; n < tokens; n += kThreads) {
      const int32_t target = targets[n];
      if (target != kSurvives) owner[n] = target != kDropped && targets[target] == kSurvives ? owner[target] : -1;
    }
  }

  __device__ void merge(SharedMemory& shared) const {
    const int32_t num_sources = w.counts[b].sources;
    const int32_t eligible = collect(num_sources, shared);
    const int32_t wanted =
        p.cu_seqlens != nullptr ? min(max(p.segment_merges[b], 0), most_merges(p, tokens)) : p.merges;
    const int32_t merges = p.exact ? wanted : min(wanted, eligible);
    aim(num_sources, merges, shared);
    if (p.order == MergeOrder::kPosition)
      number_by_position(shared);
    else
      number_as_tome(num_sources, merges, shared);
    __syncthreads();
    follow_targets();
    if (threadIdx.x == 0) w.rows[b] = tokens - merges;
  }
};

__device__ bool segments_ascend(const BipartiteMatchParams& p) {
  bool wrong = p.cu_seqlens[0] != 0 || p.cu_seqlens[p.batch] != p.num_tokens;
  for (int32_t s = threadIdx.x; s < p.batch; s += kThreads) wrong |= p.cu_seqlens[s] > p.cu_seqlens[s + 1];
  return !__syncthreads_or(wrong);
}

__device__ void drop_every_token(const BipartiteMatchParams& p) {
  const int32_t thread = blockIdx.x * kThreads + threadIdx.x, threads = gridDim.x * kThreads;
  for (int64_t n = thread; n < p.num_tokens; n += threads) {
    p.owner[n] = -1;
    if (p.similarity != nullptr) p.similarity[n] = -INFINITY;
  }
  for (int64_t s = thread; s <= p.batch; s += threads) p.cu_merged[s] = 0;
}

// Moves the rows of every segment of the group behind those of the segments before it.
__device__ void number_segments(const BipartiteMatchParams& p, const Workspace& w, int32_t group, int32_t block,
                                int32_t* sWarps) {
  if (p.batch == 0 && threadIdx.x == 0 && blockIdx.x == 0) p.cu_merged[0] = 0;
  int32_t before = 0, counted = 0;  // rows of the segments before b; how many of these are in it
  for (int32_t b = group; b < p.batch; b += w.groups) {
    int32_t rows = 0;
    for (int32_t s = counted + threadIdx.x; s < b; s += kThreads) rows += w.rows[s];
    before += block_reduce<kThreads>(rows, Sum{}, sWarps);
    counted = b;
    const Item item(p, w, b);
    for (int32_t n = block * kThreads + threadIdx.x; n < item.tokens; n += w.blocks * kThreads)
      if (item.owner[n] >= 0) item.owner[n] += before;
    if (block != 0 || threadIdx.x != 0) continue;
    p.cu_merged[b] = before;
    if (b + 1 == p.batch) p.cu_merged[p.batch] = before + w.rows[b];
  }
}

// blockIdx.x = group * blocks + block.
template <class T, MatchSplit kSplit>
__global__ void __launch_bounds__(kThreads, kTileBlocks)
    bipartite_match_kernel(const __grid_constant__ BipartiteMatchParams p, const __grid_constant__ Workspace w,
                           bool aligned) {
  VTK_DYNAMIC_SHARED(tiles);
  __shared__ SharedMemory shared;
  const int32_t group = blockIdx.x / w.blocks, block = blockIdx.x % w.blocks;
  auto barrier_of = [&](int32_t number, unsigned blocks) {
    return GridBarrier{reinterpret_cast<unsigned*>(w.counters + number * kBarrierBytes), blocks};
  };
  GridBarrier barrier = barrier_of(group, w.blocks);
  if (p.cu_seqlens != nullptr && !segments_ascend(p)) {
    drop_every_token(p);
    return;
  }
  for (int32_t b = group; b < p.batch; b += w.groups) {
    const Item item(p, w, b);
    if (block == 0) item.list_tokens(shared.warps);
    item.template measure<T>(block);
    barrier.wait();
    item.template match<T, kSplit == MatchSplit::kCausal>(block, aligned, tiles, shared);
    barrier.wait();
    if (block == 0) item.merge(shared);
  }
  if (p.cu_seqlens == nullptr) return;
  barrier_of(w.groups, gridDim.x).wait();
  number_segments(p, w, group, block, shared.warps);
}

// Blocks that fit on the device at once. Shared memory bounds them, so all instances have the same number.
int resident_blocks() {
  static thread_local int cached_device = -1, cached = 1;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (device != cached_device) {
    auto kernel = bipartite_match_kernel<float, MatchSplit::kEvenOdd>;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kTileProductBytes) != cudaSuccess ||
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&cached, kernel, kThreads, kTileProductBytes) != cudaSuccess)
      return 1;
    cached_device = device;
  }
  return std::max(1, cached * num_multiprocessors());
}

Workspace make_workspace(const BipartiteMatchParams& p) {
  Workspace w = {};
  const int resident = resident_blocks();
  const bool halves = p.rank == nullptr && p.split == MatchSplit::kEvenOdd;
  const int64_t tiles = ceil_div<int64_t>(halves ? (int64_t{p.num_tokens} + 1) / 2 : p.num_tokens, kTile);
  w.groups = std::clamp(p.batch, 1, resident);
  w.blocks = static_cast<int32_t>(std::clamp<int64_t>(tiles * tiles, 1, resident / w.groups));

  WorkspaceLayout take{p.workspace};
  const int64_t tokens = (p.cu_seqlens != nullptr ? int64_t{1} : p.batch) * p.num_tokens;
  take(w.counters, (w.groups + 1) * kBarrierBytes);
  take(w.edges, tokens);
  take(w.inverse, tokens);
  take(w.sources, tokens);
  take(w.destinations, tokens);
  take(w.targets, tokens);
  take(w.counts, p.batch);
  take(w.rows, p.batch);
  w.bytes = take.bytes;
  return w;
}

template <class T>
cudaError_t run(const BipartiteMatchParams& p, cudaStream_t stream) {
  const Workspace w = make_workspace(p);
  const uint64_t bits = reinterpret_cast<uint64_t>(p.metric) |
                        (static_cast<uint64_t>(p.stride_batch) | p.stride_token | p.channels) * sizeof(T);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(w.groups * w.blocks));
  shape.block = dim3(kThreads);
  shape.shared_bytes = kTileProductBytes;
  shape.cooperative = w.blocks > 1 || (p.cu_seqlens != nullptr && w.groups > 1);
  // NOTE: a memset is a node of a captured graph, so a replay starts from zero again.
  const cudaError_t error = cudaMemsetAsync(w.counters, 0, (w.groups + 1) * kBarrierBytes, stream);
  if (error != cudaSuccess) return error;
  if (p.split == MatchSplit::kCausal)
    return launch(bipartite_match_kernel<T, MatchSplit::kCausal>, shape, stream, p, w, bits % 16 == 0);
  return launch(bipartite_match_kernel<T, MatchSplit::kEvenOdd>, shape, stream, p, w, bits % 16 == 0);
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
