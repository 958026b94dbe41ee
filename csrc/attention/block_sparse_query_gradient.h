// The gradient of block_sparse_attention for its queries: a query row a lane, as in the forward pass.
// Include only from block_sparse_attention_backward_cpu.cpp.
//
// dq_i = scale sum over listed n of dS_in k_n; three products of D multiply-adds a pair.
#pragma once
#include "attention/block_sparse_attention_backward.h"
#include "attention/block_sparse_lanes.h"

namespace vtk {
namespace VTK_ISA {
namespace {

// The derivative for a logit. A pair without weight has none, whatever its value is.
inline f32v logit_slope(f32v probability, f32v value_slope, f32v delta) {
  return probability == 0.0f ? f32v{} : probability * (value_slope - delta);
}

template <class T>
class QueryGradient {
 public:
  explicit QueryGradient(const BlockSparseAttentionBackwardParams& params)
      : params_(params), p(params.forward), keys_(p.head_dim), values_(p.head_dim) {
    const int64_t rows = round_up(std::min(p.block_q, p.num_queries), kGroup);
    for (Scratch<float>* lanes : {&queries_, &grad_out_, &gradient_}) *lanes = scratch<float>(rows * p.head_dim);
    lse_ = scratch<float>(rows);
    delta_ = scratch<float>(rows);
    limit_ = scratch<int32_t>(rows);
    row_ = scratch<float>(round_up<int64_t>(p.head_dim, kLanes));
    logits_ = scratch<float>(kTileKeys * kGroup);
    slopes_ = scratch<float>(kTileKeys * kGroup);
  }

  // One block of queries of one head.
  void run(int32_t b, int32_t h, int32_t block) {
    const int32_t key_head = h / (p.num_heads / p.key_heads);
    first_row_ = block * p.block_q;
    num_rows_ = std::min(p.block_q, p.num_queries - first_row_);
    first_lse_ = (int64_t{b} * p.num_heads + h) * p.num_queries + first_row_;
    load_queries(b, h);
    KeyStream keys(p, b, h, block, first_row_ + num_rows_ - 1, 0, Entries(p, b, h, block).count());
    while (keys.next(tile_)) {
      keys_.load(p.key, b, key_head, tile_.index, tile_.count);
      values_.load(p.value, b, key_head, tile_.index, tile_.count);
      for (int32_t g = 0; g < ceil_div(num_rows_, kGroup); ++g)
        if (!tile_.causal || tile_.first < limit_[std::min((g + 1) * kGroup, num_rows_) - 1]) add_tile(g);
    }
    write();
  }

 private:
  void load_queries(int32_t b, int32_t h) {
    load_lanes<T>(p.query, b, h, first_row_, num_rows_, p.head_dim, p.scale * kLog2E, queries_.get());
    load_lanes<T>(params_.grad_out, b, h, first_row_, num_rows_, p.head_dim, 1.0f, grad_out_.get());
    const int32_t padded = round_up(num_rows_, kGroup), length = length_of(p, b);
    for (int32_t r = 0; r < padded; ++r) {
      const int32_t row = std::min(r, num_rows_ - 1);
      lse_[r] = p.lse[first_lse_ + row] * kLog2E;
      delta_[r] = params_.delta[first_lse_ + row];
      limit_[r] = limit_of(p, first_row_ + row, length);
    }
    std::fill_n(gradient_.get(), int64_t{padded} * p.head_dim, 0.0f);
  }

  void add_tile(int32_t g) {
    const int64_t at = int64_t{g} * kGroup * p.head_dim;
    keys_.dot(0, tile_.count, &queries_[at], logits_.get());
    values_.dot(0, tile_.count, &grad_out_[at], slopes_.get());
    if (p.key_bias != nullptr) add_bias(tile_, logits_.get());
    if (tile_.causal && tile_.last >= limit_[g * kGroup]) hide(tile_, &limit_[g * kGroup], logits_.get());
    for (int v = 0; v < kGroup; v += kLanes) {
      const f32v lse = load(&lse_[g * kGroup + v]), delta = load(&delta_[g * kGroup + v]);
      for (int32_t n = 0; n < tile_.count; ++n) {
        float* slope = &slopes_[n * kGroup + v];
        store(slope, logit_slope(exp2_bounded(load(&logits_[n * kGroup + v]) - lse), load(slope), delta));
      }
    }
    keys_.add_weighted(0, tile_.count, slopes_.get(), splat(1.0f), splat(1.0f), &gradient_[at]);
  }

  void write() {
    T* out = static_cast<T*>(params_.grad_query) + first_lse_ * p.head_dim;
    for (int32_t r = 0; r < num_rows_; ++r) {
      if (lse_[r] == -kInfinity)
        std::fill_n(row_.get(), p.head_dim, 0.0f);  // no key: whatever the lane holds
      else
        read_lane(lane_of(gradient_.get(), r, p.head_dim), p.head_dim, row_.get());
      store_row(out + int64_t{r} * p.head_dim, row_.get(), p.head_dim, p.scale);
    }
  }

  const BlockSparseAttentionBackwardParams& params_;
  const BlockSparseAttentionParams& p;
  int32_t first_row_ = 0, num_rows_ = 0;
  int64_t first_lse_ = 0;
  KeyTile tile_;
  PackedRows<T> keys_, values_;
  Scratch<float> queries_, grad_out_, gradient_;  // [groups][D][group]
  Scratch<float> lse_, delta_;                    // [rows], lse in powers of two
  Scratch<int32_t> limit_;                        // [rows]
  Scratch<float> row_, logits_, slopes_;          // [D], [keys][group]
};

}  // namespace
}  // namespace VTK_ISA
}  // namespace vtk
