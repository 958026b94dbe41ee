// Squared Euclidean distances between the tokens of one item. Include only from *_cpu.cpp files.
//
// A distance is a sum of squared differences in the order of dot_panel.h: the same from either side, 0 between equal
// tokens, and the same whatever tile it is computed in. NOTE: |x|^2 + |y|^2 - 2 x y takes half the operations and has
// none of that.
//
// Up to kCachedTokens the whole matrix is computed once, one half of it, and kept (4 MiB at most): every pass over
// the distances then costs a read instead of 2 D operations, and there are two passes or, for medoids, hundreds.
// Longer items are computed again in each pass, in panels of columns that stay in L2.
#pragma once
#include <algorithm>
#include <numeric>
#include <type_traits>

#include "common/dot_panel.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "device/tile.h"
#include "merge/cluster_tokens.h"

namespace vtk {
namespace VTK_ISA {

// Receives the distances of one row to `count` columns from j on. Its type does not depend on what it refers to, so
// the tiles are compiled once.
class DistanceVisitor {
 public:
  template <class Use>
  DistanceVisitor(const Use& use)
      : use_(&use), call_([](const void* use, int64_t i, int32_t j, const float* distances, int32_t count) {
          (*static_cast<const Use*>(use))(i, j, distances, count);
        }) {}
  void operator()(int64_t i, int32_t j, const float* distances, int32_t count) const {
    call_(use_, i, j, distances, count);
  }

 private:
  const void* use_;
  void (*call_)(const void*, int64_t, int32_t, const float*, int32_t);
};

class Distances {
 public:
  Distances(const ClusterTokens& tokens, int64_t b)
      : t(tokens),
        b(b),
        group_size_(panel_group_size(t.channels)),
        panel_(static_cast<int32_t>(kPanelWidth * std::clamp<int64_t>(kPanelFloats / group_size_, 1, kMaxGroups))) {
    squared_norm_ = scratch<float>(t.count);
    usable_ = scratch<int32_t>(t.count);
    with_type([&](auto type) { find_norms<decltype(type)>(); });
    for (int32_t n = 0; n < t.count; ++n) {
      const bool valid = t.valid.data == nullptr || t.valid.data[b * t.valid.stride_row + n * t.valid.stride_col];
      if (valid && squared_norm_[n] < kMaxSquaredNorm) usable_[num_usable_++] = n;
    }
    if (t.count <= kCachedTokens) fill_cache();
  }

  const int32_t* usable() const { return usable_.get(); }  // ascending
  int32_t num_usable() const { return num_usable_; }
  float squared_norm(int32_t token) const { return squared_norm_[token]; }

  // Calls use(i, j, distances, count) with the distances of rows[i] to columns[j ... j + count), for every i and, of
  // one i, for ascending j that cover all columns. Different i may come from different threads.
  void visit(const int32_t* rows, int32_t num_rows, const int32_t* columns, int32_t num_columns,
             const DistanceVisitor& use) const {
    const int64_t row_work = cache_ != nullptr ? num_columns : int64_t{num_columns} * t.channels;
    parallel_for(num_rows, grain(row_work), [&](int64_t begin, int64_t end) {
      if (cache_ != nullptr)
        read(rows, begin, end, columns, num_columns, use);
      else
        compute(rows, begin, end, columns, 0, num_columns, use);
    });
  }

  float distance(int32_t a, int32_t b) const {
    float squared = 0.0f;
    visit(&a, 1, &b, 1, [&](int64_t, int32_t, const float* distances, int32_t) { squared = distances[0]; });
    return squared;
  }

 private:
  static constexpr int32_t kCachedTokens = 1024;
  static constexpr int32_t kMaxGroups = 16;
  static constexpr int64_t kPanelFloats = 32 << 10;
  static constexpr int64_t kWorkGrain = 1 << 16;

  static int64_t grain(int64_t work_each) { return std::max<int64_t>(1, kWorkGrain / std::max<int64_t>(1, work_each)); }

  template <class Body>
  void with_type(const Body& body) const {
    switch (t.dtype) {
      case DType::kFloat32: body(float{}); break;
      case DType::kFloat16: body(f16{}); break;
      case DType::kBFloat16: body(bf16{}); break;
    }
  }

  template <class T>
  const T* row(int64_t n) const {
    return static_cast<const T*>(t.data) + b * t.stride_batch + n * t.stride_token;
  }

  template <class T>
  void find_norms() {
    parallel_for(t.count, grain(t.channels), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) squared_norm_[n] = dot_pair(row<T>(n), row<T>(n), t.channels);
    });
  }

  void read(const int32_t* rows, int64_t begin, int64_t end, const int32_t* columns, int32_t num_columns,
            const DistanceVisitor& use) const {
    float distances[kMaxGroups * kPanelWidth];
    for (int64_t i = begin; i < end; ++i) {
      const float* cached = &cache_[int64_t{rows[i]} * t.count];
      for (int32_t j = 0; j < num_columns; j += panel_) {
        const int32_t count = std::min(panel_, num_columns - j);
        for (int32_t c = 0; c < count; ++c) distances[c] = cached[columns[j + c]];
        use(i, j, distances, count);
      }
    }
  }

  // Rows [begin, end) against columns [first, last).
  void compute(const int32_t* rows, int64_t begin, int64_t end, const int32_t* columns, int32_t first, int32_t last,
               const DistanceVisitor& use) const {
    Scratch<float> panel = scratch<float>(panel_ / kPanelWidth * group_size_);
    for (int32_t j = first; j < last; j += panel_)
      with_type([&](auto type) {
        compute_panel<decltype(type)>(rows, begin, end, columns, j, std::min(panel_, last - j), panel.get(), use);
      });
  }

  template <class T>
  void compute_panel(const int32_t* rows, int64_t begin, int64_t end, const int32_t* columns, int32_t j, int32_t count,
                     float* panel, const DistanceVisitor& use) const {
    for (int32_t c = 0; c < round_up(count, kPanelWidth); ++c)  // the last column fills its group
      pack_column(row<T>(columns[j + std::min(c, count - 1)]), t.channels, c % kPanelWidth,
                  panel + c / kPanelWidth * group_size_);
    dot_rows<kMaxGroups, SquaredDifference>([&](int64_t i) { return row<T>(rows[i]); }, begin, end, panel,
                                            ceil_div(count, kPanelWidth), t.channels,
                                            [&](int64_t i, const float* distances) { use(i, j, distances, count); });
  }

  // Column panel k and the rows from its first column on; panels k and last - k together are equal work.
  void fill_cache() {
    cache_ = scratch<float>(int64_t{t.count} * t.count);
    Scratch<int32_t> all = scratch<int32_t>(t.count);
    std::iota(all.get(), all.get() + t.count, 0);
    auto store_both = [&](int64_t i, int32_t first, const float* distances, int32_t count) {
      std::copy_n(distances, count, &cache_[i * t.count + first]);
      for (int32_t c = 0; c < count; ++c) cache_[int64_t{first + c} * t.count + i] = distances[c];
    };
    const int32_t panels = ceil_div(t.count, panel_);
    auto fill = [&](int32_t k) {
      const int32_t first = k * panel_;
      compute(all.get(), first, t.count, all.get(), first, std::min(first + panel_, t.count), store_both);
    };
    parallel_for(ceil_div(panels, 2), grain(int64_t{panel_} * t.count * t.channels), [&](int64_t begin, int64_t end) {
      for (int32_t k = static_cast<int32_t>(begin); k < end; ++k) {
        fill(k);
        if (panels - 1 - k != k) fill(panels - 1 - k);
      }
    });
  }

  const ClusterTokens& t;
  const int64_t b;
  const int64_t group_size_;
  const int32_t panel_;  // columns of a panel
  Scratch<float> squared_norm_, cache_;
  Scratch<int32_t> usable_;
  int32_t num_usable_ = 0;
};

// owner[i] of rows[i]: its nearest column, the lower of equals; a token that is a column itself has that one.
static inline void assign_nearest(const Distances& distances, const int32_t* rows, int32_t num_rows,
                                  const int32_t* columns, int32_t num_columns, float* nearest, int32_t* owner) {
  std::fill_n(owner, num_rows, -1);
  distances.visit(rows, num_rows, columns, num_columns, [&](int64_t i, int32_t j, const float* squared, int32_t count) {
    for (int32_t c = 0; c < count; ++c) {
      const float found = columns[j + c] == rows[i] ? -1.0f : squared[c];
      if (owner[i] >= 0 && found >= nearest[i]) continue;
      nearest[i] = found;
      owner[i] = j + c;
    }
  });
}

}  // namespace VTK_ISA
}  // namespace vtk
