// The keys that a block of queries attends to, a tile of at most kTileKeys at a time.
// Include only from block_sparse_attention_cpu.cpp.
//
// A tile is an array of key numbers: blocks, unaligned ranges and single columns become one thing, and a tile is full
// whatever the block size is. Keys beyond the length, beyond what the last query sees, and keys whose bias is -inf are
// left out here, so no NaN in padding is ever read.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/attention_rule.h"
#include "attention/block_sparse_attention.h"
#include "common/narrow.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "device/tile.h"

namespace vtk {
namespace VTK_ISA {
namespace {

constexpr int kTileKeys = 96;  // 16 register tiles of 6 keys; K and V of 96 keys at D 128 and float32 take 96 KiB
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

struct KeyTile {
  int32_t count = 0;
  bool causal = false;       // the queries' limits apply
  bool banded = false;       // and the beginnings of their windows
  int32_t index[kTileKeys];  // ascending within a list entry
  float bias[kTileKeys];     // in powers of two
  int32_t first, last;       // the lowest and the highest index
};

inline int32_t length_of(const BlockSparseAttentionParams& p, int32_t b) {
  return p.seqlens_k == nullptr ? p.num_keys : p.seqlens_k[b * p.seqlens_stride];
}

// Query i sees keys [0, limit).
inline int32_t limit_of(const BlockSparseAttentionParams& p, int32_t query, int32_t length) {
  return p.causal ? visible_keys(query, p.num_queries, length) : length;
}

inline int32_t first_key_of(const BlockSparseAttentionParams& p, int32_t b) {
  return p.starts_k == nullptr ? 0 : p.starts_k[b * p.starts_stride];
}

inline AttentionRule rule_of(const BlockSparseAttentionParams& p, int32_t b, int32_t h) {
  return AttentionRule::read(p.rule + h * p.rule_stride_head, p.num_keys - first_key_of(p, b));
}

// With a rule: the key at which the window of a query begins.
inline int32_t window_of(const BlockSparseAttentionParams& p, int32_t b, int32_t h, int32_t query, int32_t length) {
  const int32_t first_key = first_key_of(p, b);
  return first_key + rule_of(p, b, h).window_start(query + length - p.num_queries - first_key);
}

inline RuleRanges rule_ranges(const BlockSparseAttentionParams& p, int32_t b, int32_t h, int32_t row) {
  const int32_t first_key = first_key_of(p, b);
  const int32_t first = row * p.block_q, last = std::min(first + p.block_q, p.num_queries) - 1;
  const int32_t to_position = length_of(p, b) - p.num_queries - first_key;
  RuleRanges ranges;
  ranges.open(rule_of(p, b, h), first + to_position, last + to_position, first_key);
  return ranges;
}

// One list of one block of queries.
struct List {
  const int32_t* entries;
  int32_t count;
};

inline List list_of(const BlockLists& lists, int32_t b, int32_t h, int32_t row) {
  if (lists.counts == nullptr) return {nullptr, 0};
  return {lists.entries + b * lists.entry_stride_batch + h * lists.entry_stride_head + row * lists.entry_stride_row,
          lists.counts[b * lists.count_stride_batch + h * lists.count_stride_head + row * lists.count_stride_row]};
}

class KeyStream {
 public:
  // Queries [.., last_query] of block `row`; of the lists' entries (or the rule's ranges), taken as one sequence, those
  // in [begin, end).
  KeyStream(const BlockSparseAttentionParams& p, int32_t b, int32_t h, int32_t row, int32_t last_query, int32_t begin,
            int32_t end)
      : p_(p),
        lists_{list_of(p.partial, b, h, row), list_of(p.columns, b, h, row), list_of(p.full, b, h, row)},
        bias_(p.key_bias == nullptr ? nullptr : p.key_bias + b * p.bias_stride_batch),
        entry_(begin),
        end_(end) {
    length_ = length_of(p, b);
    causal_limit_ = std::clamp(limit_of(p, last_query, length_), 0, length_);
    if (p.rule != nullptr) rule_ = rule_ranges(p, b, h, row);
    open_entry();
  }

  static int32_t num_entries(const BlockSparseAttentionParams& p, int32_t b, int32_t h, int32_t row) {
    if (p.rule != nullptr) return rule_ranges(p, b, h, row).count();
    return list_of(p.partial, b, h, row).count + list_of(p.columns, b, h, row).count + list_of(p.full, b, h, row).count;
  }

  // False when no key is left. A tile has keys under the same masks.
  bool next(KeyTile& tile) {
    tile.count = 0;
    for (; entry_ < end_ && tile.count < kTileKeys;) {
      if (next_key_ >= end_key_) {
        ++entry_;
        open_entry();
        continue;
      }
      if (tile.count == 0) {
        tile.causal = p_.causal && under_mask_;
        tile.banded = banded_;
        tile.first = std::numeric_limits<int32_t>::max();
        tile.last = 0;
      } else if (tile.causal != (p_.causal && under_mask_) || tile.banded != banded_) {
        break;
      }
      append(tile);
    }
    return tile.count > 0;
  }

 private:
  void open_entry() {
    next_key_ = end_key_ = 0;
    if (entry_ >= end_) return;
    if (p_.rule != nullptr) {
      const Range keys = rule_.keys(entry_);
      next_key_ = keys.begin;
      end_key_ = keys.end;
      banded_ = rule_.banded && entry_ >= rule_.first_window();
      return;
    }
    const auto& [partial, columns, full] = lists_;
    under_mask_ = entry_ < partial.count + columns.count;
    if (entry_ >= partial.count && under_mask_) {
      next_key_ = columns.entries[entry_ - partial.count];
      end_key_ = next_key_ + 1;
    } else {
      const int32_t entry =
          under_mask_ ? partial.entries[entry_] : full.entries[entry_ - partial.count - columns.count];
      const int64_t start = int64_t{entry} * (p_.token_offsets ? 1 : p_.block_k);
      next_key_ = static_cast<int32_t>(std::min<int64_t>(start, length_));
      end_key_ = static_cast<int32_t>(std::min<int64_t>(start + p_.block_k, length_));
    }
    end_key_ = std::min(end_key_, under_mask_ ? causal_limit_ : length_);
  }

  void append(KeyTile& tile) {
    const int32_t first = next_key_, count = std::min(end_key_ - next_key_, kTileKeys - tile.count);
    next_key_ += count;
    for (int32_t n = first; n < first + count; ++n) {
      const float bias = bias_ == nullptr ? 0.0f : bias_[n * p_.bias_stride_key] * kLog2E;
      if (bias == -kInfinity) continue;
      tile.index[tile.count] = n;
      tile.bias[tile.count++] = bias;
    }
    tile.first = std::min(tile.first, first);
    tile.last = std::max(tile.last, first + count - 1);
  }

  const BlockSparseAttentionParams& p_;
  const List lists_[3];  // partial, columns, full
  RuleRanges rule_;      // instead of lists
  const float* bias_;
  int32_t length_, causal_limit_;
  int32_t entry_, end_;
  int32_t next_key_, end_key_;
  bool under_mask_ = true, banded_ = false;
};

// Stores row `row` of [B, H, Q]: its sums of weighted values, unnormalised (whole vectors of them may be read), the
// maximum of its logits in powers of two and the sum of its weights.
template <class T>
void write_row(const BlockSparseAttentionParams& p, int64_t row, const float* values, float most, float sum) {
  T* out = static_cast<T*>(p.out) + row * p.head_dim;
  const float by_sum = sum == 0.0f ? 0.0f : 1.0f / sum;  // a NaN is a sum too
  int32_t d = 0;
  for (; d + kLanes <= p.head_dim; d += kLanes) store(out + d, load(values + d) * by_sum);
  if (d < p.head_dim) store_partial(out + d, load(values + d) * by_sum, p.head_dim - d);
  p.lse[row] = sum == 0.0f ? -kInfinity : (most + std::log2(sum)) * kLn2;
}

}  // namespace
}  // namespace VTK_ISA
}  // namespace vtk
