// prune_gather on the CPU.
//
// key(token)  = the score as an unsigned integer that sorts the same way; masks overwrite it
// threshold   = the keep-th largest key, found by repeated histograms over a shrinking key range
// kept        = tokens above the threshold, then the lowest-indexed ones equal to it
//
// Two parallel phases: select (over segments), copy (over output rows). Selecting reads N keys about three
// times from L1, so the copy bounds the op: 2 * keep * row_bytes over the memory bandwidth.
// A range histogram (min and max first, then 1024 equal bins) beats fixed radix digits here: attention scores
// share a few exponents, so a fixed leading digit leaves most tokens in one bin.
#include "select/prune_gather.h"

#include <algorithm>

#include "common/order_key.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"

namespace vtk {
namespace VTK_ISA {
namespace {

constexpr uint32_t kDroppedKey = 0;           // drop_mask: below every score
constexpr uint32_t kForcedKey = 0xffffffffu;  // keep_mask: above +inf, whose key is 0xff800000
constexpr int kBinBits = 10;

struct Segment {
  int64_t first;  // first token, in the packed tensor or 0
  int32_t tokens;
  int32_t keep;
  int64_t out;  // first output row of the segment in `indices`
};

Segment segment_of(const PruneGatherParams& p, int32_t s) {
  if (p.cu_seqlens == nullptr) return {0, p.num_tokens, p.keep, int64_t{s} * p.keep};
  return {p.cu_seqlens[s], p.cu_seqlens[s + 1] - p.cu_seqlens[s], p.keeps[s], p.cu_kept[s]};
}

template <class T>
float reduce_heads(const T* score, const PruneGatherParams& p) {
  float result = to_float(score[0]);
  for (int32_t h = 1; h < p.num_heads; ++h) {
    float x = to_float(score[h * p.scores_stride_head]);
    if (p.head_reduce == Reduce::kMax)
      result = (x > result || x != x) ? x : result;  // a NaN head makes a NaN score
    else
      result += x;
  }
  return p.head_reduce == Reduce::kMean ? result / static_cast<float>(p.num_heads) : result;
}

template <class T>
void score_keys(const PruneGatherParams& p, int32_t s, const Segment& seg, uint32_t* keys) {
  const T* score = static_cast<const T*>(p.scores) + s * p.scores_stride_batch * (p.cu_seqlens == nullptr) +
                   seg.first * p.scores_stride_token;
  int32_t n = 0;
  if (p.num_heads == 1 && p.scores_stride_token == 1) {
    for (; n + kLanes <= seg.tokens; n += kLanes) {
      u32v key = order_key(load(score + n));
      std::memcpy(keys + n, &key, sizeof key);
    }
  }
  for (; n < seg.tokens; ++n) keys[n] = order_key(reduce_heads(score + n * p.scores_stride_token, p));
}

// Applies the masks to the keys; reports a contradiction instead of selecting something else.
PruneGatherConflict mask_keys(const PruneGatherParams& p, int32_t s, const Segment& seg, uint32_t* keys) {
  using Conflict = PruneGatherConflict;
  int64_t forced = 0, dropped = 0;
  for (int32_t n = 0; n < seg.tokens; ++n) {
    auto set = [&](const MaskView& mask) {
      return mask.data != nullptr && mask.data[s * mask.stride_row + (seg.first + n) * mask.stride_col];
    };
    bool keep = set(p.keep_mask), drop = set(p.drop_mask);
    if (keep && drop) return {Conflict::kKeptAndDropped, s, n, seg.keep};
    if (keep) keys[n] = kForcedKey;
    if (drop) keys[n] = kDroppedKey;
    forced += keep;
    dropped += drop;
  }
  if (forced > seg.keep) return {Conflict::kTooManyForced, s, forced, seg.keep};
  if (seg.tokens - dropped < seg.keep) return {Conflict::kTooFewAllowed, s, seg.tokens - dropped, seg.keep};
  return {};
}

struct Threshold {
  uint32_t key;
  int32_t ties;   // how many tokens equal to the key are kept
  bool all_ties;  // that is all of them
};

// Calls visit(i) in ascending order for each i whose key satisfies the comparison, given for vectors and scalars.
template <class Compare, class Visit>
void for_each_key(const uint32_t* keys, int32_t count, const Compare& compare, const Visit& visit) {
  int32_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    u32v key;
    std::memcpy(&key, keys + i, sizeof key);
    for (uint32_t bits = mask_bits(compare(key)); bits != 0; bits &= bits - 1) visit(i + __builtin_ctz(bits));
  }
  for (; i < count; ++i)
    if (compare(keys[i])) visit(i);
}

// The bin that holds the keep-th largest key; keep becomes the rank inside the bin. Sums of 32 bins are skipped first.
uint32_t find_bin(const uint32_t* histogram, uint32_t top, int32_t& keep) {
  constexpr uint32_t kGroup = 32;
  uint32_t bin = top;
  for (uint32_t group = top / kGroup;; --group) {
    uint32_t sum = 0;
    for (uint32_t b = 0; b < kGroup; ++b) sum += histogram[group * kGroup + b];
    if (sum >= static_cast<uint32_t>(keep)) break;
    keep -= static_cast<int32_t>(sum);
    bin = group * kGroup - 1;
  }
  while (histogram[bin] < static_cast<uint32_t>(keep)) keep -= static_cast<int32_t>(histogram[bin--]);
  return bin;
}

// The keep-th largest key, 1 <= keep <= count. `keys` is overwritten.
Threshold find_threshold(uint32_t* keys, int32_t count, int32_t keep) {
  for (;;) {
    uint32_t low = 0xffffffffu, high = 0;
    for (int32_t i = 0; i < count; ++i) {
      low = keys[i] < low ? keys[i] : low;
      high = keys[i] > high ? keys[i] : high;
    }
    if (low == high) return {low, keep, keep == count};
    const int shift = std::max(0, 32 - __builtin_clz(high - low) - kBinBits);

    uint32_t histogram[1 << kBinBits] = {};
    for (int32_t i = 0; i < count; ++i) ++histogram[(keys[i] - low) >> shift];
    const uint32_t bin = find_bin(histogram, (high - low) >> shift, keep);

    int32_t left = 0;
    for_each_key(
        keys, count, [&](auto key) { return ((key - low) >> shift) == bin; },
        [&](int32_t i) { keys[left++] = keys[i]; });
    count = left;
  }
}

// Writes the kept tokens in ascending order.
void emit_kept(const uint32_t* keys, int32_t tokens, Threshold threshold, int64_t first, int64_t* kept) {
  if (threshold.all_ties) {
    for_each_key(keys, tokens, [&](auto key) { return key >= threshold.key; }, [&](int32_t n) { *kept++ = first + n; });
    return;
  }
  int32_t ties = threshold.ties;
  for_each_key(
      keys, tokens, [&](auto key) { return key >= threshold.key; },
      [&](int32_t n) {
        if (keys[n] == threshold.key && ties-- <= 0) return;
        *kept++ = first + n;
      });
}

// keys, spare: room for the keys of one segment.
PruneGatherConflict select_segment(const PruneGatherParams& p, int32_t s, uint32_t* keys, uint32_t* spare) {
  Segment seg = segment_of(p, s);
  switch (p.scores_dtype) {
    case DType::kFloat32: score_keys<float>(p, s, seg, keys); break;
    case DType::kFloat16: score_keys<f16>(p, s, seg, keys); break;
    case DType::kBFloat16: score_keys<bf16>(p, s, seg, keys); break;
  }
  if (p.keep_mask.data != nullptr || p.drop_mask.data != nullptr) {
    PruneGatherConflict conflict = mask_keys(p, s, seg, keys);
    if (!conflict.ok()) return conflict;
  }
  if (seg.keep == 0) return {};
  std::copy_n(keys, seg.tokens, spare);
  Threshold threshold = find_threshold(spare, seg.tokens, seg.keep);
  int64_t* kept = p.indices + seg.out;
  emit_kept(keys, seg.tokens, threshold, seg.first, kept);
  if (p.order == Order::kRank)
    std::sort(kept, kept + seg.keep, [&](int64_t a, int64_t b) {
      uint32_t key_a = keys[a - seg.first], key_b = keys[b - seg.first];
      return key_a != key_b ? key_a > key_b : a < b;
    });
  return {};
}

PruneGatherConflict select_all(const PruneGatherParams& p) {
  if (p.num_segments == 0) return {};
  Scratch<PruneGatherConflict> conflicts = scratch<PruneGatherConflict>(p.num_segments);
  int64_t tokens_each = std::max<int64_t>(1, p.num_tokens / (p.cu_seqlens == nullptr ? 1 : p.num_segments));
  int64_t grain = std::max<int64_t>(1, 8192 / tokens_each);
  parallel_for(p.num_segments, grain, [&](int64_t begin, int64_t end) {
    Scratch<uint32_t> keys = scratch<uint32_t>(p.num_tokens), spare = scratch<uint32_t>(p.num_tokens);
    for (int64_t s = begin; s < end; ++s)
      conflicts[s] = select_segment(p, static_cast<int32_t>(s), keys.get(), spare.get());
  });
  for (int32_t s = 0; s < p.num_segments; ++s)
    if (!conflicts[s].ok()) return conflicts[s];
  return {};
}

void copy_rows(const GatherRows& rows, const PruneGatherParams& p, int64_t begin, int64_t end, bool stream) {
  int64_t kept = p.cu_seqlens == nullptr ? int64_t{p.num_segments} * p.keep : p.total_keep;
  for (int64_t r = begin; r < end; ++r) {
    int64_t outer = r / kept, row = r % kept;
    int64_t batch = p.cu_seqlens == nullptr ? row / p.keep : 0;
    const char* in =
        rows.in + outer * rows.stride_outer + batch * rows.stride_batch + p.indices[row] * rows.stride_token;
    char* out = rows.out + r * rows.row_bytes;
    if (stream)
      stream_copy(out, in, static_cast<size_t>(rows.row_bytes));
    else
      std::memcpy(out, in, static_cast<size_t>(rows.row_bytes));
  }
  if (stream) stream_fence();
}

}  // namespace

PruneGatherConflict prune_gather_cpu(const PruneGatherParams& p) {
  if (p.cu_seqlens != nullptr) {
    p.cu_kept[0] = 0;
    for (int32_t s = 0; s < p.num_segments; ++s) p.cu_kept[s + 1] = p.cu_kept[s] + p.keeps[s];
  }
  PruneGatherConflict conflict = select_all(p);
  if (!conflict.ok()) return conflict;

  int64_t kept = p.cu_seqlens == nullptr ? int64_t{p.num_segments} * p.keep : p.total_keep;
  if (kept == 0) return {};
  for (int32_t t = 0; t < p.num_rows; ++t) {
    const GatherRows& rows = p.rows[t];
    if (rows.row_bytes == 0) continue;
    bool stream = rows.outer * kept * rows.row_bytes >= kStreamBytes;
    int64_t grain = std::max<int64_t>(1, kCopyGrainBytes / rows.row_bytes);
    parallel_for(rows.outer * kept, grain, [&](int64_t begin, int64_t end) { copy_rows(rows, p, begin, end, stream); });
  }
  return {};
}

}  // namespace VTK_ISA
}  // namespace vtk
