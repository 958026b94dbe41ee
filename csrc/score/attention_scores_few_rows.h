// attention_scores for 1 to kFewRows query rows: dot products with lanes over D, bound by reading K once.
// Include only from attention_scores_cpu.cpp.
#pragma once
#include "score/attention_scores_unit.h"

namespace vtk {
namespace VTK_ISA {
namespace {

// The products of one query row, zero-padded to whole vectors, with kLanes keys.
template <class T>
f32v dot(const float* q, const T* k, int64_t stride, int32_t depth) {
  f32v sum[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {  // keys in turn: the prefetcher follows one stream of whole rows best
    const T* row = k + i * stride;
    f32v total = {};
    int32_t d = 0;
    for (; d + kLanes <= depth; d += kLanes) total += load(q + d) * load(row + d);
    if (d < depth) total += load(q + d) * load_partial(row + d, depth - d);
    sum[i] = total;
  }
  return reduce_each(sum, combine<false>);
}

template <class T>
class FewRows : Unit {
 public:
  FewRows(const AttentionScoresParams& params, const Plan& plan)
      : Unit(params, plan), depth_(static_cast<int32_t>(round_up(params.head_dim, kLanes))) {
    logits_ = scratch<float>(plan.tile_rows * plan.padded_keys);
    queries_ = scratch<float>(int64_t{plan.tile_rows} * depth_);
    keys_ = scratch<float>(int64_t{kLanes} * depth_);
  }

  // Writes the scores of one unit, reduced over its rows.
  void run(int64_t unit, float* scores) {
    select(unit);
    std::fill_n(scores, plan.padded_keys, 0.0f);
    while (take_rows()) {
      load_queries();
      compute_logits();
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
  float* logits(int32_t r) { return &logits_[r * plan.padded_keys]; }

  void load_queries() {
    for (int32_t r = 0; r < num_rows_; ++r) {
      const T* from = query_row<T>(r);
      float* to = &queries_[r * depth_];
      for (int32_t d = 0; d < p.head_dim; ++d) to[d] = to_float(from[d]);
      std::fill(to + p.head_dim, to + depth_, 0.0f);
    }
  }

  void compute_logits() {
    const int32_t end = last_limit();
    const float scale = p.scale * kLog2E;
    for (int32_t n = 0; n < end; n += kLanes) {
      const bool whole = end - n >= kLanes;
      const T* k = key_row<T>(n);
      if (whole && (num_rows_ == 1 || sizeof(T) == sizeof(float))) {
        for (int32_t r = 0; r < num_rows_; ++r)
          store(logits(r) + n, dot(&queries_[r * depth_], k, p.key_stride_row, p.head_dim) * scale);
      } else {
        convert_keys(k, std::min(kLanes, end - n));  // once for all rows
        for (int32_t r = 0; r < num_rows_; ++r)
          store(logits(r) + n, dot(&queries_[r * depth_], keys_.get(), depth_, depth_) * scale);
      }
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
    float* x = logits(r);
    for (int64_t n = limit_[r]; n < round_up(limit_[r], kLanes); ++n) x[n] = -kInfinity;
    if (excluded_ == nullptr) return;
    for (int32_t n = 0; n < limit_[r]; ++n) x[n] = excluded_[n] ? -kInfinity : x[n];
  }

  void softmax(int32_t r) {
    float* x = logits(r);
    f32v best = splat(-kInfinity);
    for (int32_t n = 0; n < limit_[r]; n += kLanes) best = max(best, load(x + n));
    const float most = max(best);
    const f32v shift = splat(most == -kInfinity ? 0.0f : most);  // nothing seen: all probabilities 0
    f32v total = {};
    for (int32_t n = 0; n < limit_[r]; n += kLanes) {
      f32v e = exp2_bounded(load(x + n) - shift);
      store(x + n, e);
      total += e;
    }
    const float all = sum(total);
    weight_[r] = all == 0.0f ? 0.0f : 1.0f / all;
  }

  void exponentiate(int32_t r) {
    float* x = logits(r);
    for (int32_t n = 0; n < limit_[r]; n += kLanes) store(x + n, exp2(load(x + n) - shift_[r]));
  }

  template <bool kMax>
  void add_row(int32_t r, float* scores) {
    const float* x = logits(r);
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

  const int32_t depth_;                   // D rounded up to whole vectors
  Array<float> logits_, queries_, keys_;  // [rows][N], [rows][depth], [kLanes][depth]
};

}  // namespace
}  // namespace VTK_ISA
}  // namespace vtk
