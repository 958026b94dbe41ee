// The lists turned round: of each chunk of keys, who lists a key of it. Include only from *_cpu.cpp files.
#pragma once
#include <vector>

#include "attention/block_sparse_keys.h"
#include "common/parallel.h"

namespace vtk {
namespace VTK_ISA {
namespace {

// Block of queries `row` lists keys of the chunk in its entry number `entry`.
struct Touch {
  int32_t row, entry;
};

class TransposedLists {
 public:
  TransposedLists(const BlockSparseAttentionParams& params, int32_t chunk_keys)
      : p(params), chunk_keys_(chunk_keys), chunks_(ceil_div(p.num_keys, chunk_keys)) {
    for (const BlockLists* lists : {&p.partial, &p.full, &p.columns}) {
      if (lists->count_stride_batch != 0 || lists->entry_stride_batch != 0) batches_ = p.batch;
      if (lists->count_stride_head != 0 || lists->entry_stride_head != 0) heads_ = p.num_heads;
    }
    const int64_t lists = int64_t{batches_} * heads_;
    ends_.assign(lists * chunks_ + 1, 0);
    each_list([&](int64_t list) { walk(list, [&](int64_t chunk, Touch) { ++ends_[chunk + 1]; }); });
    for (size_t i = 1; i < ends_.size(); ++i) ends_[i] += ends_[i - 1];
    touches_.resize(ends_.back());
    std::vector<int64_t> next(ends_.begin(), ends_.end() - 1);
    each_list([&](int64_t list) { walk(list, [&](int64_t chunk, Touch touch) { touches_[next[chunk]++] = touch; }); });
  }

  // By row, then by entry.
  const Touch* begin(int32_t b, int32_t h, int32_t chunk) const { return touches_.data() + ends_[at(b, h, chunk)]; }
  const Touch* end(int32_t b, int32_t h, int32_t chunk) const { return touches_.data() + ends_[at(b, h, chunk) + 1]; }
  int32_t num_chunks() const { return chunks_; }

 private:
  int64_t at(int32_t b, int32_t h, int32_t chunk) const {
    return (int64_t{batches_ == 1 ? 0 : b} * heads_ + (heads_ == 1 ? 0 : h)) * chunks_ + chunk;
  }

  template <class Body>
  void each_list(const Body& body) const {
    parallel_for(int64_t{batches_} * heads_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t list = begin; list < end; ++list) body(list);
    });
  }

  template <class Body>
  void walk(int64_t list, const Body& body) const {
    const int32_t b = static_cast<int32_t>(list / heads_), h = static_cast<int32_t>(list % heads_);
    for (int32_t row = 0; row < ceil_div(p.num_queries, p.block_q); ++row) {
      const Entries entries(p, b, h, row);
      for (int32_t entry = 0; entry < entries.count(); ++entry) {
        const KeyRange keys = entries.keys(entry, p.num_keys);
        for (int32_t chunk = keys.begin / chunk_keys_; chunk < ceil_div(keys.end, chunk_keys_); ++chunk)
          body(at(b, h, chunk), Touch{row, entry});
      }
    }
  }

  const BlockSparseAttentionParams& p;
  int32_t chunk_keys_, chunks_, batches_ = 1, heads_ = 1;
  std::vector<int64_t> ends_;  // [batches][heads][chunks] + 1
  std::vector<Touch> touches_;
};

}  // namespace
}  // namespace VTK_ISA
}  // namespace vtk
