// The keys that a block of queries attends to, a tile of at most kTileKeys at a time.
// Include only from *_cpu.cpp files.
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
#include "common/running_softmax.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "device/tile.h"

namespace vtk {
namespace VTK_ISA {
namespace {

constexpr int kTileKeys = 96;  // 16 register tiles of 6 keys; K and V of 96 keys at D 128 and float32 take 96 KiB

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

// Consecutive keys; `masked`: each query sees those below its limit; `banded`: and not below its window.
struct KeyRange {
  int32_t begin, end;
  bool masked, banded;
};

// The lists of one block of queries as one sequence of entries, those under the causal mask first; or a rule's ranges.
class Entries {
 public:
  Entries(const BlockSparseAttentionParams& p, int32_t b, int32_t h, int32_t row)
      : partial_(list_of(p.partial, b, h, row)),
        columns_(list_of(p.columns, b, h, row)),
        full_(list_of(p.full, b, h, row)),
        block_(p.block_k),
        step_(p.token_offsets ? 1 : p.block_k),
        causal_(p.causal),
        ruled_(p.rule != nullptr) {
    if (ruled_) ranges_ = rule_ranges(p, b, h, row);
  }

  int32_t count() const { return ruled_ ? ranges_.count() : partial_.count + columns_.count + full_.count; }

  // Of an entry, the keys below `length`.
  KeyRange keys(int32_t entry, int32_t length) const {
    if (ruled_) {
      const Range keys = ranges_.keys(entry);
      return {keys.begin, keys.end, true, ranges_.banded && entry >= ranges_.first_window()};
    }
    const int32_t masked = partial_.count + columns_.count;
    if (entry >= partial_.count && entry < masked) {
      const int32_t n = columns_.entries[entry - partial_.count];
      return {n, std::min(n + 1, length), causal_, false};
    }
    const bool under_mask = entry < masked;
    const int64_t start = int64_t{under_mask ? partial_.entries[entry] : full_.entries[entry - masked]} * step_;
    return {static_cast<int32_t>(std::min<int64_t>(start, length)),
            static_cast<int32_t>(std::min<int64_t>(start + block_, length)), causal_ && under_mask, false};
  }

 private:
  List partial_, columns_, full_;
  int32_t block_, step_;
  bool causal_, ruled_;
  RuleRanges ranges_{};  // instead of lists
};

class KeyStream {
 public:
  // Queries [.., last_query] of block `row`; of its entries those in [begin, end).
  KeyStream(const BlockSparseAttentionParams& p, int32_t b, int32_t h, int32_t row, int32_t last_query, int32_t begin,
            int32_t end)
      : entries_(p, b, h, row),
        bias_(p.key_bias == nullptr ? nullptr : p.key_bias + b * p.bias_stride_batch),
        bias_stride_(p.bias_stride_key),
        length_(length_of(p, b)),
        causal_limit_(std::clamp(limit_of(p, last_query, length_), 0, length_)),
        entry_(begin),
        end_(end) {
    open_entry();
  }

  // False when no key is left. A tile has keys under the same masks.
  bool next(KeyTile& tile) {
    tile.count = 0;
    for (; entry_ < end_ && tile.count < kTileKeys;) {
      if (keys_.begin >= keys_.end) {
        ++entry_;
        open_entry();
        continue;
      }
      if (tile.count == 0) {
        tile.causal = keys_.masked;
        tile.banded = keys_.banded;
        tile.first = std::numeric_limits<int32_t>::max();
        tile.last = 0;
      } else if (tile.causal != keys_.masked || tile.banded != keys_.banded) {
        break;
      }
      append(tile);
    }
    return tile.count > 0;
  }

 private:
  void open_entry() {
    if (entry_ >= end_) return;
    keys_ = entries_.keys(entry_, length_);
    if (keys_.masked) keys_.end = std::min(keys_.end, causal_limit_);
  }

  void append(KeyTile& tile) {
    const int32_t first = keys_.begin, count = std::min(keys_.end - keys_.begin, kTileKeys - tile.count);
    keys_.begin += count;
    for (int32_t n = first; n < first + count; ++n) {
      const float bias = bias_ == nullptr ? 0.0f : bias_[n * bias_stride_] * kLog2E;
      if (bias == -kInfinity) continue;
      tile.index[tile.count] = n;
      tile.bias[tile.count++] = bias;
    }
    tile.first = std::min(tile.first, first);
    tile.last = std::max(tile.last, first + count - 1);
  }

  const Entries entries_;
  const float* bias_;
  int64_t bias_stride_;
  int32_t length_, causal_limit_;
  int32_t entry_, end_;
  KeyRange keys_{};  // of the entry, those that are left
};

// to[i] = from[i] * factor; whole vectors of `from` may be read.
template <class T>
void store_row(T* to, const float* from, int32_t count, float factor) {
  int32_t d = 0;
  for (; d + kLanes <= count; d += kLanes) store(to + d, load(from + d) * factor);
  if (d < count) store_partial(to + d, load(from + d) * factor, count - d);
}

// Stores row `row` of [B, H, Q]: its sums of weighted values, unnormalised (whole vectors of them may be read), the
// maximum of its logits in powers of two and the sum of its weights.
template <class T>
void write_row(const BlockSparseAttentionParams& p, int64_t row, const float* values, float most, float sum) {
  store_row(static_cast<T*>(p.out) + row * p.head_dim, values, p.head_dim, inverse_sum(sum));
  p.lse[row] = lse_of(most, sum);
}

}  // namespace
}  // namespace VTK_ISA
}  // namespace vtk
