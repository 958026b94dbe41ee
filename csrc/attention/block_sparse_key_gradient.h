// The gradients of block_sparse_attention for its keys and values: a key a lane, query rows broadcast.
// Include only from block_sparse_attention_backward_cpu.cpp.
//
// dk_n = scale sum over i of dS_in q_i, dv_n = sum over i of P_in grad_out_i; four products of D multiply-adds a pair.
// A task is a chunk of keys of one key head. It meets, head after head of its group, the blocks of queries that list a
// key of it. How often a block lists each key is counted first: blocks may begin at any key, and a key may be listed
// more than once.
#pragma once
#include "attention/block_sparse_query_gradient.h"
#include "attention/block_sparse_transposed_lists.h"

namespace vtk {
namespace VTK_ISA {
namespace {

constexpr int32_t kMaxChunkKeys = 128;

// Keys, values and both gradients of a chunk stay in the L2: 256 KiB at most.
constexpr int32_t chunk_keys(int32_t depth) { return depth <= 128 ? kMaxChunkKeys : kMaxChunkKeys / 2; }

template <class T>
class KeyGradient {
 public:
  KeyGradient(const BlockSparseAttentionBackwardParams& params, const TransposedLists& lists)
      : params_(params),
        p(params.forward),
        lists_(lists),
        chunk_keys_(chunk_keys(p.head_dim)),
        num_groups_(chunk_keys_ / kGroup),
        queries_(p.head_dim),
        grad_out_(p.head_dim) {
    for (Scratch<float>* lanes : {&keys_, &values_, &grad_keys_, &grad_values_})
      *lanes = scratch<float>(int64_t{chunk_keys_} * p.head_dim);
    row_ = scratch<float>(round_up<int64_t>(p.head_dim, kLanes));
    probabilities_ = scratch<float>(kTileKeys * kGroup);
    slopes_ = scratch<float>(kTileKeys * kGroup);
  }

  void run(int32_t b, int32_t key_head, int32_t chunk) {
    b_ = b;
    length_ = length_of(p, b);
    first_key_ = chunk * chunk_keys_;
    num_keys_ = std::min(chunk_keys_, p.num_keys - first_key_);
    load_keys(key_head);
    const int32_t group = p.num_heads / p.key_heads;
    for (int32_t h = key_head * group; h < (key_head + 1) * group; ++h) {
      const Touch *touch = lists_.begin(b, h, chunk), *end = lists_.end(b, h, chunk);
      while (touch != end) {
        const int32_t block = touch->row;
        count_keys(Entries(p, b, h, block), touch, end);
        add_queries(h, block);
      }
    }
    write(key_head);
  }

 private:
  // A lane without a key, or with one that is excluded, holds zeros.
  void load_keys(int32_t key_head) {
    for (int32_t i = 0; i < chunk_keys_; ++i) {
      const int32_t n = first_key_ + i;
      const bool exists = n < length_;
      bias_[i] = exists && p.key_bias != nullptr ? p.key_bias[b_ * p.bias_stride_batch + n * p.bias_stride_key] * kLog2E
                                                 : 0.0f;
      usable_[i] = exists && bias_[i] != -kInfinity;
      listed_[i] = false;
      float *key = lane_of(keys_.get(), i, p.head_dim), *value = lane_of(values_.get(), i, p.head_dim);
      if (usable_[i]) {
        load_lane(row_of<T>(p.key, b_, key_head, n), p.head_dim, p.scale * kLog2E, key);
        load_lane(row_of<T>(p.value, b_, key_head, n), p.head_dim, 1.0f, value);
      } else {
        clear_lane(p.head_dim, key);
        clear_lane(p.head_dim, value);
      }
    }
    for (float* gradient : {grad_keys_.get(), grad_values_.get()})
      std::fill_n(gradient, int64_t{chunk_keys_} * p.head_dim, 0.0f);
  }

  // How often the block of `touch` lists each key, under the causal mask and without it; passes over its touches.
  void count_keys(const Entries& entries, const Touch*& touch, const Touch* end) {
    std::fill_n(masked_, chunk_keys_, 0.0f);
    std::fill_n(open_, chunk_keys_, 0.0f);
    for (const int32_t block = touch->row; touch != end && touch->row == block; ++touch) {
      const KeyRange keys = entries.keys(touch->entry, length_);
      const int32_t last = std::min(keys.end - first_key_, chunk_keys_);
      for (int32_t i = std::max(keys.begin - first_key_, 0); i < last; ++i) {
        if (!usable_[i]) continue;
        (keys.masked ? masked_ : open_)[i] += 1.0f;
        listed_[i] = true;
      }
    }
    for (int32_t g = 0; g < num_groups_; ++g) first_query_[g] = first_seeing(g * kGroup);
  }

  // The first query that sees a key of the group which begins at lane `first`; num_queries when none does.
  int32_t first_seeing(int32_t first) const {
    int32_t query = p.num_queries;
    for (int32_t i = first + kGroup - 1; i >= first; --i) {
      if (open_[i] != 0.0f) return 0;
      if (masked_[i] != 0.0f) query = std::max(0, first_key_ + i - (length_ - p.num_queries));
    }
    return query;
  }

  void add_queries(int32_t h, int32_t block) {
    const int32_t end = std::min((block + 1) * p.block_q, p.num_queries);
    int32_t query = std::max(block * p.block_q, *std::min_element(first_query_, first_query_ + num_groups_));
    while (query < end) {
      const int32_t tiles = ceil_div(end - query, kTileKeys);
      const int32_t last = std::min(query + round_up(ceil_div(end - query, tiles), kTileRows), end);
      load_tile(h, query, last);
      query = last;
      if (count_ == 0) continue;
      for (int32_t g = 0; g < num_groups_; ++g)
        if (first_query_[g] <= index_[count_ - 1]) add_tile(g);
    }
  }

  // Queries [begin, end) of head h, without those that have no key: not even a NaN of theirs reaches one.
  void load_tile(int32_t h, int32_t begin, int32_t end) {
    count_ = 0;
    const int64_t head = (int64_t{b_} * p.num_heads + h) * p.num_queries;
    for (int32_t query = begin; query < end; ++query) {
      if (p.lse[head + query] == -kInfinity) continue;
      index_[count_] = query;
      lse_[count_] = p.lse[head + query] * kLog2E;
      delta_[count_] = params_.delta[head + query];
      limit_[count_++] = limit_of(p, query, length_);
    }
    if (count_ == 0) return;
    queries_.load(p.query, b_, h, index_, count_);
    grad_out_.load(params_.grad_out, b_, h, index_, count_);
  }

  void add_tile(int32_t g) {
    const int64_t at = int64_t{g} * kGroup * p.head_dim;
    int32_t begin = static_cast<int32_t>(std::lower_bound(index_, index_ + count_, first_query_[g]) - index_);
    begin = begin / kTileRows * kTileRows;
    queries_.dot(begin, count_, &keys_[at], probabilities_.get());
    grad_out_.dot(begin, count_, &values_[at], slopes_.get());
    for (int v = 0; v < kGroup; v += kLanes) weigh(g * kGroup + v, v, begin);
    const f32v one = splat(1.0f);
    grad_out_.add_weighted(begin, count_, probabilities_.get(), one, one, &grad_values_[at]);
    queries_.add_weighted(begin, count_, slopes_.get(), one, one, &grad_keys_[at]);
  }

  // Turns logits into probabilities and the derivatives for probabilities into those for logits: the keys from lane
  // `first` of the chunk on, lane `v` of the group.
  void weigh(int32_t first, int v, int32_t begin) {
    const f32v bias = load(&bias_[first]), masked = load(&masked_[first]), open = load(&open_[first]);
    i32v key;
    for (int lane = 0; lane < kLanes; ++lane) key[lane] = first_key_ + first + lane;
    for (int32_t r = begin; r < count_; ++r) {
      float *probability = &probabilities_[r * kGroup + v], *slope = &slopes_[r * kGroup + v];
      const f32v times = open + (key < limit_[r] ? masked : f32v{});
      const f32v logit = times == 0.0f ? splat(-kInfinity) : load(probability) + (bias - lse_[r]);
      const f32v weight = times * exp2_bounded(logit);
      store(slope, logit_slope(weight, load(slope), splat(delta_[r])));
      store(probability, weight);
    }
  }

  void write(int32_t key_head) {
    const int64_t first = ((int64_t{b_} * p.key_heads + key_head) * p.num_keys + first_key_) * p.head_dim;
    write(grad_keys_.get(), p.scale, static_cast<T*>(params_.grad_key) + first);
    write(grad_values_.get(), 1.0f, static_cast<T*>(params_.grad_value) + first);
  }

  void write(float* gradient, float factor, T* to) {
    for (int32_t i = 0; i < num_keys_; ++i) {
      if (listed_[i])
        read_lane(lane_of(gradient, i, p.head_dim), p.head_dim, row_.get());
      else
        std::fill_n(row_.get(), p.head_dim, 0.0f);  // a NaN in a query of another key's block is in its lane
      store_row(to + int64_t{i} * p.head_dim, row_.get(), p.head_dim, factor);
    }
  }

  const BlockSparseAttentionBackwardParams& params_;
  const BlockSparseAttentionParams& p;
  const TransposedLists& lists_;
  const int32_t chunk_keys_, num_groups_;
  int32_t b_ = 0, length_ = 0, first_key_ = 0, num_keys_ = 0;

  // The chunk.
  Scratch<float> keys_, values_, grad_keys_, grad_values_;  // [groups][D][group]
  float bias_[kMaxChunkKeys];                               // in powers of two
  float masked_[kMaxChunkKeys], open_[kMaxChunkKeys];       // how often a block of queries lists a key
  bool usable_[kMaxChunkKeys], listed_[kMaxChunkKeys];
  int32_t first_query_[kMaxChunkKeys / kGroup];

  // The tile of queries.
  PackedRows<T> queries_, grad_out_;
  int32_t count_ = 0;
  int32_t index_[kTileKeys], limit_[kTileKeys];
  float lse_[kTileKeys], delta_[kTileKeys];      // lse in powers of two
  Scratch<float> row_, probabilities_, slopes_;  // [D], [queries][group]
};

}  // namespace
}  // namespace VTK_ISA
}  // namespace vtk
