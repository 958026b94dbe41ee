// The products of block_sparse_many_rows.h with bfloat16 in pairs: of channels for the logits, of keys for the output.
// Include only from block_sparse_attention_cpu.cpp.
//
// Weights are rounded to bfloat16, their sums are not. The scale is applied to the logits, for scaled queries would
// have to be rounded. Keys are copied, because rows apart by a multiple of 4 KiB fight for the same sets of L1 and an
// odd last channel needs a zero beside it.
#pragma once
#include "attention/block_sparse_lanes.h"
#include "common/bf16_pairs.h"

namespace vtk {
namespace VTK_ISA {
namespace {

// out[channel][group] = out * correction + the sum over `count` pairs of panel[pair][channel] weights[pair][group].
template <int kWidth>
void accumulate_pairs(const Bf16Pair* panel, const Bf16Pair* weights, int32_t count, f32v correct_low,
                      f32v correct_high, float* out) {
  f32v sum[kWidth][2];
#pragma GCC unroll 6
  for (int d = 0; d < kWidth; ++d) {
    sum[d][0] = load(out + d * kGroup) * correct_low;
    sum[d][1] = load(out + d * kGroup + kLanes) * correct_high;
  }
  for (int32_t n = 0; n < count; ++n, panel += kWidth, weights += kGroup) {
    const auto low = load(weights), high = load(weights + kLanes);
#pragma GCC unroll 6
    for (int d = 0; d < kWidth; ++d) {
      multiply_add(sum[d][0], panel[d], low);
      multiply_add(sum[d][1], panel[d], high);
    }
  }
#pragma GCC unroll 6
  for (int d = 0; d < kWidth; ++d) {
    store(out + d * kGroup, sum[d][0]);
    store(out + d * kGroup + kLanes, sum[d][1]);
  }
}

// Values as [panel of kTileRows channels][pair of keys][channel], for rows D apart fall into a few sets of L1. The last
// panel may be narrower.
class PairPanels {
 public:
  PairPanels(int32_t depth, int32_t rows) : depth_(depth), rows_(rows) {
    panels_ = scratch<Bf16Pair>(int64_t{rows} * depth);
  }

  void pack(int32_t i, const Bf16Pair* row) {
    Bf16Pair* to = panels_.get();
    int32_t d = 0;
    for (; d + kTileRows <= depth_; d += kTileRows, to += rows_ * kTileRows)
      std::memcpy(to + i * kTileRows, row + d, kTileRows * sizeof(Bf16Pair));
    const int32_t rest = depth_ - d;
    std::memcpy(to + i * rest, row + d, static_cast<size_t>(rest) * sizeof(Bf16Pair));
  }

  // out[D][group] = out * (low, high) + the first `count` rows^T weights
  void accumulate_rows(int32_t count, const Bf16Pair* weights, f32v low, f32v high, float* out) const {
    const Bf16Pair* panel = panels_.get();
    int32_t d = 0;
    for (; d + kTileRows <= depth_; d += kTileRows, panel += rows_ * kTileRows, out += kTileRows * kGroup)
      accumulate_pairs<kTileRows>(panel, weights, count, low, high, out);
    switch (depth_ - d) {
      case 1: return accumulate_pairs<1>(panel, weights, count, low, high, out);
      case 2: return accumulate_pairs<2>(panel, weights, count, low, high, out);
      case 3: return accumulate_pairs<3>(panel, weights, count, low, high, out);
      case 4: return accumulate_pairs<4>(panel, weights, count, low, high, out);
      case 5: return accumulate_pairs<5>(panel, weights, count, low, high, out);
      default: return;
    }
  }

 private:
  int32_t depth_, rows_;
  Scratch<Bf16Pair> panels_;
};

class PairProducts {
 public:
  using Input = bf16;

  PairProducts(const BlockSparseAttentionParams& params, int64_t rows)
      : p(params), pairs_(ceil_div(p.head_dim, 2)), values_(p.head_dim, kTileKeys / 2) {
    queries_ = scratch<Bf16Pair>(rows * pairs_);
    keys_ = scratch<Bf16Pair>(int64_t{kTileKeys} * pairs_);
    row_ = scratch<Bf16Pair>(p.head_dim);
    weights_ = scratch<Bf16Pair>(kTileKeys / 2 * kGroup);
  }

  void load_queries(int32_t b, int32_t h, int32_t first, int32_t count) {
    for (int32_t r = 0; r < round_up(count, kGroup); ++r) {
      const bf16* from = row_of<bf16>(p.query, b, h, first + std::min(r, count - 1));
      Bf16Pair* lane = &queries_[int64_t{r / kGroup} * kGroup * pairs_ + r % kGroup];
      for (int32_t d = 0; d < p.head_dim; d += 2)
        lane[d / 2 * kGroup] = pair_of(from[d], d + 1 < p.head_dim ? from[d + 1] : bf16{});
    }
  }

  void load_tile(const KeyTile& tile, int32_t b, int32_t head) {
    for (int32_t i = 0; i < tile.count; ++i) {
      Bf16Pair* key = &keys_[int64_t{i} * pairs_];
      key[pairs_ - 1] = {};
      std::memcpy(key, row_of<bf16>(p.key, b, head, tile.index[i]), static_cast<size_t>(p.head_dim) * sizeof(bf16));
      key_[i] = key;
    }
    for (int32_t i = tile.count; i < round_up(tile.count, kTileRows); ++i) key_[i] = key_[tile.count - 1];
    for (int32_t i = 0; i < tile.count; i += 2) {
      const bf16* first = row_of<bf16>(p.value, b, head, tile.index[i]);
      interleave(first, i + 1 < tile.count ? row_of<bf16>(p.value, b, head, tile.index[i + 1]) : nullptr);
      values_.pack(i / 2, row_.get());
    }
  }

  void dot_keys(int32_t g, int32_t count, float* logits) const {
    for (int32_t i = 0; i < count; i += kTileRows) {
      f32v dot[kTileRows][2];
      dot_tile(&key_[i], &queries_[int64_t{g} * kGroup * pairs_], pairs_, dot);
#pragma GCC unroll 6
      for (int r = 0; r < kTileRows; ++r)
        for (int v = 0; v < 2; ++v) store(&logits[(i + r) * kGroup + v * kLanes], dot[r][v] * (p.scale * kLog2E));
    }
  }

  void add_values(const float* weights, int32_t count, f32v low, f32v high, float* out) {
    for (int32_t n = 0; n < count; n += 2)
      for (int v = 0; v < kGroup; v += kLanes) {
        const float* first = &weights[n * kGroup + v];
        store(&weights_[n / 2 * kGroup + v], pairs_of(load(first), n + 1 < count ? load(first + kGroup) : f32v{}));
      }
    values_.accumulate_rows(ceil_div(count, 2), weights_.get(), low, high, out);
  }

 private:
  // row_[channel] = (first, second); zeros for a second that is not there, whose weight is zero too.
  void interleave(const bf16* first, const bf16* second) {
    int32_t d = 0;
    if (second != nullptr)
      for (; d + kLanes <= p.head_dim; d += kLanes) store(&row_[d], load_pairs(first + d, second + d));
    for (; d < p.head_dim; ++d) row_[d] = pair_of(first[d], second == nullptr ? bf16{} : second[d]);
  }

  const BlockSparseAttentionParams& p;
  int32_t pairs_;  // of channels
  const Bf16Pair* key_[kTileKeys];
  Scratch<Bf16Pair> queries_;  // [groups][pairs][group]
  Scratch<Bf16Pair> keys_;     // [keys][pairs]
  Scratch<Bf16Pair> row_;      // [D]
  Scratch<Bf16Pair> weights_;  // [pairs of keys][group]
  PairPanels values_;
};

}  // namespace
}  // namespace VTK_ISA
}  // namespace vtk
