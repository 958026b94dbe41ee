// How packed_attention is cut on CUDA: a request's tokens are sources of up to 128 (its pages, its protected pages,
// runs of residual tokens), parts are 8 sources that follow each other, and a block takes 16 rows of one key head
// through one part. What belongs to a part depends on the request alone, so its bits do not depend on the batch.
#pragma once
#include "device/ptx.cuh"
#include "kv/packed_attention.h"
#include "kv/page_device.cuh"

namespace vtk {
namespace {

constexpr int32_t kRows = 16;
constexpr int32_t kPartSources = 8;
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kNoLogit = -INFINITY;

struct Work {
  int32_t rows, row_blocks;  // of a key head
  int32_t parts;             // of the longest request
};

__host__ __device__ inline Work work_of(const PackedAttentionParams& p) {
  Work w;
  w.rows = p.heads / p.key_heads * p.num_queries;
  w.row_blocks = ceil_div(w.rows, kRows);
  const int32_t sources = p.pages[0].count + p.pages[1].count + ceil_div(p.residual_tokens, kPageTokens);
  w.parts = max(ceil_div(sources, kPartSources), 1);
  return w;
}

__device__ inline int32_t sources_of(const PackedAttentionParams& p, int32_t b) {
  return pages_of(p, b) + p.pages[1].count + ceil_div(residual_of(p, b), kPageTokens);
}
__device__ inline int32_t parts_of(const PackedAttentionParams& p, int32_t b) {
  return ceil_div(sources_of(p, b), kPartSources);
}

// A part's row in the workspace: D sums, the maximum of the logits in powers of two, the sum of the weights.
__host__ __device__ inline int64_t partial_at(const PackedAttentionParams& p, const Work& w, int64_t key_head,
                                              int32_t part, int32_t row) {
  return ((key_head * w.parts + part) * w.rows + row) * (p.head_dim + 2);
}

constexpr int32_t kResidual = 2;

struct Source {
  int32_t kind;   // class of the page, or kResidual
  int32_t place;  // row of the class's views, negative: a hole; or the first residual token
  int32_t count;  // tokens
  int64_t key;    // of the first one, as key_bias counts
};

// What a block works on: blockIdx.x = (b Hk + key head) row_blocks + block of rows, blockIdx.y = part.
struct Task {
  int32_t head, b, key_head, group;
  int32_t first, rows;      // rows of the key head; query and head by packed_row(first + r, group)
  int32_t pages, residual;  // of the request
  Range sources;

  __device__ Task(const PackedAttentionParams& p, const Work& w) {
    head = blockIdx.x / w.row_blocks, b = head / p.key_heads, key_head = head % p.key_heads;
    group = p.heads / p.key_heads;
    first = blockIdx.x % w.row_blocks * kRows, rows = min(kRows, w.rows - first);
    pages = pages_of(p, b), residual = residual_of(p, b);
    sources = tile_range(blockIdx.y, kPartSources, sources_of(p, b));
  }

  __device__ Source source(const PackedAttentionParams& p, int32_t n) const {
    if (n < pages) return {0, packed_place(p, 0, b, n), kPageTokens, int64_t{n} * kPageTokens};
    n -= pages;
    if (n < p.pages[1].count) return {1, n, kPageTokens, (int64_t{p.pages[0].count} + n) * kPageTokens};
    const int32_t token = (n - p.pages[1].count) * kPageTokens;
    return {kResidual, token, min(kPageTokens, residual - token),
            (int64_t{p.pages[0].count} + p.pages[1].count) * kPageTokens + token};
  }

  // In powers of two; kNoLogit where there is no token, or an excluded one.
  __device__ float bias(const PackedAttentionParams& p, const Source& from, int32_t token) const {
    if (token >= from.count) return kNoLogit;
    if (p.key_bias == nullptr) return 0.0f;
    return p.key_bias[b * p.bias_stride_batch + (from.key + token) * p.bias_stride_key] * kLog2E;
  }

  // Of a token that exists.
  __device__ bool sees(const PackedAttentionParams& p, const Source& from, int32_t row, int32_t token) const {
    return from.kind != kResidual ||
           packed_sees(p, b, packed_row(first + row, group).query, from.place + token, residual);
  }
};

}  // namespace
}  // namespace vtk
