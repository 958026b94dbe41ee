// The most similar streamed row of each row of a stationary tile, without a matrix in memory: the tile loop of
// device/tile_product.cuh with a running maximum. Beside its elements a row has one float, its term.
//
// A similarity and the streamed row it belongs to are one integer, similarity above row: its maximum is the most
// similar row, the lower one among equals, in whatever order tiles, lanes and blocks offer it.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/cosine.h"
#include "device/convert.cuh"
#include "device/launch.h"
#include "device/order_key.cuh"
#include "device/reduce.cuh"
#include "device/tile.h"
#include "device/tile_product.cuh"

namespace vtk {

using EdgeRank = unsigned long long;  // 0: no edge

__device__ inline uint32_t key_of(EdgeRank edge) { return static_cast<uint32_t>(edge >> 32); }
// The inverse of order_key; kNanKey gives a NaN.
__device__ inline float similarity_of(uint32_t key) { return __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key); }

__device__ inline float quiet_nan() { return __uint_as_float(0x7fffffffu); }

// By one warp.
template <class T>
__device__ float squared_norm(const T* row, int32_t channels) {
  float squared = 0.0f;
  for (int32_t c = threadIdx.x % 32; c < channels; c += 32)
    squared = __fmaf_rn(to_float(row[c]), to_float(row[c]), squared);
  return warp_reduce(squared, Sum{});
}

// 1 / norm; 0 for a zero vector, NaN for a token without a cosine.
__device__ inline float inverse_norm(float squared) {
  if (!(squared < INFINITY)) return quiet_nan();
  return squared >= kMinSquaredNorm ? __fdiv_rn(1.0f, __fsqrt_rn(squared)) : 0.0f;
}

// How many blocks share the streamed tiles of a stationary one, so that few stationary tiles fill the GPU too.
struct TileParts {
  int32_t parts, part_tiles;  // blocks, streamed tiles of each
};
inline TileParts share_tiles(int32_t batch, int32_t stationary, int32_t streamed) {
  const int32_t tiles = std::max(ceil_div(streamed, kTile), 1);
  const int64_t blocks = int64_t{batch} * ceil_div(stationary, kTile);
  const auto parts = static_cast<int32_t>(std::clamp<int64_t>(ceil_div(kFillBlocks, blocks), 1, tiles));
  const int32_t part_tiles = ceil_div(tiles, parts);
  return {ceil_div(tiles, part_tiles), part_tiles};
}

// Lays arrays one after another into a workspace, each at a multiple of 16 bytes.
struct WorkspaceLayout {
  void* workspace;
  int64_t bytes = 0;
  template <class T>
  void operator()(T*& array, int64_t count) {
    array = reinterpret_cast<T*>(static_cast<char*>(workspace) + bytes);
    bytes += round_up<int64_t>(count * sizeof(T), 16);
  }
};

// Rows that a list names. Its terms belong to the tokens that the list holds.
template <class T>
struct ListedRows {
  const T* data;
  int64_t stride;
  const int32_t* list;
  const float* terms;
  int32_t count;
  bool aligned;
  __device__ const T* row(int32_t i) const { return data + list[i] * stride; }
  __device__ float term(int32_t i) const { return terms[list[i]]; }
};

// Walks [0, count) in order and calls write(i, number) for each i that select(i) chooses; returns how many. By a block
// of kThreads, with sWarps [kThreads / 32]. A thread takes eight neighbours a step: a step has two barriers.
template <int kThreads, class Select, class Write>
__device__ int32_t enumerate(int32_t count, int32_t* sWarps, const Select& select, const Write& write) {
  constexpr int kNeighbours = 8;
  int32_t before = 0;
  for (int32_t step = 0; step < count; step += kThreads * kNeighbours) {
    const int32_t first = step + static_cast<int32_t>(threadIdx.x) * kNeighbours;
    uint32_t chosen = 0;
#pragma unroll
    for (int i = 0; i < kNeighbours; ++i)
      if (first + i < count && select(first + i)) chosen |= 1u << i;
    const Prefix<int32_t> votes = block_prefix<kThreads>(__popc(chosen), sWarps);
    int32_t number = before + votes.before;
    for (; chosen != 0; chosen &= chosen - 1) write(first + __ffs(static_cast<int>(chosen)) - 1, number++);
    before += votes.total;
  }
  return before;
}

// Calls write(row, edge) for the stationary rows [first, first + 64), with the best of `tiles` streamed tiles from
// first_tile on: the largest score(product, term of the stationary row, term of the streamed row). A NaN is never
// better; where every score is NaN, the first streamed row stands with a NaN. No streamed rows give no
// edge. kEarlier: a stationary row meets only the streamed rows of lower number.
template <class T, bool kEarlier = false, class Stationary, class Streamed, class Score, class Write>
__device__ void nearest_rows(unsigned char* shared, float (&sTerms)[2][kTile], const Stationary& stationary,
                             int32_t first, const Streamed& streamed, int32_t first_tile, int32_t tiles,
                             int32_t channels, const Score& score, const Write& write) {
  using Tile = typename TileOf<T>::Type;
  float best[Tile::kRows], terms[Tile::kRows];
  int32_t where[Tile::kRows];
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    best[i] = -INFINITY;
    where[i] = -1;
    terms[i] = stationary.term(min(first + Tile::row(i), stationary.count - 1));
  }

  // Rows beyond the last have a NaN for a term.
  auto begin = [&](int32_t tile, int32_t buffer) {
    if (threadIdx.x >= kTile) return;
    const int32_t row = tile * kTile + threadIdx.x;
    sTerms[buffer][threadIdx.x] = row < streamed.count ? streamed.term(row) : quiet_nan();
  };
  auto reduce = [&](int32_t tile, int32_t buffer, const Tile& products) {
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) {
      const float term = sTerms[buffer][Tile::column(j)];
      const int32_t column = tile * kTile + Tile::column(j);
#pragma unroll
      for (int i = 0; i < Tile::kRows; ++i) {
        const float similarity = score(products.value[i][j], terms[i], term);
        if (similarity > best[i] && (!kEarlier || column < first + Tile::row(i))) {
          best[i] = similarity;
          where[i] = column;
        }
      }
    }
  };
  if (tiles > 0) stream_tiles<T>(shared, stationary, first, streamed, first_tile, tiles, channels, begin, reduce);

  // Agree over the lanes of a row.
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    const int32_t row = first + Tile::row(i), top = first_tile * kTile;
    const bool any = tiles > 0 && (!kEarlier || top < row);
    EdgeRank edge = where[i] >= 0 ? make_rank(order_key(best[i]), where[i]) : any ? make_rank(kNanKey, top) : 0;
    edge = warp_reduce<Tile::kRowLanes>(edge, Max{});
    if (threadIdx.x % Tile::kRowLanes == 0 && row < stationary.count) write(row, edge);
  }
}

}  // namespace vtk
