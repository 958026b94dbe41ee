// How block_sparse_attention is cut into blocks, and what a block works on.
#pragma once
#include <algorithm>

#include "attention/block_sparse_key_tiles.cuh"
#include "attention/block_sparse_warp.cuh"
#include "device/launch.h"

namespace vtk {
namespace {

constexpr int kTileDataBytes = 16 << 10;  // of a tile of K or V, at most
constexpr int32_t kFewRows = 16;
constexpr int32_t kPackBelow = 64;  // queries: more fill the tiles of a head by themselves
constexpr int32_t kPartKeys = 256;  // listed keys that pay for a part
constexpr int32_t kMaxParts = 512;

template <class Element, int kDepthBucket, bool kFew>
struct Policy {
  using T = Element;
  static constexpr int kDepth = kDepthBucket;
  static constexpr int kFit = kTileDataBytes / (kDepth * static_cast<int>(sizeof(T)));
  static constexpr int kKeys = kFit >= 64 ? 64 : kFit >= 32 ? 32 : 16;  // of a tile
  static constexpr int kWarpKeys = !kFew ? kKeys : sizeof(T) == 4 ? 8 : 16;
  static constexpr int kKeyWarps = kKeys / kWarpKeys;
  using Warp = typename WarpOf<T, kDepth, kWarpKeys>::Type;

  static constexpr int kMaxRows = kFew ? kFewRows : Warp::kHoldsQuery ? 128 : 64;
  // A register file holds 16, 12 or 8 warps with so many.
  static constexpr int kRegisters = kDepth <= 64 ? 128 : kDepth <= 128 ? 168 : 255;
  static constexpr int kRowBytes = Warp::kRowBytes;
  static constexpr int kTileBytes = kKeys * kRowBytes, kStageBytes = 2 * kTileBytes;  // a stage: K, V
  static constexpr int kOutFloats = kDepth + 8;  // a row of the output in shared memory; 8 against bank conflicts
  static constexpr int kElements = 16 / sizeof(T);
  static constexpr int kVectors = kDepth / kElements;

  // Q stays beside the stages, or passes through them into registers.
  static constexpr int query_bytes(int rows) { return Warp::kHoldsQuery ? 0 : rows * kRowBytes; }
  static constexpr int shared_bytes(int rows) { return query_bytes(rows) + 2 * kStageBytes; }
  static_assert(kKeyWarps * kMaxRows * kOutFloats * 4 <= shared_bytes(kMaxRows), "the output is staged there too");
};

// How the work is cut. Only `rows` may depend on the device, and no bit of the result depends on it.
struct Plan {
  int32_t group;         // heads that are rows of one block
  int32_t query_blocks;  // Mq
  int32_t rows;          // of a block, a multiple of 16
  int32_t row_tiles;     // blocks that share a query block
  int32_t parts;         // blocks that share its lists
  int64_t value_floats;  // workspace: values [B, H, Q, parts, D], then their maxima and sums [B, H, Q, parts, 2]
  int64_t workspace_floats;
  bool aligned;      // rows of query, key and value start and end at multiples of 16 bytes
  bool out_aligned;  // the same of out
};

struct Place {
  int32_t query, head;
};

// What a block works on; in shared memory, for registers are short.
struct Task {
  int32_t b, h, block, first_row, num_rows, part;
  const void *key, *value;  // of the head

  template <class T>
  __device__ void open(const BlockSparseAttentionParams& p, const Plan& plan) {
    int32_t x = blockIdx.x;
    part = x % plan.parts, x /= plan.parts;
    first_row = x % plan.row_tiles * plan.rows, x /= plan.row_tiles;
    block = plan.query_blocks - 1 - x % plan.query_blocks, x /= plan.query_blocks;
    const int32_t heads = p.num_heads / plan.group;
    h = x % heads * plan.group, b = x / heads;
    num_rows = min(plan.rows, min(p.block_q, p.num_queries - block * p.block_q) * plan.group - first_row);
    const int32_t key_head = h / (p.num_heads / p.key_heads);
    key = static_cast<const T*>(p.key.data) + b * p.key.stride_batch + key_head * p.key.stride_head;
    value = static_cast<const T*>(p.value.data) + b * p.value.stride_batch + key_head * p.value.stride_head;
  }
  __device__ Place place(const BlockSparseAttentionParams& p, const Plan& plan, int32_t row) const {
    const PackedRow at = packed_row(first_row + row, plan.group);
    return {block * p.block_q + at.query, h + at.head};
  }
  // Of [B, H, Q].
  __device__ int64_t out_row(const BlockSparseAttentionParams& p, const Plan& plan, int32_t row) const {
    const Place at = place(p, plan, row);
    return (static_cast<int64_t>(b) * p.num_heads + at.head) * p.num_queries + at.query;
  }
};

inline int32_t heads_of_a_block(const BlockSparseAttentionParams& p) {
  if (p.rule_stride_head != 0) return 1;
  for (const BlockLists* lists : {&p.partial, &p.full, &p.columns})
    if (lists->count_stride_head != 0 || lists->entry_stride_head != 0) return 1;
  return p.num_queries < kPackBelow ? p.num_heads / p.key_heads : 1;
}

// Rows that share a list, at most.
inline int32_t list_rows(const BlockSparseAttentionParams& p) {
  return std::min(p.block_q, p.num_queries) * heads_of_a_block(p);
}

// Keys of a list, at most: lists that repeat keys are not worth a finer cut.
inline int64_t listed_keys(const BlockSparseAttentionParams& p) {
  if (p.rule != nullptr) return p.num_keys;  // its numbers are on the device
  auto keys = [&](const BlockLists& lists, int64_t size) {
    return std::min<int64_t>(lists.capacity * size, p.num_keys);
  };
  return keys(p.partial, p.block_k) + keys(p.full, p.block_k) + keys(p.columns, 1);
}

template <class P>
Plan make_plan(const BlockSparseAttentionParams& p) {
  using T = typename P::T;
  Plan plan = {};
  plan.group = heads_of_a_block(p);
  plan.query_blocks = ceil_div(p.num_queries, p.block_q);
  const int32_t shared_rows = list_rows(p);
  for (plan.rows = 16; plan.rows < std::min(shared_rows, P::kMaxRows);) plan.rows *= 2;
  plan.row_tiles = ceil_div(shared_rows, plan.rows);
  const int64_t heads = int64_t{p.batch} * (p.num_heads / plan.group);
  const int64_t blocks = heads * plan.query_blocks * plan.row_tiles;
  plan.parts = static_cast<int32_t>(
      std::clamp<int64_t>(std::min(kFillBlocks / blocks, listed_keys(p) / kPartKeys), 1, kMaxParts));
  const int64_t part_rows = int64_t{p.batch} * p.num_heads * p.num_queries * plan.parts;
  plan.value_floats = round_up<int64_t>(part_rows * p.head_dim, 4);
  plan.workspace_floats = plan.parts == 1 ? 0 : plan.value_floats + part_rows * 2;
  auto bits = [](const HeadsView& x) {
    return reinterpret_cast<uint64_t>(x.data) | (x.stride_batch | x.stride_head | x.stride_row) * sizeof(T);
  };
  plan.out_aligned = p.head_dim * sizeof(T) % 16 == 0;
  plan.aligned = plan.out_aligned && (bits(p.query) | bits(p.key) | bits(p.value)) % 16 == 0;
  return plan;
}

}  // namespace
}  // namespace vtk
