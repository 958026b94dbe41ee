// What the kernels of attention_scores share: the shape-only plan, masks, and the normalisers of rows.
//
// A row's normaliser is a maximum and a sum over keys in powers of two; key ranges of one row are handled by
// different blocks, whose partial pairs are folded in ascending order wherever they are needed.
#pragma once
#include <algorithm>
#include <cmath>

#include "device/convert.cuh"
#include "device/launch.h"
#include "device/tile.h"
#include "device/tile_product.cuh"
#include "score/attention_scores.h"

namespace vtk {
namespace {

constexpr int32_t kFewRows = 8;       // up to here K is read once and logits go through memory
constexpr int32_t kFewKeys = 128;     // at least so many keys a block
constexpr int32_t kMaxKeyParts = 32;  // partial normalisers of a row
constexpr float kLog2E = 1.44269504f;
constexpr float kInfinity = INFINITY;

struct Plan {
  bool few_rows;
  int32_t key_parts;  // blocks that share a row's normaliser
  int32_t part_keys;  // keys of each
  int32_t row_parts;  // many rows: blocks that share a key's score
  int32_t part_rows;
  int64_t rows;  // B H Q
  // Workspace in floats: normalisers [B, H, Q, key_parts, 2], then logits [B, H, Q, N] or scores [B, H, row_parts, N].
  int64_t normaliser_floats, workspace_floats;
};

inline Plan make_plan(const AttentionScoresParams& p) {
  Plan plan = {};
  const int64_t heads = int64_t{p.batch} * p.num_heads;
  plan.rows = heads * p.num_queries;
  plan.few_rows = p.num_queries <= kFewRows;
  plan.row_parts = 1;
  if (plan.few_rows) {
    plan.part_keys = static_cast<int32_t>(
        ceil_div<int64_t>(std::max<int64_t>(kFewKeys, ceil_div<int64_t>(p.num_keys, kMaxKeyParts)), kFewKeys) *
        kFewKeys);
    plan.key_parts = static_cast<int32_t>(ceil_div<int64_t>(p.num_keys, plan.part_keys));
  } else {
    const int64_t key_tiles = ceil_div<int64_t>(p.num_keys, kTile), row_tiles = ceil_div<int64_t>(p.num_queries, kTile);
    auto split = [&](int64_t tiles, int64_t blocks, int64_t most) {  // tiles per part
      return ceil_div<int64_t>(tiles,
                               std::clamp<int64_t>(ceil_div<int64_t>(kFillBlocks, blocks), 1, std::min(tiles, most)));
    };
    plan.part_keys = static_cast<int32_t>(kTile * split(key_tiles, heads * row_tiles, kMaxKeyParts));
    plan.key_parts = static_cast<int32_t>(ceil_div<int64_t>(p.num_keys, plan.part_keys));
    plan.part_rows = static_cast<int32_t>(kTile * split(row_tiles, heads * key_tiles, row_tiles));
    plan.row_parts = static_cast<int32_t>(ceil_div<int64_t>(p.num_queries, plan.part_rows));
  }
  plan.normaliser_floats = p.lse != nullptr ? 0 : plan.rows * plan.key_parts * 2;
  plan.workspace_floats =
      plan.normaliser_floats + (plan.few_rows ? plan.rows * p.num_keys : heads * plan.row_parts * p.num_keys);
  return plan;
}

// probability(n) = weight * 2^(logit(n) - shift) for n < limit, 0 beyond.
struct RowState {
  float shift;
  float weight;
  int32_t limit;
};

__device__ inline bool is_set(const MaskView& mask, int32_t row, int32_t column) {
  return mask.data == nullptr || mask.data[row * mask.stride_row + column * mask.stride_col];
}

// The number of keys that row q sees before key_mask.
__device__ inline int32_t causal_limit(const AttentionScoresParams& p, int32_t q) {
  if (!p.causal) return p.num_keys;
  int64_t limit = static_cast<int64_t>(p.num_keys) - p.num_queries + q + 1;
  return static_cast<int32_t>(limit < 0 ? 0 : limit);
}

// Folds (maximum, sum) `next` into `total`. A NaN is in the sum, never in the maximum.
__device__ inline float2 fold(float2 total, float2 next) {
  float shift = fmaxf(total.x, next.x);
  float safe = shift == -kInfinity ? 0.0f : shift;
  auto scaled = [&](float2 part) { return part.x == shift ? part.y : part.y * exp2f(part.x - safe); };
  return {shift, scaled(total) + scaled(next)};
}

// Row q of head h of batch b, complete with its normaliser from the partial ones or from lse.
__device__ inline RowState row_state(const AttentionScoresParams& p, const Plan& plan, int32_t b, int32_t h,
                                     int32_t q) {
  if (q >= p.num_queries || !is_set(p.query_mask, b, q)) return {0.0f, 0.0f, 0};
  RowState row = {0.0f, 1.0f, causal_limit(p, q)};
  if (p.lse != nullptr) {
    float lse = p.lse[b * p.lse_stride_batch + h * p.lse_stride_head + q * p.lse_stride_row];
    row.shift = lse * kLog2E;
    if (lse == -kInfinity) row.limit = 0;  // the flash pass saw nothing either
    return row;
  }
  const int64_t index = (static_cast<int64_t>(b) * p.num_heads + h) * p.num_queries + q;
  const float2* parts = reinterpret_cast<const float2*>(p.workspace) + index * plan.key_parts;
  float2 total = {-kInfinity, 0.0f};
  for (int32_t part = 0; part < plan.key_parts; ++part) total = fold(total, parts[part]);
  row.shift = total.x == -kInfinity ? 0.0f : total.x;
  row.weight = total.y == 0.0f ? 0.0f : 1.0f / total.y;
  // All probabilities of such a row are NaN, even those that underflow.
  if (total.y != total.y || total.x == kInfinity) row.shift = NAN;
  return row;
}

__device__ inline float combine(float total, float x, bool is_max) {
  if (is_max) return x > total || x != x ? x : total;  // NaN wins and stays
  return total + x;
}

// 1 / (rows that vote) for the mean, else 1. All threads of the block call it.
__device__ inline float row_factor(const AttentionScoresParams& p, int32_t b) {
  if (p.query_reduce != Reduce::kMean) return 1.0f;
  int32_t voters = 0;
  for (int32_t first = 0; first < p.num_queries; first += blockDim.x) {
    int32_t q = first + threadIdx.x;
    voters += __syncthreads_count(q < p.num_queries && is_set(p.query_mask, b, q));
  }
  return voters > 0 ? 1.0f / voters : 1.0f;
}

}  // namespace
}  // namespace vtk
