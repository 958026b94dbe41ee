// How the tasks of attention go to threads: from a counter, those with the longest lists first. Include only from
// *_cpu.cpp files. Which thread runs a task changes no bit of it.
#pragma once
#include <algorithm>
#include <vector>

#include "attention/block_sparse_keys.h"
#include "common/parallel.h"

namespace vtk {
namespace VTK_ISA {
namespace {

struct QueryBlock {
  int32_t b, h, row;
  int64_t keys;  // listed, at most
};

inline int64_t keys_listed(const BlockSparseAttentionParams& p, int32_t b, int32_t h, int32_t row) {
  if (p.rule != nullptr) return rule_ranges(p, b, h, row).num_keys();
  const int32_t blocks = list_of(p.partial, b, h, row).count, full = list_of(p.full, b, h, row).count;
  const int32_t last = std::min((row + 1) * p.block_q, p.num_queries) - 1;
  const int32_t seen = std::max(0, limit_of(p, last, length_of(p, b)));
  return std::min<int64_t>(int64_t{blocks} * p.block_k, seen) + int64_t{full} * p.block_k +
         list_of(p.columns, b, h, row).count;
}

// Runs worker.run(b, h, row) for every block of queries.
template <class MakeWorker>
void run_query_blocks(const BlockSparseAttentionParams& p, const MakeWorker& make_worker) {
  std::vector<QueryBlock> blocks;
  int64_t keys = 0;
  for (int32_t b = 0; b < p.batch; ++b)
    for (int32_t h = 0; h < p.num_heads; ++h)
      for (int32_t row = 0; row < ceil_div(p.num_queries, p.block_q); ++row) {
        blocks.push_back({b, h, row, keys_listed(p, b, h, row)});
        keys += blocks.back().keys;
      }
  std::stable_sort(blocks.begin(), blocks.end(),
                   [](const QueryBlock& x, const QueryBlock& y) { return x.keys > y.keys; });
  run_tasks(static_cast<int64_t>(blocks.size()), keys * std::min(p.block_q, p.num_queries) * p.head_dim, make_worker,
            [&](auto& worker, int64_t i) { worker.run(blocks[i].b, blocks[i].h, blocks[i].row); });
}

}  // namespace
}  // namespace VTK_ISA
}  // namespace vtk
