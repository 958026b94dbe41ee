// The keys that a block of queries attends to, a tile of kKeys key numbers at a time.
//
// A list is read as tiles: those of the partial blocks, of the columns, of the full blocks. block_k is a multiple of
// kKeys, so a tile is part of one block or up to kKeys columns. Tiles of which no row sees a key are left out.
#pragma once
#include <climits>

#include "attention/block_sparse_attention.h"
#include "device/reduce.cuh"
#include "device/tile.h"

namespace vtk {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr float kInfinity = INFINITY;
constexpr int32_t kAbsent = INT_MAX;  // as a key number: no row sees it

enum class TileState : int32_t {
  kEnd,     // no tile is left
  kWhole,   // every row sees every key, without a bias
  kMasked,  // absent keys and bias
  kCausal,  // the same, and the rows' causal limits
};

template <int kKeys>
struct KeyTile {
  TileState state;
  int32_t key[kKeys];
  float bias[kKeys];  // in powers of two
};

struct List {
  const int32_t* entries;
  int32_t count;
};

__device__ inline List list_of(const BlockLists& lists, int32_t b, int32_t h, int32_t row) {
  if (lists.counts == nullptr) return {nullptr, 0};
  const int32_t count =
      lists.counts[b * lists.count_stride_batch + h * lists.count_stride_head + row * lists.count_stride_row];
  return {lists.entries + b * lists.entry_stride_batch + h * lists.entry_stride_head + row * lists.entry_stride_row,
          max(0, min(count, lists.capacity))};
}

__device__ inline int32_t length_of(const BlockSparseAttentionParams& p, int32_t b) {
  return p.seqlens_k == nullptr ? p.num_keys : max(0, min(p.seqlens_k[b * p.seqlens_stride], p.num_keys));
}

// Query i sees keys [0, limit).
__device__ inline int32_t limit_of(const BlockSparseAttentionParams& p, int32_t query, int32_t length) {
  return p.causal ? min(visible_keys(query, p.num_queries, length), length) : length;
}

// All calls are those of one warp.
template <int kKeys>
class KeyTiles {
 public:
  // Of the lists of query block `block`: the tiles of split `split`, for rows of queries [first_query, last_query].
  __device__ KeyTiles(const BlockSparseAttentionParams& params, int32_t b, int32_t h, int32_t block,
                      int32_t first_query, int32_t last_query, int32_t splits, int32_t split)
      : p(params),
        partial_(list_of(p.partial, b, h, block)),
        columns_(list_of(p.columns, b, h, block)),
        full_(list_of(p.full, b, h, block)),
        bias_(p.key_bias == nullptr ? nullptr : p.key_bias + b * p.bias_stride_batch) {
    length_ = length_of(p, b);
    first_limit_ = p.causal ? limit_of(p, first_query, length_) : kAbsent;
    last_limit_ = limit_of(p, last_query, length_);
    entry_limit_ = p.token_offsets ? p.num_keys : ceil_div(p.num_keys, p.block_k);
    block_shift_ = p.block_k == 64 ? 6 : 7;
    const int32_t block_tiles = p.block_k / kKeys;
    partial_tiles_ = partial_.count * block_tiles;
    masked_tiles_ = partial_tiles_ + ceil_div(columns_.count, kKeys);
    const Range range = split_range(masked_tiles_ + full_.count * block_tiles, splits, split);
    tile_ = range.begin;
    end_ = range.end;
  }

  __device__ void next(KeyTile<kKeys>& tile) {
    const int32_t lane = threadIdx.x % 32;
    while (tile_ < end_) {
      const int32_t number = tile_++;
      const bool masked = number < masked_tiles_;
      const uint32_t limit = masked ? last_limit_ : length_;
      const int32_t seen_by_all = masked ? first_limit_ : kAbsent;
      bool any = false, whole = bias_ == nullptr && p.scale >= 0.0f;
#pragma unroll
      for (int i = lane; i < kKeys; i += 32) {
        const uint32_t n = key_at(number, i);
        const float bias = n < limit && bias_ != nullptr ? bias_[n * p.bias_stride_key] * kLog2E : 0.0f;
        const bool present = n < limit && bias != -kInfinity;
        tile.key[i] = present ? static_cast<int32_t>(n) : kAbsent;
        tile.bias[i] = bias;
        any = any || present;
        whole = whole && tile.key[i] < seen_by_all;
      }
      if (!__any_sync(kAllLanes, any)) continue;
      whole = __all_sync(kAllLanes, whole);
      if (lane == 0)
        tile.state = whole ? TileState::kWhole : masked && p.causal ? TileState::kCausal : TileState::kMasked;
      return;
    }
    if (lane == 0) tile.state = TileState::kEnd;
  }

 private:
  // UINT_MAX where there is none.
  __device__ uint32_t key_at(int32_t number, int32_t i) const {
    if (number >= partial_tiles_ && number < masked_tiles_) {
      const int32_t column = (number - partial_tiles_) * kKeys + i;
      return column < columns_.count ? columns_.entries[column] : UINT_MAX;
    }
    const bool partial = number < partial_tiles_;
    const int32_t slot = (partial ? number : number - masked_tiles_) * kKeys;
    const uint32_t entry = (partial ? partial_ : full_).entries[slot >> block_shift_];
    if (entry >= static_cast<uint32_t>(entry_limit_)) return UINT_MAX;
    return entry * (p.token_offsets ? 1 : p.block_k) + (slot & (p.block_k - 1)) + i;
  }

  const BlockSparseAttentionParams& p;
  const List partial_, columns_, full_;
  const float* bias_;
  int32_t length_, first_limit_, last_limit_, entry_limit_;
  int32_t block_shift_, partial_tiles_, masked_tiles_;  // the latter with the columns
  int32_t tile_, end_;
};

}  // namespace
}  // namespace vtk
