// The query rows that attend to a chunk of keys: the lists of block_sparse_attention, read from the keys' side.
//
// Marks tell which chunks of keys the lists of a query block touch. RowLists walks the marked query blocks of all heads
// of a key head, counts how often their lists name each key of the chunk, and cuts the rows into tiles.
#pragma once
#include "attention/block_sparse_attention_backward.h"
#include "attention/block_sparse_key_tiles.cuh"

namespace vtk {
namespace {

// Bit c % 32 of word [b, h, block, c / 32]: the lists of a query block name a key of chunk c that exists and that the
// block's last query sees. One head where all heads share their lists.
struct Marks {
  uint32_t* words;
  int32_t heads, query_blocks, row_words;

  __host__ __device__ int64_t count(int32_t batch) const { return int64_t{batch} * heads * query_blocks * row_words; }
  __device__ uint32_t* row(int32_t b, int32_t h, int32_t block) const {
    return words + ((int64_t{b} * heads + (heads == 1 ? 0 : h)) * query_blocks + block) * row_words;
  }
};

// One list of a query block; every entry is a range of keys.
struct ListedRanges {
  List list;
  uint32_t limit, size;  // entries are below `limit`; keys from an entry to the next
  uint32_t width;        // keys of an entry
  bool causal;           // seen under the causal mask

  // The first key of entry i; UINT_MAX where there is none.
  __device__ uint32_t begin(int32_t i) const {
    const uint32_t entry = i < list.count ? list.entries[i] : UINT_MAX;
    return entry < limit ? entry * size : UINT_MAX;
  }
};

template <class Visit>
__device__ void for_each_list(const BlockSparseAttentionParams& p, int32_t b, int32_t h, int32_t block,
                              const Visit& visit) {
  const uint32_t width = p.block_k, size = p.token_offsets ? 1 : width, limit = ceil_div<uint32_t>(p.num_keys, size);
  visit(ListedRanges{list_of(p.partial, b, h, block), limit, size, width, p.causal});
  visit(ListedRanges{list_of(p.full, b, h, block), limit, size, width, false});
  visit(ListedRanges{list_of(p.columns, b, h, block), static_cast<uint32_t>(p.num_keys), 1, 1, p.causal});
}

// Query `query` and the keys it sees under the causal mask: below the limit; it may be negative.
__device__ inline int32_t causal_limit(const BlockSparseAttentionParams& p, int32_t query, int32_t length) {
  return length - p.num_queries + query + 1;
}

template <int kRows, int kKeys>
struct RowTile {
  TileState state;  // kWhole: every row sees every key once
  int32_t head, first_query;
  int32_t
      first_limit;   // under the causal mask the first row sees the keys below, each row one more than the one before
  float lse[kRows];  // in powers of two; infinity where there is no row, or none that sees a key
  float delta[kRows];
  float causal[kKeys], full[kKeys];  // how often the lists name a key under the causal mask, and without it
};

// In shared memory: one warp reads it.
template <int kRows, int kKeys>
struct RowLists {
  static constexpr int kLaneKeys = (kKeys + 31) / 32;
  int32_t b, first_head, first_key, length;
  int32_t query_blocks, block_tiles;  // tiles are numbered [head][query block][tile of the block]
  int32_t end;
  int32_t causal[kKeys], full[kKeys];  // of the query block; as `exists` and `listed`, each lane its own keys
  float bias[kKeys];                   // in powers of two
  bool exists[kKeys], listed[kKeys];   // listed: by any query block so far

  // Of a chunk of keys of a key head, by all lanes of a warp; a barrier must follow.
  __device__ void open(const BlockSparseAttentionParams& p, int32_t batch_item, int32_t key_head, int32_t chunk) {
    const int32_t group = p.num_heads / p.key_heads, keys = length_of(p, batch_item);
    for (int i = threadIdx.x % 32; i < kKeys; i += 32) {
      const int32_t n = chunk * kKeys + i;
      const bool biased = p.key_bias != nullptr && n < keys;
      bias[i] = biased ? p.key_bias[batch_item * p.bias_stride_batch + n * p.bias_stride_key] * kLog2E : 0.0f;
      exists[i] = n < keys && bias[i] != -kInfinity;
      if (!exists[i]) bias[i] = 0.0f;
      listed[i] = false;
    }
    if (threadIdx.x % 32 == 0) {
      b = batch_item;
      first_head = key_head * group;
      first_key = chunk * kKeys;
      length = keys;
      query_blocks = ceil_div(p.num_queries, p.block_q);
      block_tiles = p.block_q / kRows;
      end = group * query_blocks * block_tiles;
    }
  }

  // The first tile from number `at` on, by all lanes of a warp; returns the number to go on from.
  __device__ int32_t list(const BlockSparseAttentionBackwardParams& params, const Marks& marks, int32_t at,
                          RowTile<kRows, kKeys>& tile) {
    const BlockSparseAttentionParams& p = params.forward;
    const int32_t lane = threadIdx.x % 32;
    while (at < end) {
      if (at % block_tiles == 0) {
        at = next_marked(marks, at);
        if (at >= end) break;
        count_keys(p, first_head + at / block_tiles / query_blocks, at / block_tiles % query_blocks);
      }
      const int32_t number = at / block_tiles, head = first_head + number / query_blocks;
      const int32_t first = number % query_blocks * p.block_q + at % block_tiles * kRows;
      const int32_t rows = min(kRows, p.num_queries - first);
      ++at;
      if (rows <= 0) continue;

      const int32_t first_limit = p.causal ? causal_limit(p, first, length) : kAbsent;
      const int32_t last_limit = p.causal ? first_limit + rows - 1 : kAbsent;
      bool any = false, whole = true;
      for (int i = lane; i < kKeys; i += 32) {
        const int32_t n = first_key + i;
        any = any || full[i] > 0 || (causal[i] > 0 && n < last_limit);
        whole = whole && full[i] + causal[i] == 1 && (full[i] == 1 || n < first_limit);
        tile.causal[i] = static_cast<float>(causal[i]);
        tile.full[i] = static_cast<float>(full[i]);
      }
      if (!__any_sync(kAllLanes, any)) continue;
      whole = __all_sync(kAllLanes, whole);
      const int64_t first_row = (int64_t{b} * p.num_heads + head) * p.num_queries + first;
      for (int i = lane; i < kRows; i += 32) {
        const float lse = i < rows ? p.lse[first_row + i] : -kInfinity;
        tile.lse[i] = lse == -kInfinity ? kInfinity : lse * kLog2E;
        tile.delta[i] = i < rows ? params.delta[first_row + i] : 0.0f;
      }
      if (lane == 0) {
        tile.state = whole ? TileState::kWhole : TileState::kMasked;
        tile.head = head;
        tile.first_query = first;
        tile.first_limit = first_limit;
      }
      return at;
    }
    if (lane == 0) tile.state = TileState::kEnd;
    return at;
  }

 private:
  // The first tile of the next query block that touches the chunk, from the query block of tile `at` on.
  __device__ int32_t next_marked(const Marks& marks, int32_t at) const {
    const int32_t chunk = first_key / kKeys;
    for (; at < end; at += 32 * block_tiles) {
      const int32_t number = at / block_tiles + threadIdx.x % 32;
      bool marked = false;
      if (number < end / block_tiles) {
        const uint32_t* gMarks = marks.row(b, first_head + number / query_blocks, number % query_blocks);
        marked = gMarks[chunk / 32] >> chunk % 32 & 1;
      }
      const unsigned found = __ballot_sync(kAllLanes, marked);
      if (found != 0) return at + (__ffs(found) - 1) * block_tiles;
    }
    return at;
  }

  // How often the lists of a query block name each key that exists. A lane reads every 32nd entry, and counts for its
  // own keys those that any lane found to reach the chunk.
  __device__ void count_keys(const BlockSparseAttentionParams& p, int32_t head, int32_t block) {
    const int32_t lane = threadIdx.x % 32;
    int32_t masked[kLaneKeys] = {}, unmasked[kLaneKeys] = {};
    for_each_list(p, b, head, block, [&](const ListedRanges& ranges) {
      for (int32_t base = 0; base < ranges.list.count; base += 32) {
        const uint32_t begin = ranges.begin(base + lane);
        const bool reaches =
            begin < static_cast<uint32_t>(first_key) + kKeys && begin + ranges.width > static_cast<uint32_t>(first_key);
        for (unsigned left = __ballot_sync(kAllLanes, reaches); left != 0; left &= left - 1) {
          const uint32_t from = __shfl_sync(kAllLanes, begin, __ffs(left) - 1);
#pragma unroll
          for (int k = 0; k < kLaneKeys; ++k) {
            const bool named = first_key + lane + 32 * k - from < ranges.width;
            masked[k] += named && ranges.causal;
            unmasked[k] += named && !ranges.causal;
          }
        }
      }
    });
#pragma unroll
    for (int k = 0; k < kLaneKeys; ++k) {
      const int i = lane + 32 * k;
      if (i >= kKeys) continue;
      causal[i] = exists[i] ? masked[k] : 0;
      full[i] = exists[i] ? unmasked[k] : 0;
      listed[i] = listed[i] || causal[i] + full[i] > 0;
    }
  }
};

}  // namespace
}  // namespace vtk
