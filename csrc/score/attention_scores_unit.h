// What the two CPU forms of attention_scores share: the plan and the rows of a unit of work.
// Include only from attention_scores_cpu.cpp.
#pragma once
#include <algorithm>
#include <limits>

#include "common/scratch.h"
#include "common/simd.h"
#include "device/tile.h"
#include "score/attention_scores.h"

namespace vtk {
namespace VTK_ISA {
namespace {

constexpr int kGroup = 2 * kLanes;  // query rows of a register tile, one a lane
constexpr int kTileKeys = 6;        // keys of a register tile
constexpr int32_t kFewRows = 5;     // up to here dot products with lanes over D are faster than rows in lanes
constexpr int32_t kMaxTileRows = 96;
constexpr int64_t kTileFloats = 128 << 10;  // 256 KiB of logits, half of L2
constexpr int32_t kMaxWholeKeys = 8192;     // a group's logits over this many keys still fit L2 on most processors
constexpr int32_t kBlockKeys = 256;
constexpr int32_t kSumKeys = 64;  // additions in a row: the error of a sum grows with them
constexpr int64_t kUnits = 32;    // enough for the threads of a desktop; depends on shapes only
constexpr int64_t kMinPartRows = 64;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504f;

struct Plan {
  bool few_rows;
  int32_t block_keys;  // keys whose logits the tile holds: N, or less when N is long
  int32_t tile_rows;
  int32_t parts;  // the rows of a head are cut into so many units
  int32_t part_rows;
  int64_t padded_keys;

  explicit Plan(const AttentionScoresParams& p) {
    few_rows = p.num_queries <= kFewRows;
    padded_keys = round_up<int64_t>(p.num_keys, kGroup);
    block_keys = few_rows || p.num_keys <= kMaxWholeKeys ? p.num_keys : kBlockKeys;
    int64_t rows = std::clamp<int64_t>(kTileFloats / block_keys / kGroup * kGroup, kGroup, kMaxTileRows);
    tile_rows =
        static_cast<int32_t>(few_rows ? p.num_queries : std::min(rows, round_up<int64_t>(p.num_queries, kGroup)));

    int64_t heads = int64_t{p.batch} * p.num_heads;
    int64_t most = (p.num_queries + kMinPartRows - 1) / kMinPartRows;
    parts = static_cast<int32_t>(std::min((kUnits + heads - 1) / heads, most));
    part_rows = (p.num_queries + parts - 1) / parts;
  }
};

template <bool kMax>
f32v combine(f32v a, f32v b) {
  if constexpr (kMax) return (b > a) | (b != b) ? b : a;  // NaN wins and stays
  return a + b;
}

// One head's rows of one part. probability(n) of a row = weight * 2^(logit(n) - shift), logits in powers of two.
class Unit {
 public:
  Unit(const AttentionScoresParams& params, const Plan& plan) : p(params), plan(plan) {
    query_ = scratch<int32_t>(plan.tile_rows);
    limit_ = scratch<int32_t>(plan.tile_rows);
    shift_ = scratch<float>(plan.tile_rows);
    weight_ = scratch<float>(plan.tile_rows);
    if (p.key_mask.data != nullptr) excluded_ = scratch<int32_t>(plan.padded_keys);
  }

 protected:
  void select(int64_t unit) {
    const int32_t part = static_cast<int32_t>(unit % plan.parts);
    head_ = static_cast<int32_t>(unit / plan.parts % p.num_heads);
    next_row_ = std::min(part * plan.part_rows, p.num_queries);
    end_row_ = std::min(next_row_ + plan.part_rows, p.num_queries);
    select_batch(static_cast<int32_t>(unit / plan.parts / p.num_heads));
  }

  void select_batch(int32_t batch) {
    if (batch == batch_) return;
    batch_ = batch;
    if (excluded_ == nullptr) return;
    std::fill_n(excluded_.get(), plan.padded_keys, -1);
    for (int32_t n = 0; n < p.num_keys; ++n)
      if (p.key_mask.data[batch * p.key_mask.stride_row + n * p.key_mask.stride_col]) excluded_[n] = 0;
  }

  // Collects the next rows that vote and see a key, as many as the tile holds; false when none are left.
  bool take_rows() {
    const MaskView& mask = p.query_mask;
    for (num_rows_ = 0; next_row_ < end_row_ && num_rows_ < plan.tile_rows; ++next_row_) {
      const int32_t q = next_row_;
      if (mask.data != nullptr && !mask.data[batch_ * mask.stride_row + q * mask.stride_col]) continue;
      int64_t limit = p.causal ? int64_t{p.num_keys} - p.num_queries + q + 1 : p.num_keys;
      float lse = 0.0f;
      if (p.lse != nullptr) lse = p.lse[batch_ * p.lse_stride_batch + head_ * p.lse_stride_head + q * p.lse_stride_row];
      if (limit <= 0 || lse == -kInfinity) continue;  // lse of -inf: the flash pass saw nothing either
      query_[num_rows_] = q;
      limit_[num_rows_] = static_cast<int32_t>(std::min<int64_t>(limit, p.num_keys));
      shift_[num_rows_] = p.lse != nullptr ? lse * kLog2E : -kInfinity;
      weight_[num_rows_++] = 1.0f;
    }
    return num_rows_ > 0;
  }

  template <class T>
  const T* query_at(int32_t head, int32_t q) const {
    return static_cast<const T*>(p.query) + batch_ * p.query_stride_batch + head * p.query_stride_head +
           q * p.query_stride_row;
  }
  template <class T>
  const T* key_at(int32_t key_head, int32_t n) const {
    return static_cast<const T*>(p.key) + batch_ * p.key_stride_batch + key_head * p.key_stride_head +
           n * p.key_stride_row;
  }
  int32_t last_limit() const { return limit_[num_rows_ - 1]; }  // limits ascend

  const AttentionScoresParams& p;
  const Plan& plan;
  Scratch<int32_t> query_, limit_;  // [tile_rows] row number; it sees keys [0, limit)
  Scratch<float> shift_, weight_;   // [tile_rows]
  Scratch<int32_t> excluded_;       // [padded_keys] all bits set: masked out; null without a mask
  int32_t num_rows_ = 0;
  int32_t batch_ = -1, head_ = 0;

 private:
  int32_t next_row_ = 0, end_row_ = 0;
};

}  // namespace
}  // namespace VTK_ISA
}  // namespace vtk
