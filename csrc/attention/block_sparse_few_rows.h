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

constexpr int kFewRows = 5;  // accumulators of two keys that fit 16 registers; more rows go into lanes
constexpr int kLine = 64;    // bytes

// lanes[row * kTileKeys + i], summed over its lanes, is rows[row] . key i, for two keys; rows are zero-padded to whole
// vectors.
template <int kRows, class T>
void multiply_pair(const float* rows, int32_t padded, const T* const* keys, int32_t depth, f32v* lanes) {
  f32v sum[kRows][2] = {};
  int32_t d = 0;
  for (; d + kLanes <= depth; d += kLanes) {
    const f32v first = load(keys[0] + d), second = load(keys[1] + d);
#pragma GCC unroll 5
    for (int r = 0; r < kRows; ++r) {
      const f32v row = load(rows + r * padded + d);
      sum[r][0] += row * first;
      sum[r][1] += row * second;
    }
  }
  if (d < depth) {
    const f32v first = load_partial(keys[0] + d, depth - d), second = load_partial(keys[1] + d, depth - d);
#pragma GCC unroll 5
    for (int r = 0; r < kRows; ++r) {
      const f32v row = load(rows + r * padded + d);
      sum[r][0] += row * first;
      sum[r][1] += row * second;
    }
  }
#pragma GCC unroll 5
  for (int r = 0; r < kRows; ++r) {
    lanes[r * kTileKeys] = sum[r][0];
    lanes[r * kTileKeys + 1] = sum[r][1];
  }
}

// out[row][D] = out * correct[row] + sum of weights[row * kTileKeys + i] * value i, over whole vectors of channels and
// the last, partial one.
template <int kRows, int kVectors, class T>
void accumulate_values(const T* const* values, int32_t count, const float* weights, const float* correct,
                       int32_t channel, int32_t width, int32_t padded, float* out) {
  f32v sum[kRows][kVectors];
#pragma GCC unroll 5
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load(out + r * padded + channel + v * kLanes) * correct[r];
  for (int32_t i = 0; i < count; ++i) {
    f32v value[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const T* from = values[i] + channel + v * kLanes;
      value[v] = width == kVectors * kLanes ? load(from) : load_partial(from, width);
    }
#pragma GCC unroll 5
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] += weights[r * kTileKeys + i] * value[v];
  }
#pragma GCC unroll 5
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(out + r * padded + channel + v * kLanes, sum[r][v]);
}

// What one part of a task leaves: rows of weighted values, their maxima and sums.
struct PartialRows {
  float* values;  // [rows][padded]
  float* most;    // [rows], in powers of two
  float* sum;     // [rows]
};

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
    while (keys.next(tile_)) {
      switch (rows_) {
        case 1: attend<1>(out); break;
        case 2: attend<2>(out); break;
        case 3: attend<3>(out); break;
        case 4: attend<4>(out); break;
        default: attend<5>(out); break;
      }
    }
  }

 private:
  // Row r is query r / group of head h + r % group.
  void load_queries() {
    const float scale = p.scale * kLog2E;
    const int32_t length = length_of(p, b_);
    for (int32_t r = 0; r < rows_; ++r) {
      const PackedRow at = packed_row(r, group_);
      const T* from = row_at(p.query, h_ + at.head, at.query);
      float* to = &queries_[int64_t{r} * padded_];
      for (int32_t d = 0; d < p.head_dim; ++d) to[d] = to_float(from[d]) * scale;
      std::fill(to + p.head_dim, to + padded_, 0.0f);
      limit_[r] = limit_of(p, at.query, length);
      if (p.rule != nullptr) window_[r] = window_of(p, b_, h_ + at.head, at.query, length);
    }
  }

  const T* row_at(const HeadsView& x, int32_t head, int32_t n) const {
    return static_cast<const T*>(x.data) + b_ * x.stride_batch + head * x.stride_head + n * x.stride_row;
  }

  template <int kRows>
  void attend(const PartialRows& out) {
    const int32_t key_head = h_ / (p.num_heads / p.key_heads), padded_count = round_up(tile_.count, kLanes);
    for (int32_t i = 0; i < round_up(tile_.count, 2); ++i) {
      const int32_t n = tile_.index[std::min(i, tile_.count - 1)];
      key_[i] = row_at(p.key, key_head, n);
      value_[i] = row_at(p.value, key_head, n);
    }
    for (int32_t i = 0; i < tile_.count; i += 2) {
      for (int j = i; j < i + 2; ++j) prefetch(key_[j] + kAhead * p.key.stride_row, value_[j]);
      multiply_pair<kRows>(queries_.get(), padded_, &key_[i], p.head_dim, &lanes_[i]);
    }
    for (int32_t r = 0; r < kRows; ++r) {
      float* x = &logits_[r * kTileKeys];
      for (int32_t i = 0; i < padded_count; i += kLanes) {
        f32v dots[kLanes];
        std::memcpy(dots, &lanes_[r * kTileKeys + i], sizeof dots);
        store(x + i, reduce_each(dots, [](f32v a, f32v b) { return a + b; }));
      }
      for (int32_t i = tile_.count; i < padded_count; ++i) x[i] = -kInfinity;
      if (p.key_bias != nullptr)
        for (int32_t i = 0; i < tile_.count; ++i) x[i] += tile_.bias[i];
      if (tile_.causal && tile_.last >= limit_[r])
        for (int32_t i = 0; i < tile_.count; ++i) x[i] = tile_.index[i] < limit_[r] ? x[i] : -kInfinity;
      if (tile_.banded && tile_.first < window_[r])
        for (int32_t i = 0; i < tile_.count; ++i) x[i] = tile_.index[i] >= window_[r] ? x[i] : -kInfinity;
      softmax(x, padded_count, out.most[r], out.sum[r], correct_[r]);
    }
    int32_t channel = 0;
    for (; channel + 2 * kLanes <= p.head_dim; channel += 2 * kLanes)
      accumulate_values<kRows, 2>(value_, tile_.count, logits_.get(), correct_.get(), channel, 2 * kLanes, padded_,
                                  out.values);
    for (; channel < p.head_dim; channel += kLanes)
      accumulate_values<kRows, 1>(value_, tile_.count, logits_.get(), correct_.get(), channel,
                                  std::min(kLanes, p.head_dim - channel), padded_, out.values);
  }

  // The key that follows some way behind in a run of keys, and this key's value for the second product: prefetchers
  // stop at every page.
  static constexpr int32_t kAhead = 16;
  void prefetch(const T* key, const T* value) const {
    for (int32_t d = 0; d < p.head_dim; d += kLine / static_cast<int32_t>(sizeof(T))) {
      __builtin_prefetch(key + d);
      __builtin_prefetch(value + d);
    }
  }

  static void softmax(float* x, int32_t count, float& most, float& sum, float& correct) {
    f32v best = splat(most);
    for (int32_t i = 0; i < count; i += kLanes) best = max(load(x + i), best);
    const float now = max(best), shift = now == -kInfinity ? 0.0f : now;
    correct = most == now ? 1.0f : exp2_bounded(splat(most - now))[0];
    f32v total = {};
    for (int32_t i = 0; i < count; i += kLanes) {
      const f32v e = exp2_bounded(load(x + i) - shift);
      store(x + i, e);
      total += e;
    }
    sum = sum * correct + vtk::VTK_ISA::sum(total);
    most = now;
  }

  const BlockSparseAttentionParams& p;
  const int32_t group_, rows_, padded_;
  int32_t b_ = 0, h_ = 0;
  KeyTile tile_;
  const T *key_[kTileKeys], *value_[kTileKeys];
  Scratch<float> queries_;           // [rows][padded], scaled
  Scratch<f32v> lanes_;              // [rows][kTileKeys], dot products before their last sum
  Scratch<float> logits_;            // [rows][kTileKeys]
  Scratch<int32_t> limit_, window_;  // [rows], the latter with a rule
  Scratch<float> correct_;
};

// Merges the parts of row r in their order and stores it as row `to` of the output.
template <class T>
void merge_parts(const BlockSparseAttentionParams& p, const PartialRows* parts, int32_t num_parts, int32_t r,
                 int32_t padded, int64_t to, float* values) {
  float most = -kInfinity, sum = 0.0f;
  for (int32_t i = 0; i < num_parts; ++i) most = std::max(most, parts[i].most[r]);
  std::fill_n(values, padded, 0.0f);
  for (int32_t i = 0; i < num_parts; ++i) {
    if (parts[i].sum[r] == 0.0f) continue;
    const float weight = parts[i].most[r] == most ? 1.0f : exp2_bounded(splat(parts[i].most[r] - most))[0];
    sum += weight * parts[i].sum[r];
    const float* from = parts[i].values + int64_t{r} * padded;
    for (int32_t d = 0; d < padded; d += kLanes) store(values + d, load(values + d) + weight * load(from + d));
  }
  write_row<T>(p, to, values, most, sum);
}

}  // namespace
}  // namespace VTK_ISA
}  // namespace vtk
