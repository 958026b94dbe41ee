// Dot products, or squared distances, of rows against a packed panel of float columns.
//
// A panel holds groups of kPanelWidth columns, interleaved lane vector by lane vector and zero-padded, so that a
// group is one sequential stream. NOTE: unpacked columns with a stride of 4 KiB or more share the sets of the
// first-level cache and halve the speed.
//
// Every result has one summation order, whatever block it is computed in: the channels are cut into chunks
// of kDotChunk, a chunk is summed lane by lane in ascending order, the chunks are added in ascending order, and
// the lanes in the tree of sum(). So a result does not depend on which other rows or columns shared the pass.
// Include only from *_cpu.cpp files.
#pragma once
#include <algorithm>
#include <type_traits>

#include "common/simd.h"

namespace vtk {
namespace VTK_ISA {

inline constexpr int64_t kDotChunk = 256;
inline constexpr int kPanelWidth = 4;
inline constexpr int kMaxPanelRows = 3;  // 3 x 4 accumulators and the operands fit 16 registers

// What a channel adds.
struct Product {
  static f32v of(f32v x, f32v y) { return x * y; }
};
struct SquaredDifference {
  static f32v of(f32v x, f32v y) { return (x - y) * (x - y); }
};

// Floats of one group.
static inline int64_t panel_group_size(int64_t channels) {
  return (channels + kLanes - 1) / kLanes * kLanes * kPanelWidth;
}

// The lanes from p on that exist, the others zero.
template <class T>
static inline f32v load_tail(const T* p, int64_t count) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, static_cast<size_t>(count) * sizeof(T));
  return load(lanes);
}

// Writes `column` as column c of a group; the others keep what they hold.
template <class T>
static inline void pack_column(const T* column, int64_t channels, int c, float* group) {
  int64_t i = 0;
  for (; i + kLanes <= channels; i += kLanes) store(group + i * kPanelWidth + c * kLanes, load(column + i));
  if (i < channels) store(group + i * kPanelWidth + c * kLanes, load_tail(column + i, channels - i));
}

// total[r * kPanelWidth + c] += the chunk [begin, end) of rows[r] . column c.
template <class Term, int kRows, class T>
static inline void add_chunk(const T* const* rows, const float* group, int64_t begin, int64_t end, f32v* total) {
  f32v acc[kRows][kPanelWidth] = {};
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    f32v row[kRows];
#pragma GCC unroll 3
    for (int r = 0; r < kRows; ++r) row[r] = load(rows[r] + i);
#pragma GCC unroll 4
    for (int c = 0; c < kPanelWidth; ++c) {
      const f32v column = load(group + i * kPanelWidth + c * kLanes);
#pragma GCC unroll 3
      for (int r = 0; r < kRows; ++r) acc[r][c] += Term::of(row[r], column);
    }
  }
  if (i < end) {
#pragma GCC unroll 3
    for (int r = 0; r < kRows; ++r) {
      const f32v row = load_tail(rows[r] + i, end - i);
#pragma GCC unroll 4
      for (int c = 0; c < kPanelWidth; ++c) acc[r][c] += Term::of(row, load(group + i * kPanelWidth + c * kLanes));
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kPanelWidth; ++c) total[r * kPanelWidth + c] += acc[r][c];
}

// out[(r * groups + g) * kPanelWidth + c] = rows[r] . column c of group g, groups <= kMaxGroups.
template <class Term, int kRows, int kMaxGroups, class T>
static inline void dot_panel(const T* const* rows, const float* panel, int groups, int64_t channels, float* out) {
  constexpr int kTile = kRows * kPanelWidth;
  f32v total[kMaxGroups * kTile];
  float wide[sizeof(T) < sizeof(float) ? kRows * kDotChunk : 1];
  for (int i = 0; i < groups * kTile; ++i) total[i] = f32v{};
  for (int64_t begin = 0; begin < channels; begin += kDotChunk) {
    const int64_t end = std::min(begin + kDotChunk, channels);
    if constexpr (sizeof(T) < sizeof(float)) {
      // Convert the chunk once instead of once a group.
      const float* wide_rows[kRows];
      for (int r = 0; r < kRows; ++r) {
        float* to = wide + r * kDotChunk;
        int64_t i = begin;
        for (; i + kLanes <= end; i += kLanes) store(to + i - begin, load(rows[r] + i));
        if (i < end) store(to + i - begin, load_tail(rows[r] + i, end - i));
        wide_rows[r] = to;
      }
      const int64_t padded = (end - begin + kLanes - 1) / kLanes * kLanes;
      for (int g = 0; g < groups; ++g)
        add_chunk<Term, kRows>(wide_rows, panel + g * panel_group_size(channels) + begin * kPanelWidth, 0, padded,
                               total + g * kTile);
    } else {
      const T* chunk_rows[kRows];
      for (int r = 0; r < kRows; ++r) chunk_rows[r] = rows[r] + begin;
      for (int g = 0; g < groups; ++g)
        add_chunk<Term, kRows>(chunk_rows, panel + g * panel_group_size(channels) + begin * kPanelWidth, 0, end - begin,
                               total + g * kTile);
    }
  }
  for (int g = 0; g < groups; ++g)
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < kPanelWidth; ++c)
        out[(r * groups + g) * kPanelWidth + c] = sum(total[g * kTile + r * kPanelWidth + c]);
}

// The same for any number of rows: use(row, dots) gets the groups * kPanelWidth dots of each row in turn.
template <int kMaxGroups, class Term = Product, class RowAt, class Use>
static inline void dot_rows(const RowAt& row_at, int64_t begin, int64_t end, const float* panel, int groups,
                            int64_t channels, const Use& use) {
  using T = std::remove_cv_t<std::remove_pointer_t<decltype(row_at(int64_t{}))>>;
  float dots[kMaxPanelRows * kMaxGroups * kPanelWidth];
  for (int64_t i = begin; i < end; i += kMaxPanelRows) {
    const T* rows[kMaxPanelRows];
    const int count = static_cast<int>(std::min<int64_t>(kMaxPanelRows, end - i));
    for (int r = 0; r < count; ++r) rows[r] = row_at(i + r);
    switch (count) {
      case 1: dot_panel<Term, 1, kMaxGroups>(rows, panel, groups, channels, dots); break;
      case 2: dot_panel<Term, 2, kMaxGroups>(rows, panel, groups, channels, dots); break;
      default: dot_panel<Term, 3, kMaxGroups>(rows, panel, groups, channels, dots); break;
    }
    const int width = groups * kPanelWidth;
    for (int r = 0; r < count; ++r) use(i + r, dots + r * width);
  }
}

// One pair alone, in a fixed order of its own: four accumulators hide the latency.
template <class T>
static inline float dot_pair(const T* x, const T* y, int64_t channels) {
  f32v acc[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= channels; i += 4 * kLanes)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) acc[k] += load(x + i + k * kLanes) * load(y + i + k * kLanes);
  for (int k = 0; i < channels; i += kLanes, ++k) {
    const bool full = i + kLanes <= channels;
    acc[k] += full ? load(x + i) * load(y + i) : load_tail(x + i, channels - i) * load_tail(y + i, channels - i);
  }
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

}  // namespace VTK_ISA
}  // namespace vtk
