// merge_apply on the CPU: sort the tokens by output row, then build every output row once.
//
//   group    a counting sort of the owner map: ascending tokens within a row, so sums have one order
//   reduce   a row of one token is a copy (most are); others are summed in registers, four vectors at a time
//
// Bound: N + M rows over the memory bandwidth. Outputs that leave the caches anyway are written past them.
#include "merge/merge_apply.h"

#include <algorithm>
#include <limits>

#include "common/narrow.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"

namespace vtk {
namespace VTK_ISA {
namespace {

float weight_at(const MergeApplyParams& p, int64_t b, int64_t n) {
  const int64_t index = b * p.weight_stride_batch + n * p.weight_stride_token;
  switch (p.weight_dtype) {
    case DType::kFloat32: return static_cast<const float*>(p.weight)[index];
    case DType::kFloat16: return to_float(static_cast<const f16*>(p.weight)[index]);
    default: return to_float(static_cast<const bf16*>(p.weight)[index]);
  }
}

struct Member {
  int32_t token;
  float weight;  // then its coefficient
};

int64_t center_of(const MergeApplyParams& p, int64_t b, int64_t row) {
  return p.center == nullptr ? -1 : p.center[b * p.center_stride_batch + row * p.center_stride_row];
}

// The tokens of one item, sorted by output row.
struct Groups {
  int32_t* first;   // [M + 1]
  Member* members;  // [N]
};

void group(const MergeApplyParams& p, int64_t b, const Groups& groups) {
  auto owner_of = [&](int32_t n) {
    const int64_t row = p.owner[b * p.owner_stride_batch + n * p.owner_stride_token];
    return p.reduce == MergeReduce::kPrune && row >= 0 && center_of(p, b, row) != n ? -1 : row;
  };
  std::fill_n(groups.first, int64_t{p.out_len} + 1, 0);
  for (int32_t n = 0; n < p.num_tokens; ++n)
    if (owner_of(n) >= 0) ++groups.first[owner_of(n) + 1];
  for (int32_t m = 0; m < p.out_len; ++m) groups.first[m + 1] += groups.first[m];
  // Filling moves every start to the next row's; moving them back by one restores them.
  for (int32_t n = 0; n < p.num_tokens; ++n) {
    if (owner_of(n) < 0) continue;
    groups.members[groups.first[owner_of(n)]++] = {n, p.weight == nullptr ? 1.0f : weight_at(p, b, n)};
  }
  std::copy_backward(groups.first, groups.first + p.out_len, groups.first + p.out_len + 1);
  groups.first[0] = 0;
}

// Vectors [at, at + kVectors) of a row of two or more members.
template <bool kMax, int kVectors, class Load, class Store>
void reduce_columns(const Member* members, int32_t count, float divisor, const Load& load_at, const Store& store_at) {
  f32v acc[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const f32v x = load_at(members[0].token, v);
    acc[v] = kMax ? x : members[0].weight * x;
  }
  for (int32_t i = 1; i < count; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const f32v x = load_at(members[i].token, v);
      if constexpr (kMax)
        acc[v] = (x > acc[v]) | (x != x) ? x : acc[v];
      else
        acc[v] += members[i].weight * x;
    }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) store_at(v, kMax ? acc[v] : acc[v] / divisor);
}

template <bool kMax, class T>
void reduce_row(const MergeApplyParams& p, const T* values, const Member* members, int32_t count, float divisor,
                T* out) {
  constexpr int kVectors = 4;
  int32_t c = 0;
  for (; c + kVectors * kLanes <= p.channels; c += kVectors * kLanes)
    reduce_columns<kMax, kVectors>(
        members, count, divisor,
        [&](int64_t token, int v) { return load(values + token * p.stride_token + c + v * kLanes); },
        [&](int v, f32v x) { store(out + c + v * kLanes, x); });
  for (; c < p.channels; c += kLanes) {
    const int width = std::min<int32_t>(kLanes, p.channels - c);
    reduce_columns<kMax, 1>(
        members, count, divisor,
        [&](int64_t token, int) { return load_partial(values + token * p.stride_token + c, width); },
        [&](int, f32v x) { store_partial(out + c, x, width); });
  }
}

void weigh(const RowReduction& row, int64_t center, Member* members, int32_t count) {
  int32_t before = 0;
  for (int32_t i = 0; i < count; ++i) {
    const bool is_center = members[i].token == center;
    members[i].weight = row.coefficient(is_center, members[i].weight, before);
    before += !is_center;
  }
}

template <class T>
void merge_row(const MergeApplyParams& p, int64_t b, int64_t row, const Groups& groups, bool stream) {
  const T* values = static_cast<const T*>(p.values) + b * p.stride_batch;
  Member* members = groups.members + groups.first[row];
  const int32_t count = groups.first[row + 1] - groups.first[row];
  T* out = static_cast<T*>(p.merged) + (b * p.out_len + row) * p.channels;
  const size_t bytes = p.channels * sizeof(T);
  float total = 0.0f;
  for (int32_t i = 0; i < count; ++i) total += members[i].weight;
  p.weight_out[b * p.out_len + row] = total;

  if (count == 0) {
    std::memset(static_cast<void*>(out), 0, bytes);
  } else if (count == 1) {
    const char* from = reinterpret_cast<const char*>(values + members[0].token * p.stride_token);
    if (stream)
      stream_copy(reinterpret_cast<char*>(out), from, bytes);
    else
      std::memcpy(static_cast<void*>(out), from, bytes);
  } else if (p.reduce == MergeReduce::kMax) {
    reduce_row<true>(p, values, members, count, 1.0f, out);
  } else {
    const RowReduction reduction = {p.reduce, p.beta, count - 1, total};
    weigh(reduction, center_of(p, b, row), members, count);
    reduce_row<false>(p, values, members, count, reduction.divisor(), out);
  }
}

template <class T>
void merge_rows(const MergeApplyParams& p, int32_t* first, Member* members) {
  const int64_t row_bytes = std::max<int64_t>(1, p.channels * sizeof(T));
  const bool stream = p.batch * p.out_len * row_bytes > kStreamBytes;
  parallel_for(int64_t{p.batch} * p.out_len, std::max<int64_t>(1, kCopyGrainBytes / row_bytes),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t b = i / p.out_len;
                   const Groups groups = {first + b * (p.out_len + 1), members + b * p.num_tokens};
                   merge_row<T>(p, b, i % p.out_len, groups, stream);
                 }
                 if (stream) stream_fence();
               });
}

}  // namespace

WeightConflict check_weight_cpu(const MergeApplyParams& p) {
  for (int32_t b = 0; b < p.batch; ++b)
    for (int32_t n = 0; n < p.num_tokens; ++n) {
      const float weight = weight_at(p, b, n);
      if (!(weight > 0.0f && weight < std::numeric_limits<float>::infinity())) return {b, n, weight};
    }
  return {};
}

void merge_apply_cpu(const MergeApplyParams& p) {
  Scratch<int32_t> first = scratch<int32_t>(int64_t{p.batch} * (int64_t{p.out_len} + 1));
  Scratch<Member> members = scratch<Member>(int64_t{p.batch} * p.num_tokens);
  parallel_for(p.batch, std::max<int64_t>(1, (1 << 14) / std::max(p.num_tokens, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      group(p, b, {&first[b * (int64_t{p.out_len} + 1)], &members[b * p.num_tokens]});
  });
  switch (p.dtype) {
    case DType::kFloat32: merge_rows<float>(p, first.get(), members.get()); break;
    case DType::kFloat16: merge_rows<f16>(p, first.get(), members.get()); break;
    case DType::kBFloat16: merge_rows<bf16>(p, first.get(), members.get()); break;
  }
}

}  // namespace VTK_ISA
}  // namespace vtk
