// Tiles of attention with a token a lane: what the forward pass and both halves of the backward pass are made of.
// Include only from *_cpu.cpp files.
//
// A group is 2 * kLanes tokens, held transposed: [D][group]. It meets tiles of other tokens, whose elements are
// broadcast: in dot products [tile][group] and in sums over the tile [D][group]. Both are register tiles of 6 x 2
// vectors, 8 loads for 12 FMAs.
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

// dots[6][group] = six packed rows [D][6] times a group.
inline void dot_six(const float* rows, const float* group, int32_t depth, float* dots) {
  f32v dot[kTileRows][2] = {};
  for (int32_t d = 0; d < depth; ++d, rows += kTileRows, group += kGroup) {
    const f32v low = load(group), high = load(group + kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i) {
      dot[i][0] += rows[i] * low;
      dot[i][1] += rows[i] * high;
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kTileRows; ++i) {  // NOTE: gcc makes a copy of the array a `rep movs`, 6 % of a pass
    store(dots + i * kGroup, dot[i][0]);
    store(dots + i * kGroup + kLanes, dot[i][1]);
  }
}

// out[channel][group] = out * correct + the sum over `count` rows of row[channel] weights[row][group], for kWidth
// channels of packed rows, `stride` elements from six to six.
template <int kWidth>
void accumulate(const float* rows, int64_t stride, const float* weights, int32_t count, f32v correct_low,
                f32v correct_high, float* out) {
  f32v sum[kWidth][2];
#pragma GCC unroll 6
  for (int d = 0; d < kWidth; ++d) {
    sum[d][0] = load(out + d * kGroup) * correct_low;
    sum[d][1] = load(out + d * kGroup + kLanes) * correct_high;
  }
  auto add = [&](const float* row) {
    const f32v low = load(weights), high = load(weights + kLanes);
    weights += kGroup;
#pragma GCC unroll 6
    for (int d = 0; d < kWidth; ++d) {
      sum[d][0] += row[d * kTileRows] * low;
      sum[d][1] += row[d * kTileRows] * high;
    }
  };
  for (; count >= kTileRows; count -= kTileRows, rows += stride) {
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i) add(rows + i);
  }
  for (int32_t i = 0; i < count; ++i) add(rows + i);
#pragma GCC unroll 6
  for (int d = 0; d < kWidth; ++d) {
    store(out + d * kGroup, sum[d][0]);
    store(out + d * kGroup + kLanes, sum[d][1]);
  }
}

// A tile of rows as float32 [six rows][D][6]: one stream for dot products, and for sums the rows of six channels lie
// together, whatever their distance in the tensor is (rows D apart fall into a few sets of L1).
template <class T>
class PackedRows {
 public:
  explicit PackedRows(int32_t depth)
      : depth_(depth), packed_(scratch<float>(int64_t{kTileKeys} * depth + kLanes)) {}  // a store may reach beyond

  void load(const HeadsView& x, int32_t b, int32_t head, const int32_t* index, int32_t count) {
    for (int32_t i = 0; i < count; i += kTileRows) {
      const T* rows[kTileRows];
      for (int j = 0; j < kTileRows; ++j) rows[j] = row_of<T>(x, b, head, index[std::min(i + j, count - 1)]);
      pack(rows, &packed_[int64_t{i} * depth_]);
    }
  }

  // dots[i][group] of rows [begin, count) with a group, begin a multiple of kTileRows.
  void dot(int32_t begin, int32_t count, const float* group, float* dots) const {
    for (int32_t i = begin; i < count; i += kTileRows)
      dot_six(&packed_[int64_t{i} * depth_], group, depth_, dots + i * kGroup);
  }

  // out[D][group] = out * (low, high) + rows[begin, count)^T weights[begin, count)
  void add_weighted(int32_t begin, int32_t count, const float* weights, f32v low, f32v high, float* out) const {
    const float* rows = &packed_[int64_t{begin} * depth_];
    const int64_t stride = int64_t{depth_} * kTileRows;
    weights += begin * kGroup;
    count -= begin;
    int32_t d = 0;
    for (; d + kTileRows <= depth_; d += kTileRows)
      accumulate<kTileRows>(rows + d * kTileRows, stride, weights, count, low, high, out + d * kGroup);
    rows += d * kTileRows;
    out += d * kGroup;
    switch (depth_ - d) {
      case 1: return accumulate<1>(rows, stride, weights, count, low, high, out);
      case 2: return accumulate<2>(rows, stride, weights, count, low, high, out);
      case 3: return accumulate<3>(rows, stride, weights, count, low, high, out);
      case 4: return accumulate<4>(rows, stride, weights, count, low, high, out);
      case 5: return accumulate<5>(rows, stride, weights, count, low, high, out);
      default: return;
    }
  }

 private:
  void pack(const T* const (&rows)[kTileRows], float* to) const {
    int32_t d = 0;
    if constexpr (kLanes >= kTileRows) {
      for (; d + kLanes <= depth_; d += kLanes) {
        f32v v[kLanes] = {};
        for (int j = 0; j < kTileRows; ++j) v[j] = vtk::VTK_ISA::load(rows[j] + d);
        transpose(v);
        for (int lane = 0; lane < kLanes; ++lane) store(to + (d + lane) * kTileRows, v[lane]);  // the next one mends it
      }
    }
    for (; d < depth_; ++d)
      for (int j = 0; j < kTileRows; ++j) to[d * kTileRows + j] = to_float(rows[j][d]);
  }

  int32_t depth_;
  Scratch<float> packed_;
};

inline void add_bias(const KeyTile& tile, float* logits) {
  for (int32_t n = 0; n < tile.count; ++n)
    for (int v = 0; v < kGroup; v += kLanes)
      store(&logits[n * kGroup + v], load(&logits[n * kGroup + v]) + tile.bias[n]);
}

// -inf where sees(key, a lane's bound) does not hold.
template <class Sees>
void hide_unless(const KeyTile& tile, const int32_t* bounds, float* logits, const Sees& sees) {
  for (int v = 0; v < kGroup; v += kLanes) {
    i32v bound;
    std::memcpy(&bound, bounds + v, sizeof bound);
    for (int32_t n = 0; n < tile.count; ++n) {
      float* x = &logits[n * kGroup + v];
      store(x, sees(tile.index[n], bound) ? load(x) : splat(-kInfinity));
    }
  }
}

// -inf where a lane's limit hides a key.
inline void hide(const KeyTile& tile, const int32_t* limits, float* logits) {
  hide_unless(tile, limits, logits, [](int32_t n, i32v limit) { return n < limit; });
}

// -inf where a key is before a lane's window.
inline void hide_before(const KeyTile& tile, const int32_t* windows, float* logits) {
  hide_unless(tile, windows, logits, [](int32_t n, i32v window) { return n >= window; });
}

}  // namespace
}  // namespace VTK_ISA
}  // namespace vtk
