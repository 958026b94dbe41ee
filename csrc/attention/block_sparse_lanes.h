// Tiles of attention with a token a lane: what the forward pass and both halves of the backward pass are made of.
// Include only from *_cpu.cpp files.
//
// A group is 2 * kLanes tokens, held transposed: [D][group]. It meets tiles of other tokens, whose elements are
// broadcast: as rows for dot products [tile][group] (dot_tile.h), as panels for sums over the tile [D][group]. Both are
// register tiles of 6 x 2 vectors, 8 loads for 12 FMAs.
#pragma once
#include "attention/block_sparse_keys.h"
#include "common/dot_tile.h"

namespace vtk {
namespace VTK_ISA {
namespace {

template <class T>
const T* row_of(const HeadsView& x, int32_t b, int32_t head, int32_t n) {
  return static_cast<const T*>(x.data) + b * x.stride_batch + head * x.stride_head + n * x.stride_row;
}

template <class T>
void widen(const T* from, int32_t count, float* to) {
  int32_t d = 0;
  for (; d + kLanes <= count; d += kLanes) store(to + d, load(from + d));
  for (; d < count; ++d) to[d] = to_float(from[d]);
}

// Token `token` of groups [.., D][group], whose first lane it is at.
inline float* lane_of(float* groups, int32_t token, int32_t depth) {
  return groups + int64_t{token / kGroup} * kGroup * depth + token % kGroup;
}

template <class T>
void load_lane(const T* from, int32_t depth, float factor, float* lane) {
  for (int32_t d = 0; d < depth; ++d) lane[d * kGroup] = to_float(from[d]) * factor;
}

inline void clear_lane(int32_t depth, float* lane) {
  for (int32_t d = 0; d < depth; ++d) lane[d * kGroup] = 0.0f;
}

inline void read_lane(const float* lane, int32_t depth, float* to) {
  for (int32_t d = 0; d < depth; ++d) to[d] = lane[d * kGroup];
}

// Rows [first, first + count) of a head as lanes; those without a row repeat the last one.
template <class T>
void load_lanes(const HeadsView& x, int32_t b, int32_t head, int32_t first, int32_t count, int32_t depth, float factor,
                float* groups) {
  for (int32_t r = 0; r < round_up(count, kGroup); ++r)
    load_lane(row_of<T>(x, b, head, first + std::min(r, count - 1)), depth, factor, lane_of(groups, r, depth));
}

// A tile of rows as dot_tile reads them. Float32 rows stay where they lie; those apart by a multiple of 4 KiB
// (interleaved heads) fight for the same sets of L1, and 16-bit rows are converted once for all groups: both are
// copied.
template <class T>
class RowTile {
 public:
  explicit RowTile(int32_t depth) : depth_(depth), copies_(scratch<float>(int64_t{kTileKeys} * depth)) {}

  void load(const HeadsView& x, int32_t b, int32_t head, const int32_t* index, int32_t count) {
    for (int32_t i = 0; i < count; ++i) {
      const T* from = row_of<T>(x, b, head, index[i]);
      if constexpr (sizeof(T) == sizeof(float)) {
        if (x.stride_row == depth_) {
          row_[i] = from;
          continue;
        }
      }
      widen(from, depth_, &copies_[int64_t{i} * depth_]);
      row_[i] = &copies_[int64_t{i} * depth_];
    }
    for (int32_t i = count; i < round_up(count, kTileRows); ++i) row_[i] = row_[count - 1];
  }

  const float* row(int32_t i) const { return row_[i]; }

  // dots[i][group] of rows [begin, count) with a group, begin a multiple of kTileRows.
  void dot(int32_t begin, int32_t count, const float* group, float* dots) const {
    for (int32_t i = begin; i < count; i += kTileRows) {
      f32v dot[kTileRows][2];
      dot_tile(&row_[i], group, depth_, dot);
      std::memcpy(&dots[i * kGroup], dot, sizeof dot);
    }
  }

 private:
  int32_t depth_;
  Scratch<float> copies_;  // [rows][D]
  const float* row_[kTileKeys];
};

// out[channel][group] = out * correct + sum over `count` rows of panel[row][channel] weights[row][group].
template <int kWidth>
void accumulate(const float* panel, const float* weights, int32_t count, f32v correct_low, f32v correct_high,
                float* out) {
  f32v sum[kWidth][2];
#pragma GCC unroll 6
  for (int d = 0; d < kWidth; ++d) {
    sum[d][0] = load(out + d * kGroup) * correct_low;
    sum[d][1] = load(out + d * kGroup + kLanes) * correct_high;
  }
  for (int32_t n = 0; n < count; ++n, panel += kWidth, weights += kGroup) {
    const f32v low = load(weights), high = load(weights + kLanes);
#pragma GCC unroll 6
    for (int d = 0; d < kWidth; ++d) {
      sum[d][0] += panel[d] * low;
      sum[d][1] += panel[d] * high;
    }
  }
#pragma GCC unroll 6
  for (int d = 0; d < kWidth; ++d) {
    store(out + d * kGroup, sum[d][0]);
    store(out + d * kGroup + kLanes, sum[d][1]);
  }
}

// A tile of rows, copied as [panel of 6 channels][row][channel], for rows D apart fall into a few sets of L1. The last
// panel may be narrower.
class Panels {
 public:
  explicit Panels(int32_t depth) : depth_(depth), panels_(scratch<float>(int64_t{kTileKeys} * depth)) {}

  void pack(int32_t i, const float* row) {
    float* to = panels_.get();
    int32_t d = 0;
    for (; d + kTileRows <= depth_; d += kTileRows, to += kTileKeys * kTileRows)
      std::memcpy(to + i * kTileRows, row + d, kTileRows * sizeof(float));
    const int32_t rest = depth_ - d;
    std::memcpy(to + i * rest, row + d, static_cast<size_t>(rest) * sizeof(float));
  }

  // out[D][group] = out * (low, high) + rows[begin, end)^T weights[begin, end)
  void accumulate_rows(int32_t begin, int32_t end, const float* weights, f32v low, f32v high, float* out) const {
    const float* panel = panels_.get();
    const int32_t rest = depth_ % kTileRows, count = end - begin;
    weights += begin * kGroup;
    for (int32_t d = rest; d < depth_; d += kTileRows, panel += kTileKeys * kTileRows, out += kTileRows * kGroup)
      accumulate<kTileRows>(panel + begin * kTileRows, weights, count, low, high, out);
    panel += begin * rest;
    switch (rest) {
      case 1: return accumulate<1>(panel, weights, count, low, high, out);
      case 2: return accumulate<2>(panel, weights, count, low, high, out);
      case 3: return accumulate<3>(panel, weights, count, low, high, out);
      case 4: return accumulate<4>(panel, weights, count, low, high, out);
      case 5: return accumulate<5>(panel, weights, count, low, high, out);
      default: return;
    }
  }

 private:
  int32_t depth_;
  Scratch<float> panels_;
};

inline void add_bias(const KeyTile& tile, float* logits) {
  for (int32_t n = 0; n < tile.count; ++n)
    for (int v = 0; v < kGroup; v += kLanes)
      store(&logits[n * kGroup + v], load(&logits[n * kGroup + v]) + tile.bias[n]);
}

// -inf where a lane's limit hides a key.
inline void hide(const KeyTile& tile, const int32_t* limits, float* logits) {
  for (int v = 0; v < kGroup; v += kLanes) {
    i32v limit;
    std::memcpy(&limit, limits + v, sizeof limit);
    for (int32_t n = 0; n < tile.count; ++n) {
      float* x = &logits[n * kGroup + v];
      store(x, tile.index[n] < limit ? load(x) : splat(-kInfinity));
    }
  }
}

}  // namespace
}  // namespace VTK_ISA
}  // namespace vtk
