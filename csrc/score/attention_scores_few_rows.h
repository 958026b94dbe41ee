// attention_scores for 1 to kFewRows query rows: dot products with lanes over D, bound by reading K once.
// Include only from attention_scores_cpu.cpp.
//
// First the logits of all heads, by batch item and block of keys: K is read in the order in which it lies, head by head
// or, when heads are interleaved as a projection leaves them, a few whole tokens at a time (reading it head by head
// then halves the bandwidth). The second pass takes the heads in turn: softmax and the reduction over rows.
#pragma once
#include "score/attention_scores_unit.h"

namespace vtk {
namespace VTK_ISA {
namespace {

constexpr int kLine = 64;

// The products of one query row, zero-padded to whole vectors, with kLanes keys, while the next kLanes are on their
// way: prefetchers stop at every page, and pages of 4 KiB hold few keys (23 MB of D 128: 1.05 ms without, 0.70 with).
template <class T>
f32v dot(const float* q, const T* k, int64_t stride, int32_t depth) {
  f32v sum[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {  // keys in turn: the prefetcher follows one stream of whole rows best
    const T* row = k + i * stride;
    for (int32_t d = 0; d < depth; d += kLine / sizeof(T)) __builtin_prefetch(row + kLanes * stride + d);
    f32v even = {}, odd = {};
    int32_t d = 0;
    for (; d + 4 * kLanes <= depth; d += 4 * kLanes) {
      even += load(q + d) * load(row + d);
      odd += load(q + d + kLanes) * load(row + d + kLanes);
      even += load(q + d + 2 * kLanes) * load(row + d + 2 * kLanes);
      odd += load(q + d + 3 * kLanes) * load(row + d + 3 * kLanes);
    }
    for (; d + kLanes <= depth; d += kLanes) even += load(q + d) * load(row + d);
    if (d < depth) odd += load(q + d) * load_partial(row + d, depth - d);
    sum[i] = even + odd;
  }
  return reduce_each(sum, combine<false>);
}

template <class T>
class FewRows : Unit {
 public:
  // logits: [B, H, Q, padded_keys], shared by all threads.
  FewRows(const AttentionScoresParams& params, const Plan& plan, float* logits)
      : Unit(params, plan),
        rows_(p.num_heads / p.key_heads * p.num_queries),
        depth_(static_cast<int32_t>(round_up<int64_t>(params.head_dim, kLanes))),
        logits_(logits) {
    queries_ = scratch<float>(int64_t{p.num_heads} * p.num_queries * depth_);
    keys_ = scratch<float>(int64_t{kLanes} * depth_);
  }

  static int64_t num_blocks(const AttentionScoresParams& p) { return (p.num_keys + kBlockKeys - 1) / kBlockKeys; }

  // Logits of all heads of one batch item with one block of keys.
  void compute_logits(int64_t unit) {
    select_batch(static_cast<int32_t>(unit / num_blocks(p)));
    const int32_t first = static_cast<int32_t>(unit % num_blocks(p)) * kBlockKeys;
    const int32_t end = std::min(first + kBlockKeys, p.num_keys);
    if (loaded_batch_ != batch_) load_queries();
    const bool interleaved = p.key_stride_head < p.key_stride_row;
    const int32_t span = interleaved ? kLanes : kBlockKeys;
    for (int32_t begin = first; begin < end; begin += span)
      for (int32_t key_head = 0; key_head < p.key_heads; ++key_head)
        for (int32_t n = begin; n < std::min(begin + span, end); n += kLanes) multiply_keys(key_head, n, end - n);
  }

  // Writes the scores of one unit, reduced over its rows.
  void run(int64_t unit, float* scores) {
    select(unit);
    std::fill_n(scores, plan.padded_keys, 0.0f);
    while (take_rows()) {
      for (int32_t r = 0; r < num_rows_; ++r) {
        hide_keys(r);
        if (p.lse == nullptr)
          softmax(r);
        else
          exponentiate(r);
        if (p.query_reduce == Reduce::kMax)
          add_row<true>(r, scores);
        else
          add_row<false>(r, scores);
      }
    }
  }

 private:
  float* logits(int32_t head, int32_t query) {
    return logits_ + ((int64_t{batch_} * p.num_heads + head) * p.num_queries + query) * plan.padded_keys;
  }

  // [key head][query head of the group][row] as float32, padded with zeros.
  void load_queries() {
    loaded_batch_ = batch_;
    float* to = queries_.get();
    for (int32_t h = 0; h < p.num_heads; ++h)
      for (int32_t q = 0; q < p.num_queries; ++q, to += depth_) {
        const T* from = query_at<T>(h, q);
        for (int32_t d = 0; d < p.head_dim; ++d) to[d] = to_float(from[d]);
        std::fill(to + p.head_dim, to + depth_, 0.0f);
      }
  }

  // Keys n ... n + kLanes (`left` of them exist) of one key head with all rows that read it.
  void multiply_keys(int32_t key_head, int32_t n, int32_t left) {
    const float scale = p.scale * kLog2E;
    const float* q = &queries_[int64_t{key_head} * rows_ * depth_];
    float* to = logits(key_head * (p.num_heads / p.key_heads), 0) + n;
    const T* k = key_at<T>(key_head, n);
    if (left >= kLanes && (rows_ == 1 || sizeof(T) == sizeof(float))) {
      for (int32_t r = 0; r < rows_; ++r)
        store(to + r * plan.padded_keys, dot(q + r * depth_, k, p.key_stride_row, p.head_dim) * scale);
    } else {
      convert_keys(k, std::min(kLanes, left));  // once for all rows
      for (int32_t r = 0; r < rows_; ++r)
        store(to + r * plan.padded_keys, dot(q + r * depth_, keys_.get(), depth_, depth_) * scale);
    }
  }

  // kLanes keys as float32, zeros beyond `count`.
  void convert_keys(const T* k, int32_t count) {
    for (int i = 0; i < kLanes; ++i)
      for (int32_t d = 0; d < depth_; d += kLanes) {
        const int width = i < count ? std::min(kLanes, p.head_dim - d) : 0;
        const T* from = k + i * p.key_stride_row + d;
        store(&keys_[i * depth_ + d], width == kLanes ? load(from) : load_partial(from, width));
      }
  }

  // Keys that the row does not see, by mask or causally, and the rest of the last vector get -inf.
  void hide_keys(int32_t r) {
    float* x = logits(head_, query_[r]);
    for (int64_t n = limit_[r]; n < round_up<int64_t>(limit_[r], kLanes); ++n) x[n] = -kInfinity;
    if (excluded_ == nullptr) return;
    for (int32_t n = 0; n < limit_[r]; ++n) x[n] = excluded_[n] ? -kInfinity : x[n];
  }

  void softmax(int32_t r) {
    float* x = logits(head_, query_[r]);
    f32v best = splat(-kInfinity);
    for (int32_t n = 0; n < limit_[r]; n += kLanes) best = max(best, load(x + n));
    const float most = max(best);
    const f32v shift = splat(most == -kInfinity ? 0.0f : most);  // nothing seen: all probabilities 0
    f32v total = {};
    for (int32_t begin = 0; begin < limit_[r]; begin += kSumKeys * kLanes) {
      f32v part = {};
      for (int32_t n = begin; n < std::min(begin + kSumKeys * kLanes, limit_[r]); n += kLanes) {
        f32v e = exp2_bounded(load(x + n) - shift);
        store(x + n, e);
        part += e;
      }
      total += part;
    }
    const float all = sum(total);
    weight_[r] = all == 0.0f ? 0.0f : 1.0f / all;
  }

  void exponentiate(int32_t r) {
    float* x = logits(head_, query_[r]);
    for (int32_t n = 0; n < limit_[r]; n += kLanes) store(x + n, exp2(load(x + n) - shift_[r]));
  }

  template <bool kMax>
  void add_row(int32_t r, float* scores) {
    const float* x = logits(head_, query_[r]);
    const f32v weight = splat(weight_[r]);
    auto combined = [&](int32_t n) { return combine<kMax>(load(scores + n), weight * load(x + n)); };
    int32_t n = 0;
    if (excluded_ == nullptr) {
      for (; n + kLanes <= limit_[r]; n += kLanes) store(scores + n, combined(n));
    }
    for (; n < limit_[r]; n += kLanes) {  // 0 * NaN of a NaN row must not reach a key that the row does not see
      f32v next = combined(n);
      for (int32_t lane = 0; lane < std::min(kLanes, limit_[r] - n); ++lane)
        if (excluded_ == nullptr || !excluded_[n + lane]) scores[n + lane] = next[lane];
    }
  }

  const int32_t rows_;   // that read one key head
  const int32_t depth_;  // D rounded up to whole vectors
  float* logits_;
  Scratch<float> queries_, keys_;  // [H][Q][depth], [kLanes][depth]
  int32_t loaded_batch_ = -1;
};

}  // namespace
}  // namespace VTK_ISA
}  // namespace vtk
