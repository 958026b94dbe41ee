// The two products of block_sparse_many_rows.h: logits of a group of rows with a tile of keys, and sums of its values.
// Include only from block_sparse_attention_cpu.cpp.
//
// Both are register tiles of 6 x 2 vectors, 8 loads for 12 FMAs: 6 keys for the logits, 6 channels for the output. Here
// in float32, and in block_sparse_pairs.h in pairs of bfloat16.
#pragma once
#include "attention/block_sparse_keys.h"
#include "common/dot_tile.h"

namespace vtk {
namespace VTK_ISA {
namespace {

constexpr int kRegisterRows = kTileRows;  // keys or channels of a register tile

template <class T>
const T* row_of(const HeadsView& x, int32_t b, int32_t head, int32_t n) {
  return static_cast<const T*>(x.data) + b * x.stride_batch + head * x.stride_head + n * x.stride_row;
}

// out[channel][group] = out * correction + sum over `count` of panel[.][channel] weights[.][group], of floats or pairs.
template <int kWidth, class Element>
void accumulate(const Element* panel, const Element* weights, int32_t count, f32v correct_low, f32v correct_high,
                float* out) {
  f32v sum[kWidth][2];
#pragma GCC unroll 6
  for (int d = 0; d < kWidth; ++d) {
    sum[d][0] = load(out + d * kGroup) * correct_low;
    sum[d][1] = load(out + d * kGroup + kLanes) * correct_high;
  }
  for (int32_t n = 0; n < count; ++n, panel += kWidth, weights += kGroup) {
    const auto low = load(weights), high = load(weights + kLanes);
#pragma GCC unroll 6
    for (int d = 0; d < kWidth; ++d) {
      multiply_add(sum[d][0], panel[d], low);
      multiply_add(sum[d][1], panel[d], high);
    }
  }
#pragma GCC unroll 6
  for (int d = 0; d < kWidth; ++d) {
    store(out + d * kGroup, sum[d][0]);
    store(out + d * kGroup + kLanes, sum[d][1]);
  }
}

// Values as [panel of kRegisterRows channels][key or pair of keys][channel], for rows D apart fall into a few sets of
// L1. The last panel may be narrower.
template <class Element>
class Panels {
 public:
  Panels(int32_t depth, int32_t rows) : depth_(depth), rows_(rows) {
    panels_ = scratch<Element>(int64_t{rows} * depth);
  }

  void pack(int32_t i, const Element* row) {
    Element* to = panels_.get();
    int32_t d = 0;
    for (; d + kRegisterRows <= depth_; d += kRegisterRows, to += rows_ * kRegisterRows)
      std::memcpy(to + i * kRegisterRows, row + d, kRegisterRows * sizeof(Element));
    const int32_t rest = depth_ - d;
    std::memcpy(to + i * rest, row + d, static_cast<size_t>(rest) * sizeof(Element));
  }

  // out[D][group] = out * (low, high) + the first `count` rows^T weights
  void accumulate_rows(int32_t count, const Element* weights, f32v low, f32v high, float* out) const {
    const Element* panel = panels_.get();
    int32_t d = 0;
    for (; d + kRegisterRows <= depth_;
         d += kRegisterRows, panel += rows_ * kRegisterRows, out += kRegisterRows * kGroup)
      accumulate<kRegisterRows>(panel, weights, count, low, high, out);
    switch (depth_ - d) {
      case 1: return accumulate<1>(panel, weights, count, low, high, out);
      case 2: return accumulate<2>(panel, weights, count, low, high, out);
      case 3: return accumulate<3>(panel, weights, count, low, high, out);
      case 4: return accumulate<4>(panel, weights, count, low, high, out);
      case 5: return accumulate<5>(panel, weights, count, low, high, out);
      default: return;
    }
  }

 private:
  int32_t depth_, rows_;
  Scratch<Element> panels_;
};

// Float32 keys are read where they lie, unless rows apart by a multiple of 4 KiB (interleaved heads) would fight for
// the same sets of L1; 16-bit keys and values are converted once for all groups.
template <class T>
class FloatProducts {
 public:
  using Input = T;

  FloatProducts(const BlockSparseAttentionParams& params, int64_t rows) : p(params), values_(p.head_dim, kTileKeys) {
    queries_ = scratch<float>(rows * p.head_dim);
    keys_ = scratch<float>(int64_t{kTileKeys} * p.head_dim);
    row_ = scratch<float>(p.head_dim);
  }

  void set_query(int32_t r, const T* from) {
    float* lane = &queries_[int64_t{r / kGroup} * kGroup * p.head_dim + r % kGroup];
    for (int32_t d = 0; d < p.head_dim; ++d) lane[d * kGroup] = to_float(from[d]) * (p.scale * kLog2E);
  }

  void load_tile(const KeyTile& tile, int32_t b, int32_t head) {
    for (int32_t i = 0; i < tile.count; ++i) {
      key_[i] = load_key(row_of<T>(p.key, b, head, tile.index[i]), i);
      const T* value = row_of<T>(p.value, b, head, tile.index[i]);
      if constexpr (sizeof(T) == sizeof(float)) {
        values_.pack(i, value);
      } else {
        widen(value, row_.get());
        values_.pack(i, row_.get());
      }
    }
    for (int32_t i = tile.count; i < round_up(tile.count, kRegisterRows); ++i) key_[i] = key_[tile.count - 1];
  }

  // logits[keys][group] of group g, in powers of two
  void dot_keys(int32_t g, int32_t count, float* logits) const {
    for (int32_t i = 0; i < count; i += kRegisterRows) {
      f32v dot[kRegisterRows][2];
      dot_tile(&key_[i], &queries_[int64_t{g} * kGroup * p.head_dim], p.head_dim, dot);
      std::memcpy(&logits[i * kGroup], dot, sizeof dot);
    }
  }

  // out[D][group] = out * (low, high) + v^T weights[keys][group]
  void add_values(const float* weights, int32_t count, f32v low, f32v high, float* out) {
    values_.accumulate_rows(count, weights, low, high, out);
  }

 private:
  const float* load_key(const T* from, int32_t i) {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (p.key.stride_row == p.head_dim) return from;
    }
    float* copy = &keys_[int64_t{i} * p.head_dim];
    widen(from, copy);
    return copy;
  }

  void widen(const T* from, float* to) const {
    int32_t d = 0;
    for (; d + kLanes <= p.head_dim; d += kLanes) store(to + d, load(from + d));
    for (; d < p.head_dim; ++d) to[d] = to_float(from[d]);
  }

  const BlockSparseAttentionParams& p;
  const float* key_[kTileKeys];
  Scratch<float> queries_;  // [groups][D][group], scaled
  Scratch<float> keys_;     // [keys][D]
  Scratch<float> row_;      // [D]
  Panels<float> values_;
};

}  // namespace
}  // namespace VTK_ISA
}  // namespace vtk
