// cluster_dpc_knn on CUDA: five launches, no [N, N] in memory, no host synchronisation.
//
//   prepare  which tokens are usable, a warp a token
//   density  block = (item, 64 tokens), streaming all tokens: the 64 x 64 distances of a tile go to shared memory,
//   where
//            a thread a token keeps the k smallest in a sorted list, and the largest. Mean = sum in ascending order / k
//            D
//   delta    the same tiles: the smallest distance to a denser token, in registers
//   choose   block = item: scores, their best by radix selection, centers numbered in ascending order by prefix sums
//   assign   block = (item, 64 tokens), streaming the centers
//
//   shared  the loop's 68 KiB; density: 25 KiB static for the tile and the lists; 2 blocks a multiprocessor
//   bound   twice 3 N^2 D operations an item in float32. NOTE: one item of up to 4096 tokens does not fill a large GPU;
//           lists that several blocks share would have to be merged.
//
// Clamped, because a report needs a sync: counts into [0, clusters].
#include "merge/cluster_dpc_knn.h"

#include <algorithm>

#include "device/launch.h"
#include "device/order_key.cuh"
#include "device/radix_select.cuh"
#include "device/tile.h"
#include "merge/cluster_distance.cuh"

namespace vtk {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
using Rank = unsigned long long;

struct Workspace {
  float* mean;      // [B, N], NaN where not usable
  float* largest;   // [B, N], squared distance
  float* delta;     // [B, N], squared distance, infinity: none is denser
  uint32_t* keys;   // [B, N]
  int32_t* list;    // [B, C], centers
  int32_t* listed;  // [B], how many
  bool* usable;     // [B, N]
  int64_t bytes;
};

Workspace make_workspace(const ClusterDpcKnnParams& p) {
  Workspace w = {};
  char* next = static_cast<char*>(p.workspace);
  auto take = [&](auto*& array, int64_t count) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(next);
    next += round_up<int64_t>(count * sizeof(*array), 16);
  };
  const int64_t tokens = int64_t{p.tokens.batch} * p.tokens.count;
  take(w.mean, tokens);
  take(w.largest, tokens);
  take(w.delta, tokens);
  take(w.keys, tokens);
  take(w.list, int64_t{p.tokens.batch} * p.clusters);
  take(w.listed, p.tokens.batch);
  take(w.usable, tokens);
  w.bytes = next - static_cast<char*>(p.workspace);
  return w;
}

__device__ int32_t wanted_centers(const ClusterDpcKnnParams& p, int32_t b) {
  return p.counts == nullptr ? p.clusters : min(max(p.counts[b * p.counts_stride], 0), p.clusters);
}

// blockIdx.x = item * blocks of kWarps tokens + block.
template <class T>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const __grid_constant__ ClusterDpcKnnParams p, const __grid_constant__ Workspace w) {
  const int32_t blocks = ceil_div(p.tokens.count, kWarps), b = blockIdx.x / blocks;
  const int32_t n = blockIdx.x % blocks * kWarps + threadIdx.x / 32;
  if (n >= p.tokens.count) return;
  const float squared = warp_squared_norm(token_row<T>(p.tokens, b, n), p.tokens.channels);
  if (threadIdx.x % 32 == 0)
    w.usable[static_cast<int64_t>(b) * p.tokens.count + n] = is_valid(p.tokens, b, n) && squared < kMaxSquaredNorm;
}

template <class T>
__device__ TileRows<T> token_rows(const ClusterTokens& t, int32_t b, bool aligned) {
  return {token_row<T>(t, b, 0), t.stride_token, t.count, aligned};
}

// blockIdx.x = item * tiles + tile.
template <class T>
__global__ void __launch_bounds__(kTileThreads, 2)
    density_kernel(const __grid_constant__ ClusterDpcKnnParams p, const __grid_constant__ Workspace w, bool aligned) {
  VTK_DYNAMIC_SHARED(shared);
  __shared__ float sDistances[kTile][kTile + 1];
  __shared__ float sNearest[kMaxNearest][kTile];
  __shared__ bool sUsable[2][kTile];
  using Tile = DistanceTile<T>;
  const int32_t tiles = ceil_div(p.tokens.count, kTile), b = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int64_t item = static_cast<int64_t>(b) * p.tokens.count;
  const int32_t own = threadIdx.x, k = max(1, min(p.k, wanted_centers(p, b)));
  if (own < kTile)
    for (int32_t i = 0; i < k; ++i) sNearest[i][own] = INFINITY;

  // The list of token `own`, of which only its thread knows.
  float last = INFINITY, largest = 0.0f;
  int32_t seen = 0;
  auto insert = [&](float distance) {
    int32_t i = k - 1;
    for (; i > 0 && distance < sNearest[i - 1][own]; --i) sNearest[i][own] = sNearest[i - 1][own];
    sNearest[i][own] = distance;
    last = sNearest[k - 1][own];
  };
  auto begin = [&](int32_t streamed, int32_t buffer) {
    if (own >= kTile) return;
    const int32_t n = streamed * kTile + own;
    sUsable[buffer][own] = n < p.tokens.count && w.usable[item + n];
  };
  auto reduce = [&](int32_t, int32_t buffer, const Tile& products) {
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j) sDistances[Tile::row(i)][Tile::column(j)] = products.value[i][j];
    __syncthreads();
    for (int32_t j = 0; own < kTile && j < kTile; ++j) {
      if (!sUsable[buffer][j]) continue;
      const float distance = sDistances[own][j];
      ++seen;
      largest = fmaxf(largest, distance);
      if (distance < last) insert(distance);
    }
  };
  const TileRows<T> rows = token_rows<T>(p.tokens, b, aligned);
  stream_tiles<T, Tile>(shared, rows, tile * kTile, rows, 0, tiles, p.tokens.channels, begin, reduce);

  // Mean of the nearest.
  const int32_t n = tile * kTile + own;
  if (own >= kTile || n >= p.tokens.count) return;
  float sum = 0.0f;
  const int32_t count = min(k, seen);
  for (int32_t i = 0; i < count; ++i) sum += sNearest[i][own];
  const float mean = __fdiv_rn(sum, static_cast<float>(count) * static_cast<float>(p.tokens.channels));
  w.mean[item + n] = w.usable[item + n] ? mean : __uint_as_float(0x7fffffffu);
  w.largest[item + n] = w.usable[item + n] ? largest : 0.0f;
}

// blockIdx.x = item * tiles + tile.
template <class T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    delta_kernel(const __grid_constant__ ClusterDpcKnnParams p, const __grid_constant__ Workspace w, bool aligned) {
  VTK_DYNAMIC_SHARED(shared);
  __shared__ float sMean[2][kTile];
  using Tile = DistanceTile<T>;
  const int32_t tiles = ceil_div(p.tokens.count, kTile), b = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int64_t item = static_cast<int64_t>(b) * p.tokens.count;
  float delta[Tile::kRows], mean[Tile::kRows];
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    delta[i] = INFINITY;
    mean[i] = w.mean[item + min(tile * kTile + Tile::row(i), p.tokens.count - 1)];
  }

  // A token that is not usable has a NaN for a mean and so is never denser.
  auto begin = [&](int32_t streamed, int32_t buffer) {
    if (threadIdx.x >= kTile) return;
    const int32_t n = streamed * kTile + threadIdx.x;
    sMean[buffer][threadIdx.x] = n < p.tokens.count ? w.mean[item + n] : __uint_as_float(0x7fffffffu);
  };
  auto reduce = [&](int32_t streamed, int32_t buffer, const Tile& products) {
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) {
      const float other = sMean[buffer][Tile::column(j)];
#pragma unroll
      for (int i = 0; i < Tile::kRows; ++i) {
        const bool lower = streamed * kTile + Tile::column(j) < tile * kTile + Tile::row(i);
        if (other < mean[i] || (other == mean[i] && lower)) delta[i] = fminf(delta[i], products.value[i][j]);
      }
    }
  };
  const TileRows<T> rows = token_rows<T>(p.tokens, b, aligned);
  stream_tiles<T, Tile>(shared, rows, tile * kTile, rows, 0, tiles, p.tokens.channels, begin, reduce);

#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    const float nearest = warp_reduce<Tile::kRowLanes>(delta[i], Min{});
    const int32_t n = tile * kTile + Tile::row(i);
    if (threadIdx.x % Tile::kRowLanes == 0 && n < p.tokens.count) w.delta[item + n] = nearest;
  }
}

// blockIdx.x = item.
__global__ void __launch_bounds__(kThreads)
    choose_kernel(const __grid_constant__ ClusterDpcKnnParams p, const __grid_constant__ Workspace w) {
  __shared__ RadixSelectStorage sSelect;
  __shared__ float sLargest[kWarps];
  __shared__ int32_t sCounts[kWarps];
  const int32_t b = blockIdx.x, count = p.tokens.count;
  const int64_t item = static_cast<int64_t>(b) * count;
  uint32_t* keys = w.keys + item;
  int64_t *owner = p.owner + item, *centers = p.centers + static_cast<int64_t>(b) * p.clusters;

  // Scores.
  float largest = 0.0f;
  int32_t usable = 0;
  for (int32_t n = threadIdx.x; n < count; n += kThreads) {
    largest = fmaxf(largest, w.largest[item + n]);
    usable += w.usable[item + n];
  }
  largest = block_reduce<kThreads>(largest, Max{}, sLargest);
  usable = block_reduce<kThreads>(usable, Sum{}, sCounts);
  for (int32_t n = threadIdx.x; n < count; n += kThreads) {
    const float nearest = w.delta[item + n], delta = nearest == INFINITY ? largest : nearest;
    keys[n] = w.usable[item + n] ? order_key(0.5f * logf(delta) - w.mean[item + n]) : kDroppedKey;
    owner[n] = -1;
  }
  __syncthreads();

  // The best in ascending order; among equal keys the lower tokens.
  const int32_t wanted = min(wanted_centers(p, b), usable);
  if (threadIdx.x == 0) w.listed[b] = wanted;
  for (int32_t c = wanted + threadIdx.x; c < p.clusters; c += kThreads) centers[c] = -1;
  if (wanted == 0) return;
  const Threshold threshold = radix_select([&](int32_t n) { return keys[n]; }, count, wanted, sSelect);
  int32_t ties = 0, chosen = 0;
  for (int32_t first = 0; first < count; first += kThreads) {
    const int32_t n = first + static_cast<int32_t>(threadIdx.x);
    const uint32_t key = n < count ? keys[n] : kDroppedKey;
    const Prefix<int32_t> tie = block_prefix<kThreads>(int32_t{key == threshold.key}, sCounts);
    const bool is_center = key > threshold.key || (key == threshold.key && ties + tie.before < threshold.ties);
    const Prefix<int32_t> center = block_prefix<kThreads>(int32_t{is_center}, sCounts);
    if (is_center) {
      const int32_t c = chosen + center.before;
      centers[c] = n;
      w.list[static_cast<int64_t>(b) * p.clusters + c] = n;
      owner[n] = c;
    }
    ties += tie.total;
    chosen += center.total;
  }
}

// Rows that a list names.
template <class T>
struct ListedRows {
  const T* data;
  int64_t stride;
  const int32_t* list;
  int32_t count;
  bool aligned;
  __device__ const T* row(int32_t i) const { return data + list[i] * stride; }
};

// blockIdx.x = item * tiles + tile. Centers have their owner already.
template <class T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    assign_kernel(const __grid_constant__ ClusterDpcKnnParams p, const __grid_constant__ Workspace w, bool aligned) {
  VTK_DYNAMIC_SHARED(shared);
  using Tile = DistanceTile<T>;
  const int32_t tiles = ceil_div(p.tokens.count, kTile), b = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int64_t item = static_cast<int64_t>(b) * p.tokens.count;
  const TileRows<T> rows = token_rows<T>(p.tokens, b, aligned);
  const ListedRows<T> centers = {rows.data, rows.stride, w.list + static_cast<int64_t>(b) * p.clusters, w.listed[b],
                                 aligned};
  if (centers.count == 0) return;

  // A distance is not negative, so its bits sort as it does.
  Rank best[Tile::kRows];
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) best[i] = ~Rank{0};
  auto begin = [](int32_t, int32_t) {};
  auto reduce = [&](int32_t streamed, int32_t, const Tile& products) {
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) {
      const int32_t c = streamed * kTile + Tile::column(j);
      if (c >= centers.count) continue;
#pragma unroll
      for (int i = 0; i < Tile::kRows; ++i)
        best[i] = min(best[i], static_cast<Rank>(__float_as_uint(products.value[i][j])) << 32 | c);
    }
  };
  stream_tiles<T, Tile>(shared, rows, tile * kTile, centers, 0, ceil_div(centers.count, kTile), p.tokens.channels,
                        begin, reduce);

#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    const Rank nearest = warp_reduce<Tile::kRowLanes>(best[i], Min{});
    const int32_t n = tile * kTile + Tile::row(i);
    if (threadIdx.x % Tile::kRowLanes == 0 && n < p.tokens.count && w.usable[item + n] && p.owner[item + n] < 0)
      p.owner[item + n] = static_cast<uint32_t>(nearest);
  }
}

template <class T>
cudaError_t run(const ClusterDpcKnnParams& p, cudaStream_t stream) {
  const Workspace w = make_workspace(p);
  const uint64_t bits =
      reinterpret_cast<uint64_t>(p.tokens.data) |
      (static_cast<uint64_t>(p.tokens.stride_batch) | p.tokens.stride_token | p.tokens.channels) * sizeof(T);
  const bool aligned = bits % 16 == 0;
  const unsigned batch = static_cast<unsigned>(p.tokens.batch);
  LaunchShape warps, tiles, items;
  warps.grid = dim3(batch * ceil_div(p.tokens.count, kWarps));
  items.grid = dim3(batch);
  warps.block = items.block = dim3(kThreads);
  tiles.grid = dim3(batch * ceil_div(p.tokens.count, kTile));
  tiles.block = dim3(kTileThreads);
  tiles.shared_bytes = kTileProductBytes;
  cudaError_t error = launch(prepare_kernel<T>, warps, stream, p, w);
  if (error == cudaSuccess) error = launch(density_kernel<T>, tiles, stream, p, w, aligned);
  if (error == cudaSuccess) error = launch(delta_kernel<T>, tiles, stream, p, w, aligned);
  if (error == cudaSuccess) error = launch(choose_kernel, items, stream, p, w);
  if (error == cudaSuccess) error = launch(assign_kernel<T>, tiles, stream, p, w, aligned);
  return error;
}

}  // namespace

int64_t cluster_dpc_knn_workspace(const ClusterDpcKnnParams& p) { return make_workspace(p).bytes; }

cudaError_t cluster_dpc_knn_cuda(const ClusterDpcKnnParams& p, cudaStream_t stream) {
  switch (p.tokens.dtype) {
    case DType::kFloat32: return run<float>(p, stream);
    case DType::kFloat16: return run<__half>(p, stream);
    default: return run<__nv_bfloat16>(p, stream);
  }
}

}  // namespace vtk
