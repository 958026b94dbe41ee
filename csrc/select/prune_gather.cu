// prune_gather on CUDA: one launch, no host synchronisation, no atomics on the result path.
//
//   grid    parts blocks a segment, one dimension: block = segment * parts + part
//   block   512 threads. Every block of a segment selects redundantly (N keys from L2 cost less than a second
//           launch or a grid barrier), then copies its own share of the kept rows with 16-byte accesses.
//   shared  keys: 4 N bytes up to 96 KiB; longer segments are re-read from L2 in each pass
//           share: 4 KiB of token numbers, histogram and scan: about 1.3 KiB
//   bound   2 * keep * row_bytes per segment over the memory bandwidth; at small keep the launch itself
//
// The kept token's output row is its rank: position order counts kept tokens before it, score order counts
// better keys, so no sort is needed (keys above one that is kept are all kept).
//
// Contradictory arguments cannot be reported without a sync; they are clamped, which the docstring states:
// drop_mask wins over keep_mask, of too many forced tokens the lowest-indexed stay, and when too few tokens
// are allowed the lowest-indexed dropped ones fill the rest. Segment bounds are clamped into the tensor.
#include <algorithm>

#include "device/convert.cuh"
#include "device/launch.h"
#include "device/order_key.cuh"
#include "device/radix_select.cuh"
#include "select/prune_gather.h"

namespace vtk {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int32_t kMaxShare = 1024;           // output rows of one block
constexpr int32_t kMaxCachedKeys = 24 << 10;  // 96 KiB of keys in shared memory

struct Segment {
  int64_t first;
  int32_t tokens;
  int32_t keep;
  int64_t out;
};

struct SharedMemory {
  RadixSelectStorage select;
  int32_t warp_above[kWarps], warp_ties[kWarps];
  int32_t share[kMaxShare];      // token of each row of this block's share
  int32_t share_row[kMaxShare];  // its output row within the segment
  int64_t varlen_out;
};

// Rows of the segments before s: a block-wide sum of clamped keeps. Integers, so any order gives the same sum.
__device__ Segment varlen_segment(const PruneGatherParams& p, int32_t s, SharedMemory& shared) {
  auto bound = [&](int32_t i) { return min(max(p.cu_seqlens[i], 0), p.num_tokens); };
  auto kept = [&](int32_t i) { return min(max(p.keeps[i], 0), max(bound(i + 1) - bound(i), 0)); };
  if (threadIdx.x == 0) shared.varlen_out = 0;
  __syncthreads();
  int64_t before = 0;
  for (int32_t i = threadIdx.x; i < s; i += kThreads) before += kept(i);
  atomicAdd(reinterpret_cast<unsigned long long*>(&shared.varlen_out), static_cast<unsigned long long>(before));
  __syncthreads();
  int64_t out = min(shared.varlen_out, p.total_keep);
  int32_t keep = static_cast<int32_t>(min(static_cast<int64_t>(kept(s)), p.total_keep - out));
  return {bound(s), max(bound(s + 1) - bound(s), 0), keep, out};
}

__device__ Segment segment_of(const PruneGatherParams& p, int32_t s, SharedMemory& shared) {
  if (p.cu_seqlens == nullptr) return {0, p.num_tokens, p.keep, static_cast<int64_t>(s) * p.keep};
  return varlen_segment(p, s, shared);
}

// The key of token i of segment s, heads reduced in ascending order.
__device__ uint32_t token_key(const PruneGatherParams& p, int32_t s, const Segment& segment, int32_t i) {
  int64_t token = segment.first + i;
  auto set = [&](const MaskView& mask) {
    return mask.data != nullptr && mask.data[s * mask.stride_row + token * mask.stride_col];
  };
  if (set(p.drop_mask)) return kDroppedKey;
  if (set(p.keep_mask)) return kForcedKey;

  int64_t row = p.cu_seqlens == nullptr ? s : 0;
  int64_t base = row * p.scores_stride_batch + token * p.scores_stride_token;
  float score = load_float(p.scores, p.scores_dtype, base);
  for (int32_t h = 1; h < p.num_heads; ++h) {
    float x = load_float(p.scores, p.scores_dtype, base + h * p.scores_stride_head);
    if (p.head_reduce == Reduce::kMax)
      score = (x > score || x != x) ? x : score;
    else
      score += x;
  }
  if (p.head_reduce == Reduce::kMean) score = __fdiv_rn(score, static_cast<float>(p.num_heads));
  return order_key(score);
}

// Walks the tokens in order and lists those whose slot falls into [begin, end). A kept token's slot is the
// number of tokens above the threshold before it plus the number of kept ties before it.
template <class KeyAt>
__device__ void list_share(const KeyAt& key_at, int32_t tokens, Threshold threshold, int32_t begin, int32_t end,
                           SharedMemory& shared) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t above_before = 0, ties_before = 0;
  for (int32_t chunk = 0; chunk < tokens; chunk += kThreads) {
    int32_t i = chunk + threadIdx.x;
    uint32_t key = i < tokens ? key_at(i) : 0;
    bool above = i < tokens && key > threshold.key;
    bool tie = i < tokens && key == threshold.key;
    // Ranks inside the warp, then across the warps of the chunk.
    uint32_t above_votes = __ballot_sync(0xffffffffu, above), tie_votes = __ballot_sync(0xffffffffu, tie);
    if (lane == 0) {
      shared.warp_above[warp] = __popc(above_votes);
      shared.warp_ties[warp] = __popc(tie_votes);
    }
    __syncthreads();
    int32_t above_rank = above_before + __popc(above_votes & ((1u << lane) - 1));
    int32_t tie_rank = ties_before + __popc(tie_votes & ((1u << lane) - 1));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) {
        above_rank += shared.warp_above[w];
        tie_rank += shared.warp_ties[w];
      }
      above_before += shared.warp_above[w];
      ties_before += shared.warp_ties[w];
    }
    int32_t slot = above_rank + min(tie_rank, threshold.ties);
    bool kept = above || (tie && tie_rank < threshold.ties);
    if (kept && slot >= begin && slot < end) {
      shared.share[slot - begin] = i;
      shared.share_row[slot - begin] = slot;
    }
    __syncthreads();  // the warp counts are rewritten by the next chunk
  }
}

// Score order: the output row of a kept token is the number of better tokens. One warp a token.
template <class KeyAt>
__device__ void rank_share(const KeyAt& key_at, int32_t tokens, int32_t rows, SharedMemory& shared) {
  int lane = threadIdx.x % 32;
  for (int32_t r = threadIdx.x / 32; r < rows; r += kWarps) {
    int32_t token = shared.share[r];
    uint32_t key = key_at(token);
    int32_t better = 0;
    for (int32_t i = lane; i < tokens; i += 32) {
      uint32_t other = key_at(i);
      better += other > key || (other == key && i < token);
    }
    better = __reduce_add_sync(0xffffffffu, better);
    if (lane == 0) shared.share_row[r] = better;
  }
}

// Copies this block's rows of one tensor; consecutive threads move consecutive vectors.
template <class Vector>
__device__ void copy_share(const GatherRows& rows, const PruneGatherParams& p, int32_t s, const Segment& segment,
                           int32_t count, const SharedMemory& shared) {
  const uint32_t vectors = static_cast<uint32_t>(rows.row_bytes / sizeof(Vector));
  const int64_t out_rows = p.cu_seqlens == nullptr ? static_cast<int64_t>(p.num_segments) * p.keep : p.total_keep;
  const int64_t row_work = static_cast<int64_t>(count) * vectors;
  for (int64_t outer = 0; outer < rows.outer; ++outer) {
    const char* gIn = rows.in + outer * rows.stride_outer + s * rows.stride_batch + segment.first * rows.stride_token;
    char* gOut = rows.out + (outer * out_rows + segment.out) * rows.row_bytes;
    for (int64_t e = threadIdx.x; e < row_work; e += kThreads) {
      int32_t r = static_cast<int32_t>(e / vectors);
      uint32_t column = static_cast<uint32_t>(e - static_cast<int64_t>(r) * vectors);
      const Vector* from = reinterpret_cast<const Vector*>(gIn + shared.share[r] * rows.stride_token);
      Vector* to = reinterpret_cast<Vector*>(gOut + shared.share_row[r] * rows.row_bytes);
      to[column] = from[column];
    }
  }
}

__device__ int vector_bytes(const GatherRows& rows) {
  uint64_t bits = reinterpret_cast<uint64_t>(rows.in) | reinterpret_cast<uint64_t>(rows.out) | rows.row_bytes |
                  rows.stride_token | rows.stride_batch | rows.stride_outer;
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : bits % 2 == 0 ? 2 : 1;
}

// varlen with total_keep above the sum of keeps: the spare rows become index -1 and zeros, never garbage.
__device__ void clear_spare_rows(const PruneGatherParams& p, int64_t used, int part, int parts) {
  for (int64_t row = used + part; row < p.total_keep; row += parts) {
    if (threadIdx.x == 0) p.indices[row] = -1;
    for (int32_t t = 0; t < p.num_rows; ++t)
      for (int64_t byte = threadIdx.x; byte < p.rows[t].row_bytes; byte += kThreads)
        p.rows[t].out[row * p.rows[t].row_bytes + byte] = 0;
  }
}

__global__ void __launch_bounds__(kThreads)
    prune_gather_kernel(const __grid_constant__ PruneGatherParams p, int parts, int32_t cached_keys) {
  VTK_DYNAMIC_SHARED(dynamic_shared);
  __shared__ SharedMemory shared;
  uint32_t* sKeys = reinterpret_cast<uint32_t*>(dynamic_shared);
  const int32_t s = blockIdx.x / parts, part = blockIdx.x % parts;
  if (p.num_segments == 0) {  // nothing to select, but the varlen outputs are still owed
    if (part == 0 && threadIdx.x == 0) p.cu_kept[0] = 0;
    clear_spare_rows(p, 0, part, parts);
    return;
  }

  // Locate the segment and this block's share of its output rows.
  const Segment segment = segment_of(p, s, shared);
  if (p.cu_seqlens != nullptr && part == 0 && threadIdx.x == 0) {
    if (s == 0) p.cu_kept[0] = 0;
    p.cu_kept[s + 1] = static_cast<int32_t>(segment.out + segment.keep);
  }
  if (p.cu_seqlens != nullptr && s == p.num_segments - 1) clear_spare_rows(p, segment.out + segment.keep, part, parts);
  const int32_t share = (segment.keep + parts - 1) / parts;
  const int32_t begin = min(part * share, segment.keep), end = min(begin + share, segment.keep);
  if (begin >= end) return;

  // Read every key once.
  const bool cached = segment.tokens <= cached_keys;
  if (cached) {  // others see the keys after the first barrier of the selection
    for (int32_t i = threadIdx.x; i < segment.tokens; i += kThreads) sKeys[i] = token_key(p, s, segment, i);
  }
  auto key_at = [&](int32_t i) { return cached ? sKeys[i] : token_key(p, s, segment, i); };

  // Select.
  const Threshold threshold = radix_select(key_at, segment.tokens, segment.keep, shared.select);
  list_share(key_at, segment.tokens, threshold, begin, end, shared);
  if (p.order == Order::kRank) {
    rank_share(key_at, segment.tokens, end - begin, shared);
    __syncthreads();
  }

  // Gather.
  for (int32_t r = threadIdx.x; r < end - begin; r += kThreads)
    p.indices[segment.out + shared.share_row[r]] = segment.first + shared.share[r];
  for (int32_t t = 0; t < p.num_rows; ++t) {
    switch (vector_bytes(p.rows[t])) {
      case 16: copy_share<uint4>(p.rows[t], p, s, segment, end - begin, shared); break;
      case 8: copy_share<uint2>(p.rows[t], p, s, segment, end - begin, shared); break;
      case 4: copy_share<uint32_t>(p.rows[t], p, s, segment, end - begin, shared); break;
      case 2: copy_share<uint16_t>(p.rows[t], p, s, segment, end - begin, shared); break;
      default: copy_share<uint8_t>(p.rows[t], p, s, segment, end - begin, shared); break;
    }
  }
}

// Enough blocks to fill the device about twice over, at most one output row a block, at least 16 KiB a block
// unless that leaves multiprocessors idle, and never more rows a block than its list holds.
int choose_parts(const PruneGatherParams& p) {
  int64_t most_kept = p.cu_seqlens == nullptr ? p.keep : std::min<int64_t>(p.total_keep, p.num_tokens);
  int64_t segments = std::max(p.num_segments, 1);
  int64_t fill = (4 * static_cast<int64_t>(num_multiprocessors()) + segments - 1) / segments;
  int64_t needed = (most_kept + kMaxShare - 1) / kMaxShare;
  return static_cast<int>(std::max<int64_t>({int64_t{1}, needed, std::min<int64_t>(fill, most_kept)}));
}

}  // namespace

cudaError_t prune_gather_cuda(const PruneGatherParams& p, cudaStream_t stream) {
  if (p.num_segments == 0 && p.cu_seqlens == nullptr) return cudaSuccess;
  int parts = choose_parts(p);
  int32_t cached_keys = std::min(p.num_tokens, kMaxCachedKeys);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(parts) * std::max(p.num_segments, 1));
  shape.block = dim3(kThreads);
  shape.shared_bytes = cached_keys * sizeof(uint32_t);
  return launch(prune_gather_kernel, shape, stream, p, parts, cached_keys);
}

}  // namespace vtk
