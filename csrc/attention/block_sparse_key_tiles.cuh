// The keys that a block of queries attends to, a tile of kKeys key numbers at a time.
//
// A list is read as tiles: those of the partial blocks, of the columns, of the full blocks. block_k is a multiple of
// kKeys, so a tile is part of one block or up to kKeys columns; of a rule, a tile is part of a range. Tiles of which no
// row sees a key are left out.
#pragma once
#include <climits>

#include "attention/attention_rule.h"
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
  kBanded,  // the same, and where the rows' windows begin
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

__device__ inline int32_t first_key_of(const BlockSparseAttentionParams& p, int32_t b) {
  return p.starts_k == nullptr ? 0 : max(0, min(p.starts_k[b * p.starts_stride], p.num_keys));
}

// The lists, or the rule, of one block of queries, in shared memory: one warp reads them.
template <int kKeys>
struct KeyLists {
  List partial, columns, full;
  const float* bias;
  int64_t bias_stride;
  int32_t length, first_limit, last_limit, entry_limit;
  int32_t entry_size;                   // keys from an entry to the next
  int32_t block_shift;                  // block_k = 2^block_shift
  int32_t partial_tiles, masked_tiles;  // the latter with the columns
  Range tiles;                          // to be taken
  bool causal, unmasked;                // unmasked: tiles without a bias exist
  int32_t banded_from, last_window;     // tiles within windows that differ; where the last query's begins
  bool ruled;                           // in place of lists:
  AttentionRule rule;
  RuleRanges ranges;
  int32_t to_position;  // from a query's number

  // Of query block `block`: the tiles of part `part` of `parts`, for rows of queries [first_query, last_query].
  __device__ void open(const BlockSparseAttentionParams& p, int32_t b, int32_t h, int32_t block, int32_t first_query,
                       int32_t last_query, int32_t parts, int32_t part) {
    partial = list_of(p.partial, b, h, block);
    columns = list_of(p.columns, b, h, block);
    full = list_of(p.full, b, h, block);
    bias = p.key_bias == nullptr ? nullptr : p.key_bias + b * p.bias_stride_batch;
    bias_stride = p.bias_stride_key;
    length = length_of(p, b);
    first_limit = p.causal ? limit_of(p, first_query, length) : kAbsent;
    last_limit = limit_of(p, last_query, length);
    entry_limit = p.token_offsets ? p.num_keys : ceil_div(p.num_keys, p.block_k);
    entry_size = p.token_offsets ? 1 : p.block_k;
    block_shift = p.block_k == 64 ? 6 : 7;
    const int32_t block_tiles = p.block_k / kKeys;
    partial_tiles = partial.count * block_tiles;
    masked_tiles = partial_tiles + ceil_div(columns.count, kKeys);
    tiles = split_range(masked_tiles + full.count * block_tiles, parts, part);
    causal = p.causal;
    unmasked = p.key_bias == nullptr && p.scale >= 0.0f;
    banded_from = INT_MAX;
    last_window = 0;
    ranges = {};  // compilers read some of it before they test whether there is a rule
    ruled = p.rule != nullptr;
    if (!ruled) return;
    const int32_t first_key = first_key_of(p, b);
    rule = AttentionRule::read(p.rule + h * p.rule_stride_head, p.num_keys - first_key);
    to_position = length - p.num_queries - first_key;
    ranges.open(rule, first_query + to_position, last_query + to_position, first_key);
    last_window = window_of(last_query);
    if (ranges.banded) banded_from = ranges.first_window() * kRangeTiles;
    masked_tiles = ranges.count() * kRangeTiles;
    tiles = split_range(masked_tiles, parts, part);
  }

  // The key at which the rule's window of a query begins.
  __device__ int32_t window_of(int32_t query) const {
    return ranges.first_key + rule.window_start(query + to_position);
  }

  // The first tile from number `at` on, by all lanes of a warp; returns the number to go on from.
  __device__ int32_t list(int32_t at, KeyTile<kKeys>& tile) const {
    const int32_t lane = threadIdx.x % 32;
    while (at < tiles.end) {
      const int32_t number = at++;
      const bool masked = number < masked_tiles;
      const uint32_t limit = masked ? last_limit : length;
      const int32_t seen_by_all = masked ? first_limit : kAbsent;
      const bool banded = number >= banded_from;
      const int32_t seen_from = banded ? last_window : 0;
      bool any = false, whole = unmasked;
#pragma unroll
      for (int i = lane; i < kKeys; i += 32) {
        const uint32_t n = key_at(number, i);
        const float added = n < limit && bias != nullptr ? bias[n * bias_stride] * kLog2E : 0.0f;
        const bool present = n < limit && added != -kInfinity;
        tile.key[i] = present ? static_cast<int32_t>(n) : kAbsent;
        tile.bias[i] = added;
        any = any || present;
        whole = whole && present && static_cast<int32_t>(n) < seen_by_all && static_cast<int32_t>(n) >= seen_from;
      }
      if (!__any_sync(kAllLanes, any)) continue;
      whole = __all_sync(kAllLanes, whole);
      if (lane == 0)
        tile.state = whole              ? TileState::kWhole
                     : banded           ? TileState::kBanded
                     : masked && causal ? TileState::kCausal
                                        : TileState::kMasked;
      return at;
    }
    if (lane == 0) tile.state = TileState::kEnd;
    return at;
  }

 private:
  static constexpr int32_t kRangeTiles = kRuleBlock / kKeys;

  // Key i of a tile; UINT_MAX where there is none.
  __device__ uint32_t key_at(int32_t number, int32_t i) const {
    if (ruled) {
      const Range keys = ranges.keys(number / kRangeTiles);
      const uint32_t n = keys.begin + number % kRangeTiles * kKeys + i;
      return n < static_cast<uint32_t>(keys.end) ? n : UINT_MAX;
    }
    if (number >= partial_tiles && number < masked_tiles) {
      const int32_t column = (number - partial_tiles) * kKeys + i;
      return column < columns.count ? columns.entries[column] : UINT_MAX;
    }
    const bool in_partial = number < partial_tiles;
    const int32_t slot = (in_partial ? number : number - masked_tiles) * kKeys;
    const uint32_t entry = (in_partial ? partial.entries : full.entries)[slot >> block_shift];
    if (entry >= static_cast<uint32_t>(entry_limit)) return UINT_MAX;
    return entry * entry_size + (slot & ((1 << block_shift) - 1)) + i;
  }
};

}  // namespace
}  // namespace vtk
