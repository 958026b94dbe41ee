// block_sparse_attention for few query rows (decoding): lanes over D, bound by reading K and V once.
// Include only from block_sparse_attention_cpu.cpp.
//
// The query heads that share a key head are rows of one task when they share their lists, so that K and V are read once
// for all of them. Long lists are cut into parts that run in parallel; part p's maximum, sum and weighted values are
// merged in the order of the parts.
#pragma once
#include "attention/block_sparse_keys.h"

namespace vtk {
namespace VTK_ISA {
namespace {

constexpr int kFewRows = 5;          // accumulators of two keys that fit 16 registers; more rows go into lanes
constexpr int kLine = 64;            // bytes
constexpr int kToL1 = 3, kToL2 = 2;  // of __builtin_prefetch

// Keys and vectors of channels of a register tile, by rows: about 8 accumulators cover the latency of two FMA units.
constexpr int kKeysOf[kFewRows + 1] = {0, 8, 4, 3, 2, 2};
constexpr int kVectorsOf[kFewRows + 1] = {0, 8, 4, 4, 2, 2};

// Where channel d of a row lies among floats: pairs of vectors are dealt.
template <class T>
int32_t place(int32_t d, int32_t depth) {
  constexpr int32_t kPair = 2 * kLanes;
  return d < depth / kPair * kPair ? d / kPair * kPair + dealt_lane<T>(d % kPair) : d;
}

// Rows that will be read soon, asked for one by one: prefetchers of the processor stop at every page.
template <class T>
struct RowsAhead {
  const T* const* row;
  const T* const* end;
  int32_t depth;

  template <int kLocality>
  void fetch() {
    if (row == end) return;
    for (int32_t d = 0; d < depth; d += kLine / static_cast<int32_t>(sizeof(T)))
      __builtin_prefetch(*row + d, 0, kLocality);
    ++row;
  }
};

// lanes[row * kTileKeys + i], summed over its lanes, is rows[row] . key i, for kKeysOf[kRows] keys; rows are dealt and
// zero-padded to whole vectors.
template <int kRows, class T>
void multiply_keys(const float* rows, int32_t padded, const T* const* keys, int32_t depth, f32v* lanes) {
  constexpr int kKeys = kKeysOf[kRows];
  f32v sum[kRows][kKeys] = {};
  int32_t d = 0;
  for (; d + 2 * kLanes <= depth; d += 2 * kLanes) {
    f32v key[kKeys][2];
#pragma GCC unroll 8
    for (int k = 0; k < kKeys; ++k) load_dealt(keys[k] + d, key[k][0], key[k][1]);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v)
#pragma GCC unroll 5
      for (int r = 0; r < kRows; ++r) {
        const f32v row = load(rows + r * padded + d + v * kLanes);
#pragma GCC unroll 8
        for (int k = 0; k < kKeys; ++k) sum[r][k] += row * key[k][v];
      }
  }
  for (; d < depth; d += kLanes) {
#pragma GCC unroll 8
    for (int k = 0; k < kKeys; ++k) {
      const f32v key = d + kLanes <= depth ? load(keys[k] + d) : load_partial(keys[k] + d, depth - d);
#pragma GCC unroll 5
      for (int r = 0; r < kRows; ++r) sum[r][k] += load(rows + r * padded + d) * key;
    }
  }
#pragma GCC unroll 5
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int k = 0; k < kKeys; ++k) lanes[r * kTileKeys + k] = sum[r][k];
}

// out[row][D] = out * correct[row] + sum of weights[row * kTileKeys + i] * value i, over kVectors vectors of channels;
// one vector may be partial. Every so many values a row ahead is fetched.
template <int kRows, int kVectors, class T>
void accumulate_values(const T* const* values, RowsAhead<T>& ahead, int32_t every, int32_t count, const float* weights,
                       const float* correct, int32_t width, int32_t channel, int32_t padded, float* out) {
  f32v sum[kRows][kVectors];
#pragma GCC unroll 5
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load(out + r * padded + channel + v * kLanes) * correct[r];
  for (int32_t i = 0; i < count;) {
    ahead.template fetch<kToL1>();
    for (const int32_t end = std::min(count, i + every); i < end; ++i) {
      const T* from = values[i] + channel;
      f32v value[kVectors];
      if constexpr (kVectors == 1) {
        value[0] = width == kLanes ? load(from) : load_partial(from, width);
      } else {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v += 2) load_dealt(from + v * kLanes, value[v], value[v + 1]);
      }
#pragma GCC unroll 5
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[r][v] += weights[r * kTileKeys + i] * value[v];
    }
  }
#pragma GCC unroll 5
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(out + r * padded + channel + v * kLanes, sum[r][v]);
}
template <class T>
class FewRows {
 public:
  // group: query heads of a task.
  FewRows(const BlockSparseAttentionParams& params, int32_t group)
      : p(params), group_(group), rows_(params.num_queries * group), padded_(round_up(params.head_dim, kLanes)) {
    queries_ = scratch<float>(int64_t{rows_} * padded_);
    lanes_ = scratch<f32v>(int64_t{rows_} * kTileKeys);
    logits_ = scratch<float>(int64_t{rows_} * kTileKeys);
    limit_ = scratch<int32_t>(rows_);
    window_ = scratch<int32_t>(rows_);
    correct_ = scratch<float>(rows_);
  }

  // The entries [begin, end) of the lists of heads [h, h + group).
  void run(int32_t b, int32_t h, int32_t begin, int32_t end, const PartialRows& out) {
    b_ = b;
    h_ = h;
    load_queries();
    std::fill_n(out.values, int64_t{rows_} * padded_, 0.0f);
    std::fill_n(out.most, rows_, -kInfinity);
    std::fill_n(out.sum, rows_, 0.0f);
    KeyStream keys(p, b, h, 0, p.num_queries - 1, begin, end);
    Tile *now = &tiles_[0], *next = &tiles_[1];
    for (bool more = load_tile(keys, *now); more; std::swap(now, next)) {
      more = load_tile(keys, *next);
      const Tile& ahead = more ? *next : *now;
      switch (rows_) {
        case 1: attend<1>(*now, ahead, out); break;
        case 2: attend<2>(*now, ahead, out); break;
        case 3: attend<3>(*now, ahead, out); break;
        case 4: attend<4>(*now, ahead, out); break;
        default: attend<5>(*now, ahead, out); break;
      }
    }
  }

 private:
  struct Tile {
    KeyTile keys;
    const T *key[kTileKeys], *value[kTileKeys];  // the last one repeats
  };

  bool load_tile(KeyStream& keys, Tile& tile) const {
    if (!keys.next(tile.keys)) return false;
    const int32_t key_head = h_ / (p.num_heads / p.key_heads);
    for (int32_t i = 0; i < kTileKeys; ++i) {
      const int32_t n = tile.keys.index[std::min(i, tile.keys.count - 1)];
      tile.key[i] = row_at(p.key, key_head, n);
      tile.value[i] = row_at(p.value, key_head, n);
    }
    return true;
  }

  // Row r is query r / group of head h + r % group.
  void load_queries() {
    const float scale = p.scale * kLog2E;
    const int32_t length = length_of(p, b_);
    for (int32_t r = 0; r < rows_; ++r) {
      const PackedRow at = packed_row(r, group_);
      const T* from = row_at(p.query, h_ + at.head, at.query);
      float* to = &queries_[int64_t{r} * padded_];
      for (int32_t d = 0; d < p.head_dim; ++d) to[place<T>(d, p.head_dim)] = to_float(from[d]) * scale;
      std::fill(to + p.head_dim, to + padded_, 0.0f);
      limit_[r] = limit_of(p, at.query, length);
      if (p.rule != nullptr) window_[r] = window_of(p, b_, h_ + at.head, at.query, length);
    }
  }

  const T* row_at(const HeadsView& x, int32_t head, int32_t n) const {
    return static_cast<const T*>(x.data) + b_ * x.stride_batch + head * x.stride_head + n * x.stride_row;
  }

  template <int kRows>
  void attend(const Tile& tile, const Tile& ahead, const PartialRows& out) {
    constexpr int kKeys = kKeysOf[kRows];
    const KeyTile& keys = tile.keys;
    const int32_t padded_count = round_up(keys.count, kLanes);
    RowsAhead<T> values{tile.value, tile.value + keys.count, p.head_dim};
    for (int32_t i = 0; i < keys.count; i += kKeys) {
      for (int k = 0; k < kKeys; ++k) values.template fetch<kToL2>();
      multiply_keys<kRows>(queries_.get(), padded_, &tile.key[i], p.head_dim, &lanes_[i]);
    }
    for (int32_t r = 0; r < kRows; ++r) {
      float* x = &logits_[r * kTileKeys];
      for (int32_t i = 0; i < padded_count; i += kLanes) {
        f32v dots[kLanes];
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) dots[j] = lanes_[r * kTileKeys + i + j];
        store(x + i, reduce_each(dots, [](f32v a, f32v b) { return a + b; }));
      }
      for (int32_t i = keys.count; i < padded_count; ++i) x[i] = -kInfinity;
      if (p.key_bias != nullptr)
        for (int32_t i = 0; i < keys.count; ++i) x[i] += keys.bias[i];
      if (keys.causal && keys.last >= limit_[r])
        for (int32_t i = 0; i < keys.count; ++i) x[i] = keys.index[i] < limit_[r] ? x[i] : -kInfinity;
      if (keys.banded && keys.first < window_[r])
        for (int32_t i = 0; i < keys.count; ++i) x[i] = keys.index[i] >= window_[r] ? x[i] : -kInfinity;
      fold_logits(x, padded_count, out.most[r], out.sum[r], correct_[r]);
    }
    RowsAhead<T> next{ahead.key, ahead.key + ahead.keys.count, p.head_dim};
    int32_t channel = accumulate<kRows, kVectorsOf[kRows]>(tile, next, 0, out);
    if constexpr (kVectorsOf[kRows] > 2) channel = accumulate<kRows, 2>(tile, next, channel, out);
    accumulate<kRows, 1>(tile, next, channel, out);
  }

  // The second product from `channel` on, kVectors vectors at a time; the first channel that is left.
  template <int kRows, int kVectors>
  int32_t accumulate(const Tile& tile, RowsAhead<T>& ahead, int32_t channel, const PartialRows& out) {
    constexpr int32_t kWidth = kVectors * kLanes, kLeast = kVectors == 1 ? 1 : kWidth;
    const int32_t every = std::max(1, p.head_dim / kWidth);
    for (; channel + kLeast <= p.head_dim; channel += kWidth)
      accumulate_values<kRows, kVectors>(tile.value, ahead, every, tile.keys.count, logits_.get(), correct_.get(),
                                         std::min(kWidth, p.head_dim - channel), channel, padded_, out.values);
    return channel;
  }

  const BlockSparseAttentionParams& p;
  const int32_t group_, rows_, padded_;
  int32_t b_ = 0, h_ = 0;
  Tile tiles_[2];
  Scratch<float> queries_;           // [rows][padded], scaled, dealt
  Scratch<f32v> lanes_;              // [rows][kTileKeys], dot products before their last sum
  Scratch<float> logits_;            // [rows][kTileKeys]
  Scratch<int32_t> limit_, window_;  // [rows], the latter with a rule
  Scratch<float> correct_;
};

// Merges the parts of row r in their order and stores it as row `to` of the output.
template <class T>
void merge_parts(const BlockSparseAttentionParams& p, const PartialRows* parts, int32_t num_parts, int32_t r,
                 int32_t padded, int64_t to, float* values) {
  float most, sum;
  merge_row(parts, num_parts, r, padded, values, most, sum);
  float* row = values + padded;
  for (int32_t d = 0; d < p.head_dim; ++d) row[d] = values[place<T>(d, p.head_dim)];
  write_row<T>(p, to, row, most, sum);
}

}  // namespace
}  // namespace VTK_ISA
}  // namespace vtk
