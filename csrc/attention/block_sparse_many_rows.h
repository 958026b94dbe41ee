// block_sparse_attention for blocks of query rows: one row a lane, keys and values broadcast (block_sparse_lanes.h).
// Include only from block_sparse_attention_cpu.cpp.
//
// Because a lane is a row, softmax needs no horizontal step. The products with keys and values are those of a class: of
// FloatProducts, or of PairProducts (block_sparse_pairs.h).
#pragma once
#include "attention/block_sparse_lanes.h"

namespace vtk {
namespace VTK_ISA {
namespace {

template <class T>
class FloatProducts {
 public:
  using Input = T;

  FloatProducts(const BlockSparseAttentionParams& params, int64_t rows)
      : p(params), keys_(p.head_dim), values_(p.head_dim), queries_(scratch<float>(rows * p.head_dim)) {}

  void load_queries(int32_t b, int32_t h, int32_t first, int32_t count) {
    load_lanes<T>(p.query, b, h, first, count, p.head_dim, p.scale * kLog2E, queries_.get());
  }

  void load_tile(const KeyTile& tile, int32_t b, int32_t head) {
    keys_.load(p.key, b, head, tile.index, tile.count);
    values_.load(p.value, b, head, tile.index, tile.count);
  }

  // logits[keys][group] of group g, in powers of two
  void dot_keys(int32_t g, int32_t count, float* logits) const {
    keys_.dot(0, count, &queries_[int64_t{g} * kGroup * p.head_dim], logits);
  }

  // out[D][group] = out * (low, high) + v^T weights[keys][group]
  void add_values(const float* weights, int32_t count, f32v low, f32v high, float* out) const {
    values_.add_weighted(0, count, weights, low, high, out);
  }

 private:
  const BlockSparseAttentionParams& p;
  PackedRows<T> keys_, values_;
  Scratch<float> queries_;  // [groups][D][group], scaled
};

template <class Products>
class ManyRows {
 public:
  using T = typename Products::Input;

  explicit ManyRows(const BlockSparseAttentionParams& params) : p(params), products_(p, padded_rows(p)) {
    const int64_t rows = padded_rows(p);
    out_ = scratch<float>(rows * p.head_dim);
    max_ = scratch<float>(rows);
    sum_ = scratch<float>(rows);
    limit_ = scratch<int32_t>(rows);
    window_ = scratch<int32_t>(rows);
    row_ = scratch<float>(round_up<int64_t>(p.head_dim, kLanes));
    logits_ = scratch<float>(kTileKeys * kGroup);
  }

  // One block of queries of one head.
  void run(int32_t b, int32_t h, int32_t block) {
    b_ = b;
    h_ = h;
    key_head_ = h / (p.num_heads / p.key_heads);
    first_row_ = block * p.block_q;
    num_rows_ = std::min(p.block_q, p.num_queries - first_row_);
    load_queries();
    KeyStream keys(p, b, h, block, first_row_ + num_rows_ - 1, 0, Entries(p, b, h, block).count());
    while (keys.next(tile_)) {
      products_.load_tile(tile_, b, key_head_);
      for (int32_t g = 0; g < num_groups(); ++g)
        if (sees_tile(g)) attend(g);
    }
    write();
  }

 private:
  static int64_t padded_rows(const BlockSparseAttentionParams& p) {
    return round_up(std::min(p.block_q, p.num_queries), kGroup);
  }
  int32_t num_groups() const { return ceil_div(num_rows_, kGroup); }
  int32_t last_row(int32_t g) const { return std::min((g + 1) * kGroup, num_rows_) - 1; }
  bool sees_tile(int32_t g) const {
    return (!tile_.causal || tile_.first < limit_[last_row(g)]) && (!tile_.banded || tile_.last >= window_[g * kGroup]);
  }

  void load_queries() {
    products_.load_queries(b_, h_, first_row_, num_rows_);
    const int32_t padded = num_groups() * kGroup, length = length_of(p, b_);
    for (int32_t r = 0; r < padded; ++r) {
      const int32_t query = first_row_ + std::min(r, num_rows_ - 1);
      limit_[r] = limit_of(p, query, length);
      if (p.rule != nullptr) window_[r] = window_of(p, b_, h_, query, length);
    }
    std::fill_n(max_.get(), padded, -kInfinity);
    std::fill_n(sum_.get(), padded, 0.0f);
    std::fill_n(out_.get(), int64_t{padded} * p.head_dim, 0.0f);
  }

  void attend(int32_t g) {
    products_.dot_keys(g, tile_.count, logits_.get());
    if (p.key_bias != nullptr) add_bias(tile_, logits_.get());
    if (tile_.causal && tile_.last >= limit_[g * kGroup]) hide(tile_, &limit_[g * kGroup], logits_.get());
    if (tile_.banded && tile_.first < window_[last_row(g)]) hide_before(tile_, &window_[g * kGroup], logits_.get());
    f32v correct_low, correct_high;
    softmax(g, 0, correct_low);
    softmax(g, kLanes, correct_high);
    products_.add_values(logits_.get(), tile_.count, correct_low, correct_high,
                         &out_[int64_t{g} * kGroup * p.head_dim]);
  }

  // Folds the tile's logits into the rows' maxima and sums and leaves 2^(logit - maximum). `correct` is what the sums
  // so far are multiplied with. A maximum may miss a NaN; the sum does not.
  void softmax(int32_t g, int lane, f32v& correct) {
    float *x = &logits_[lane], *most = &max_[g * kGroup + lane], *total = &sum_[g * kGroup + lane];
    const f32v before = load(most);
    f32v now = before;
    for (int32_t n = 0; n < tile_.count; ++n) now = max(load(x + n * kGroup), now);
    const f32v shift = now == -kInfinity ? f32v{} : now;
    correct = before == now ? splat(1.0f) : exp2_bounded(before - now);
    f32v sum = {};
    for (int32_t n = 0; n < tile_.count; ++n) {
      const f32v e = exp2_bounded(load(x + n * kGroup) - shift);
      store(x + n * kGroup, e);
      sum += e;
    }
    store(most, now);
    store(total, load(total) * correct + sum);
  }

  void write() {
    for (int32_t r = 0; r < num_rows_; ++r) {
      const int64_t row = (int64_t{b_} * p.num_heads + h_) * p.num_queries + first_row_ + r;
      read_lane(lane_of(out_.get(), r, p.head_dim), p.head_dim, row_.get());
      write_row<T>(p, row, row_.get(), max_[r], sum_[r]);
    }
  }

  const BlockSparseAttentionParams& p;
  int32_t b_ = 0, h_ = 0, key_head_ = 0, first_row_ = 0, num_rows_ = 0;
  KeyTile tile_;
  Products products_;
  Scratch<float> out_;           // [groups][D][group]
  Scratch<float> max_, sum_;     // [rows], the maximum in powers of two
  Scratch<int32_t> limit_;       // [rows]
  Scratch<int32_t> window_;      // [rows], with a rule
  Scratch<float> row_, logits_;  // [D], [keys][group]
};

}  // namespace
}  // namespace VTK_ISA
}  // namespace vtk
