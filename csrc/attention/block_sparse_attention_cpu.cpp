// block_sparse_attention and rule_attention on the CPU.
//
// out_i = sum over listed n of softmax_n(scale q_i k_n + bias_n) v_n, logits in powers of two, online softmax
//
// A task is a block of queries of one head (block_sparse_many_rows.h), or, for up to kFewRows rows, a part of the lists
// of one key head (block_sparse_few_rows.h). Causal lists differ in length by the number of blocks:
// block_sparse_tasks.h takes the longest first. Bound: 4 D multiply-adds a listed pair for many rows; reading K and V
// once for few.
#include "attention/block_sparse_attention.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "attention/block_sparse_few_rows.h"
#include "attention/block_sparse_many_rows.h"
#include "attention/block_sparse_pairs.h"
#include "attention/block_sparse_tasks.h"

namespace vtk {
namespace VTK_ISA {
namespace {

constexpr int32_t kPartKeys = 2048;  // keys of a part of a long list

// Heads of one key head may be rows of one task when one list, or one rule, serves them all.
int32_t heads_of_a_task(const BlockSparseAttentionParams& p) {
  if (p.rule_stride_head != 0) return 1;
  for (const BlockLists* lists : {&p.partial, &p.full, &p.columns})
    if (lists->count_stride_head != 0 || lists->entry_stride_head != 0) return 1;
  const int32_t group = p.num_heads / p.key_heads;
  return group * p.num_queries <= kFewRows ? group : 1;
}

template <class T>
void attend_few_rows(const BlockSparseAttentionParams& p) {
  const int32_t group = heads_of_a_task(p), rows = group * p.num_queries, padded = round_up(p.head_dim, kLanes);
  struct Part {
    int32_t b, h, begin, end;
  };
  std::vector<Part> parts;
  std::vector<int64_t> first_part;  // of each task
  int64_t keys = 0;
  for (int32_t b = 0; b < p.batch; ++b)
    for (int32_t h = 0; h < p.num_heads; h += group) {
      first_part.push_back(static_cast<int64_t>(parts.size()));
      const int32_t entries = Entries(p, b, h, 0).count();
      const int64_t listed = keys_listed(p, b, h, 0);
      const int32_t count = static_cast<int32_t>(std::clamp<int64_t>(listed / kPartKeys, 1, std::max(entries, 1)));
      for (int32_t part = 0; part < count; ++part) {
        const Range range = split_range(entries, count, part);
        parts.push_back({b, h, range.begin, range.end});
      }
      keys += listed;
    }
  first_part.push_back(static_cast<int64_t>(parts.size()));

  const int64_t num_parts = static_cast<int64_t>(parts.size());
  Scratch<float> values = scratch<float>(num_parts * rows * padded), sums = scratch<float>(num_parts * rows * 2);
  std::vector<PartialRows> partial(parts.size());
  for (int64_t i = 0; i < num_parts; ++i)
    partial[i] = {&values[i * rows * padded], &sums[i * rows * 2], &sums[i * rows * 2 + rows]};
  run_tasks(
      num_parts, keys * rows * p.head_dim, [&] { return FewRows<T>(p, group); },
      [&](FewRows<T>& worker, int64_t i) {
        worker.run(parts[i].b, parts[i].h, parts[i].begin, parts[i].end, partial[i]);
      });

  Scratch<float> merged = scratch<float>(2 * padded);
  for (size_t task = 0; task + 1 < first_part.size(); ++task) {
    const Part& part = parts[first_part[task]];
    for (int32_t r = 0; r < rows; ++r) {
      const PackedRow at = packed_row(r, group);
      const int64_t row = (int64_t{part.b} * p.num_heads + part.h + at.head) * p.num_queries + at.query;
      merge_parts<T>(p, &partial[first_part[task]], static_cast<int32_t>(first_part[task + 1] - first_part[task]), r,
                     padded, row, merged.get());
    }
  }
}

bool has_few_rows(const BlockSparseAttentionParams& p) { return p.num_queries * heads_of_a_task(p) <= kFewRows; }

template <class Products>
void attend_many_rows(const BlockSparseAttentionParams& p) {
  run_query_blocks(p, [&] { return ManyRows<Products>(p); });
}

#if !defined(__AVX512BF16__)
template <class T>
void attend(const BlockSparseAttentionParams& p) {
  if (has_few_rows(p)) return attend_few_rows<T>(p);
  if constexpr (std::is_same_v<T, bf16>) {
    if (bf16_pairs_wanted()) return attend_many_rows<PairProducts>(p);
  }
  attend_many_rows<FloatProducts<T>>(p);
}
#endif

}  // namespace

void block_sparse_attention_cpu(const BlockSparseAttentionParams& p) {
#if defined(__AVX512BF16__)
  // Nothing else gains.
  if (p.dtype != DType::kBFloat16 || has_few_rows(p)) return avx512::block_sparse_attention_cpu(p);
  attend_many_rows<PairProducts>(p);
#else
  switch (p.dtype) {
    case DType::kFloat32: return attend<float>(p);
    case DType::kFloat16: return attend<f16>(p);
    case DType::kBFloat16: return attend<bf16>(p);
  }
#endif
}

}  // namespace VTK_ISA
}  // namespace vtk
