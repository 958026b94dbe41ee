// attention_scores for more than kFewRows query rows: three launches, no [Q, N] in memory, no atomics.
//
//   normalisers  block = (head, 64 query rows, part of the keys). Stationary tile: its rows; streamed: key tiles.
//                Online maximum and sum of every row. Skipped when lse is given.
//   scores       block = (head, 64 keys, part of the rows). Stationary tile: its keys; streamed: query tiles.
//                Adds exp(logit - lse) in registers, writes each key's score of the head once.
//   finish       thread = key: reduces row parts, then heads, in ascending order.
//
// The first two are the main loop of device/tile_product.cuh, its products reduced along the streamed side.
//
//   shared  the loop's 68 KiB, and flags or row states of two tiles
//   bound   2 * 2 B H Q N D operations; a 64-row tile reads each K and Q byte from L2 once per 64 rows of the other.
#pragma once
#include "device/launch.h"
#include "device/tile_product.cuh"
#include "score/attention_scores_device.cuh"

namespace vtk {
namespace {

constexpr int kThreads = kTileThreads;

template <class T>
__device__ TileRows<T> query_rows(const AttentionScoresParams& p, int32_t b, int32_t h, bool aligned) {
  return {static_cast<const T*>(p.query) + b * p.query_stride_batch + h * p.query_stride_head, p.query_stride_row,
          p.num_queries, aligned};
}

template <class T>
__device__ TileRows<T> key_rows(const AttentionScoresParams& p, int32_t b, int32_t h, bool aligned) {
  const int32_t key_head = h / (p.num_heads / p.key_heads);
  return {static_cast<const T*>(p.key) + b * p.key_stride_batch + key_head * p.key_stride_head, p.key_stride_row,
          p.num_keys, aligned};
}

// blockIdx.x = (head * row tiles + row tile) * key parts + key part.
template <class T>
__global__ void __launch_bounds__(kThreads, kTileBlocks)
    normalisers_kernel(const __grid_constant__ AttentionScoresParams p, const __grid_constant__ Plan plan,
                       bool aligned) {
  VTK_DYNAMIC_SHARED(shared);
  __shared__ bool sShown[2][kTile];
  using Tile = typename TileOf<T>::Type;
  const int32_t row_tiles = (p.num_queries + kTile - 1) / kTile;
  const int32_t part = blockIdx.x % plan.key_parts, tile = blockIdx.x / plan.key_parts % row_tiles;
  const int32_t head = blockIdx.x / plan.key_parts / row_tiles, b = head / p.num_heads, h = head % p.num_heads;

  float2 normaliser[Tile::kRows];
  int32_t limit[Tile::kRows];
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    normaliser[i] = {-kInfinity, 0.0f};
    limit[i] = causal_limit(p, min(tile * kTile + Tile::row(i), p.num_queries - 1));
  }

  // Stream the keys that the last row of the tile sees.
  const int32_t most = causal_limit(p, min(tile * kTile + kTile, p.num_queries) - 1);
  const int32_t begin_key = part * plan.part_keys, end_key = min(begin_key + plan.part_keys, most);
  const int32_t first = begin_key / kTile, count = end_key > begin_key ? (end_key - begin_key + kTile - 1) / kTile : 0;
  const float scale = p.scale * kLog2E;
  auto begin = [&](int32_t key_tile, int32_t buffer) {
    if (threadIdx.x >= kTile) return;
    const int32_t n = key_tile * kTile + threadIdx.x;
    sShown[buffer][threadIdx.x] = n < p.num_keys && is_set(p.key_mask, b, n);
  };
  auto reduce = [&](int32_t key_tile, int32_t buffer, const Tile& products) {
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
      auto seen = [&](int j) {
        return sShown[buffer][Tile::column(j)] && key_tile * kTile + Tile::column(j) < limit[i];
      };
      // The maximum over the lanes that share the row; it may miss a NaN, the sum does not.
      float best = normaliser[i].x;
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j)
        if (seen(j)) best = fmaxf(best, products.value[i][j] * scale);
#pragma unroll
      for (int step = Tile::kRowLanes / 2; step > 0; step /= 2)
        best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, step));
      const float shift = best == -kInfinity ? 0.0f : best;
      float sum = normaliser[i].x == best ? normaliser[i].y : normaliser[i].y * exp2f(normaliser[i].x - shift);
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j)
        if (seen(j)) sum += exp2f(products.value[i][j] * scale - shift);
      normaliser[i] = {best, sum};
    }
  };
  if (count > 0)
    stream_tiles<T>(shared, query_rows<T>(p, b, h, aligned), tile * kTile, key_rows<T>(p, b, h, aligned), first, count,
                    p.head_dim, begin, reduce);

  // Sum over the lanes of a row and write its part.
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
#pragma unroll
    for (int step = Tile::kRowLanes / 2; step > 0; step /= 2)
      normaliser[i].y += __shfl_xor_sync(0xffffffffu, normaliser[i].y, step);
    const int32_t q = tile * kTile + Tile::row(i);
    if (threadIdx.x % Tile::kRowLanes != 0 || q >= p.num_queries) continue;
    const int64_t row = static_cast<int64_t>(head) * p.num_queries + q;
    reinterpret_cast<float2*>(p.workspace)[row * plan.key_parts + part] = normaliser[i];
  }
}

// blockIdx.x = (head * row parts + row part) * key tiles + key tile.
template <class T>
__global__ void __launch_bounds__(kThreads, kTileBlocks)
    scores_kernel(const __grid_constant__ AttentionScoresParams p, const __grid_constant__ Plan plan, bool aligned) {
  VTK_DYNAMIC_SHARED(shared);
  __shared__ RowState sRows[2][kTile];
  using Tile = typename TileOf<T>::Type;
  const int32_t key_tiles = (p.num_keys + kTile - 1) / kTile;
  const int32_t tile = blockIdx.x % key_tiles, part = blockIdx.x / key_tiles % plan.row_parts;
  const int32_t head = blockIdx.x / key_tiles / plan.row_parts, b = head / p.num_heads, h = head % p.num_heads;

  float votes[Tile::kRows];
  bool shown[Tile::kRows];
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    const int32_t n = tile * kTile + Tile::row(i);
    votes[i] = 0.0f;
    shown[i] = n < p.num_keys && is_set(p.key_mask, b, n);
  }

  // Stream the rows of the part.
  const int32_t first = part * plan.part_rows / kTile;
  const int32_t count = (min(plan.part_rows, p.num_queries - part * plan.part_rows) + kTile - 1) / kTile;
  const float scale = p.scale * kLog2E;
  const bool is_max = p.query_reduce == Reduce::kMax;
  auto begin = [&](int32_t row_tile, int32_t buffer) {
    if (threadIdx.x >= kTile) return;
    const RowState row = row_state(p, plan, b, h, row_tile * kTile + threadIdx.x);
    sRows[buffer][threadIdx.x] = row;
  };
  auto reduce = [&](int32_t, int32_t buffer, const Tile& products) {
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) {
      const RowState row = sRows[buffer][Tile::column(j)];
#pragma unroll
      for (int i = 0; i < Tile::kRows; ++i) {
        if (!shown[i] || tile * kTile + Tile::row(i) >= row.limit) continue;
        votes[i] = combine(votes[i], row.weight * exp2f(products.value[i][j] * scale - row.shift), is_max);
      }
    }
  };
  stream_tiles<T>(shared, key_rows<T>(p, b, h, aligned), tile * kTile, query_rows<T>(p, b, h, aligned), first, count,
                  p.head_dim, begin, reduce);

  // Reduce over the lanes of a key and write its score of this head and part.
  float* gScores =
      p.workspace + plan.normaliser_floats + (static_cast<int64_t>(head) * plan.row_parts + part) * p.num_keys;
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
#pragma unroll
    for (int step = Tile::kRowLanes / 2; step > 0; step /= 2)
      votes[i] = combine(votes[i], __shfl_xor_sync(0xffffffffu, votes[i], step), is_max);
    const int32_t n = tile * kTile + Tile::row(i);
    if (threadIdx.x % Tile::kRowLanes == 0 && n < p.num_keys) gScores[n] = votes[i];
  }
}

// blockIdx.x = (batch row or head row of the output) * key blocks + key block.
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ AttentionScoresParams p, const __grid_constant__ Plan plan) {
  const int32_t key_blocks = (p.num_keys + kThreads - 1) / kThreads;
  const int32_t heads = p.head_reduce == Reduce::kNone ? 1 : p.num_heads;
  const int32_t out_row = blockIdx.x / key_blocks, n = blockIdx.x % key_blocks * kThreads + threadIdx.x;
  const float factor = row_factor(p, out_row * heads / p.num_heads);
  if (n >= p.num_keys) return;
  const float* gScores =
      p.workspace + plan.normaliser_floats + static_cast<int64_t>(out_row) * heads * plan.row_parts * p.num_keys + n;
  float score = 0.0f;
  for (int32_t head = 0; head < heads; ++head) {
    float votes = 0.0f;
    for (int32_t part = 0; part < plan.row_parts; ++part) {
      votes = combine(votes, *gScores, p.query_reduce == Reduce::kMax);
      gScores += p.num_keys;
    }
    score = combine(score, votes * factor, p.head_reduce == Reduce::kMax);
  }
  if (p.head_reduce == Reduce::kMean) score = __fdiv_rn(score, static_cast<float>(heads));
  p.out[static_cast<int64_t>(out_row) * p.num_keys + n] = score;
}

template <class T>
cudaError_t launch_many_rows(const AttentionScoresParams& p, const Plan& plan, cudaStream_t stream) {
  auto bits = [](const void* data, int64_t batch, int64_t head, int64_t row) {
    return reinterpret_cast<uint64_t>(data) | (batch | head | row) * sizeof(T);
  };
  const bool aligned = (bits(p.query, p.query_stride_batch, p.query_stride_head, p.query_stride_row) |
                        bits(p.key, p.key_stride_batch, p.key_stride_head, p.key_stride_row) | p.head_dim * sizeof(T)) %
                           16 ==
                       0;
  const int64_t heads = int64_t{p.batch} * p.num_heads;
  LaunchShape shape;
  shape.block = dim3(kThreads);
  shape.shared_bytes = kTileProductBytes;
  if (p.lse == nullptr) {
    shape.grid = dim3(static_cast<unsigned>(heads * ceil_div<int64_t>(p.num_queries, kTile) * plan.key_parts));
    cudaError_t error = launch(normalisers_kernel<T>, shape, stream, p, plan, aligned);
    if (error != cudaSuccess) return error;
  }
  shape.grid = dim3(static_cast<unsigned>(heads * plan.row_parts * ceil_div<int64_t>(p.num_keys, kTile)));
  cudaError_t error = launch(scores_kernel<T>, shape, stream, p, plan, aligned);
  if (error != cudaSuccess) return error;
  const int64_t out_rows = p.head_reduce == Reduce::kNone ? heads : p.batch;
  shape.grid = dim3(static_cast<unsigned>(out_rows * ceil_div<int64_t>(p.num_keys, kThreads)));
  shape.shared_bytes = 0;
  return launch(finish_kernel, shape, stream, p, plan);
}

}  // namespace
}  // namespace vtk
