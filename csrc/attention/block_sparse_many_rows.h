// block_sparse_attention for blocks of query rows: one row a lane, keys and values broadcast.
// Include only from block_sparse_attention_cpu.cpp.
//
// A group is 2 * kLanes rows, held transposed: q [D][group], logits [keys][group], out [D][group]. Both products are
// register tiles of 6 x 2 vectors, 8 loads for 12 FMAs: 6 keys for the logits, 6 channels for the output. Because a
// lane is a row, softmax needs no horizontal step. Float32 keys are read where they lie; values are copied into panels
// [6 channels][keys], for rows D apart fall into a few sets of L1.
#pragma once
#include "attention/block_sparse_keys.h"
#include "common/dot_tile.h"

namespace vtk {
namespace VTK_ISA {
namespace {

constexpr int kRegisterRows = kTileRows;  // keys or channels of a register tile

// out[channel][group] = out * correction + v^T probabilities for kWidth channels.
template <int kWidth>
void accumulate(const float* panel, const float* probabilities, int32_t count, f32v correct_low, f32v correct_high,
                float* out) {
  f32v sum[kWidth][2];
#pragma GCC unroll 6
  for (int d = 0; d < kWidth; ++d) {
    sum[d][0] = load(out + d * kGroup) * correct_low;
    sum[d][1] = load(out + d * kGroup + kLanes) * correct_high;
  }
  for (int32_t n = 0; n < count; ++n, panel += kWidth, probabilities += kGroup) {
    const f32v low = load(probabilities), high = load(probabilities + kLanes);
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

template <class T>
class ManyRows {
 public:
  explicit ManyRows(const BlockSparseAttentionParams& params) : p(params) {
    const int64_t rows = round_up(std::min(p.block_q, p.num_queries), kGroup);
    queries_ = scratch<float>(rows * p.head_dim);
    out_ = scratch<float>(rows * p.head_dim);
    max_ = scratch<float>(rows);
    sum_ = scratch<float>(rows);
    limit_ = scratch<int32_t>(rows);
    window_ = scratch<int32_t>(rows);
    keys_ = scratch<float>(int64_t{kTileKeys} * p.head_dim);
    values_ = scratch<float>(int64_t{kTileKeys} * p.head_dim);
    row_ = scratch<float>(round_up<int64_t>(p.head_dim, kLanes));
    logits_ = scratch<float>(kTileKeys * kGroup);
  }

  // One block of queries of one head.
  void run(int32_t b, int32_t h, int32_t block) {
    b_ = b;
    h_ = h;
    key_head_ = h / (p.num_heads / p.key_heads);
    first_row_ = block * p.block_q;
    num_rows_ = std::min(p.block_q, p.num_queries - first_row_);
    load_queries();
    KeyStream keys(p, b, h, block, first_row_ + num_rows_ - 1, 0, KeyStream::num_entries(p, b, h, block));
    while (keys.next(tile_)) {
      load_keys();
      load_values();
      for (int32_t g = 0; g < num_groups(); ++g)
        if (sees_tile(g)) attend(g);
    }
    write();
  }

 private:
  int32_t num_groups() const { return ceil_div(num_rows_, kGroup); }
  int32_t last_row(int32_t g) const { return std::min((g + 1) * kGroup, num_rows_) - 1; }
  bool sees_tile(int32_t g) const {
    return (!tile_.causal || tile_.first < limit_[last_row(g)]) && (!tile_.banded || tile_.last >= window_[g * kGroup]);
  }
  float* out(int32_t g) { return &out_[int64_t{g} * kGroup * p.head_dim]; }

  // queries_[group][D][row], scaled; lanes without a row repeat the last one.
  void load_queries() {
    const float scale = p.scale * kLog2E;
    const int32_t padded = num_groups() * kGroup, length = length_of(p, b_);
    for (int32_t r = 0; r < padded; ++r) {
      const int32_t query = first_row_ + std::min(r, num_rows_ - 1);
      const T* from = row_at(p.query, h_, query);
      float* to = &queries_[int64_t{r / kGroup} * kGroup * p.head_dim + r % kGroup];
      for (int32_t d = 0; d < p.head_dim; ++d) to[d * kGroup] = to_float(from[d]) * scale;
      limit_[r] = limit_of(p, query, length);
      if (p.rule != nullptr) window_[r] = window_of(p, b_, h_, query, length);
      max_[r] = -kInfinity;
      sum_[r] = 0.0f;
    }
    std::fill_n(out_.get(), int64_t{padded} * p.head_dim, 0.0f);
  }

  const T* row_at(const HeadsView& x, int32_t head, int32_t n) const {
    return static_cast<const T*>(x.data) + b_ * x.stride_batch + head * x.stride_head + n * x.stride_row;
  }

  // Rows apart by a multiple of 4 KiB (interleaved heads) fight for the same sets of L1, and 16-bit rows are converted
  // once for all groups: both are copied.
  bool keys_in_place() const { return sizeof(T) == sizeof(float) && p.key.stride_row == p.head_dim; }

  void load_keys() {
    for (int32_t i = 0; i < tile_.count; ++i) {
      const T* from = row_at(p.key, key_head_, tile_.index[i]);
      if constexpr (sizeof(T) == sizeof(float)) {
        if (keys_in_place()) {
          key_[i] = from;
          continue;
        }
      }
      widen(from, &keys_[int64_t{i} * p.head_dim]);
      key_[i] = &keys_[int64_t{i} * p.head_dim];
    }
    for (int32_t i = tile_.count; i < round_up(tile_.count, kRegisterRows); ++i) key_[i] = key_[tile_.count - 1];
  }

  void widen(const T* from, float* to) const {
    int32_t d = 0;
    for (; d + kLanes <= p.head_dim; d += kLanes) store(to + d, load(from + d));
    for (; d < p.head_dim; ++d) to[d] = to_float(from[d]);
  }

  // values_[panel of kRegisterRows channels][key][channel]; the last panel may be narrower.
  void load_values() {
    for (int32_t i = 0; i < tile_.count; ++i) {
      const T* from = row_at(p.value, key_head_, tile_.index[i]);
      const float* row = row_.get();
      if constexpr (sizeof(T) == sizeof(float))
        row = from;
      else
        widen(from, row_.get());
      float* to = values_.get();
      int32_t d = 0;
      for (; d + kRegisterRows <= p.head_dim; d += kRegisterRows, to += kTileKeys * kRegisterRows)
        std::memcpy(to + i * kRegisterRows, row + d, kRegisterRows * sizeof(float));
      const int32_t rest = p.head_dim - d;
      std::memcpy(to + i * rest, row + d, static_cast<size_t>(rest) * sizeof(float));
    }
  }

  void attend(int32_t g) {
    const float* q = &queries_[int64_t{g} * kGroup * p.head_dim];
    for (int32_t i = 0; i < tile_.count; i += kRegisterRows) {
      f32v dot[kRegisterRows][2];
      dot_tile(&key_[i], q, p.head_dim, dot);
      std::memcpy(&logits_[i * kGroup], dot, sizeof dot);
    }
    if (p.key_bias != nullptr) add_bias();
    if (tile_.causal && tile_.last >= limit_[g * kGroup])
      hide_unless(&limit_[g * kGroup], [](int32_t n, i32v limit) { return n < limit; });
    if (tile_.banded && tile_.first < window_[last_row(g)])
      hide_unless(&window_[g * kGroup], [](int32_t n, i32v window) { return n >= window; });
    f32v correct_low, correct_high;
    softmax(g, 0, correct_low);
    softmax(g, kLanes, correct_high);
    accumulate_all(g, correct_low, correct_high);
  }

  void add_bias() {
    for (int32_t n = 0; n < tile_.count; ++n)
      for (int v = 0; v < kGroup; v += kLanes)
        store(&logits_[n * kGroup + v], load(&logits_[n * kGroup + v]) + tile_.bias[n]);
  }

  // Of each row, the keys where sees(key, bound of the row) does not hold.
  template <class Sees>
  void hide_unless(const int32_t* bounds, const Sees& sees) {
    for (int v = 0; v < kGroup; v += kLanes) {
      i32v bound;
      std::memcpy(&bound, bounds + v, sizeof bound);
      for (int32_t n = 0; n < tile_.count; ++n) {
        float* x = &logits_[n * kGroup + v];
        store(x, sees(tile_.index[n], bound) ? load(x) : splat(-kInfinity));
      }
    }
  }

  // Folds the tile's logits into the rows' maxima and sums and leaves 2^(logit - maximum). `correct` is what the sums
  // so far are multiplied with. A maximum may miss a NaN; the sum does not.
  void softmax(int32_t g, int lane, f32v& correct) {
    float *x = &logits_[lane], *most = &max_[g * kGroup + lane], *total = &sum_[g * kGroup + lane];
    const f32v before = load(most);
    f32v now = before;
    for (int32_t n = 0; n < tile_.count; ++n) now = max(load(x + n * kGroup), now);
    const f32v shift = now == -kInfinity ? f32v{} : now;
    correct = before == now ? splat(1.0f) : exp2_bounded(before - now);
    f32v sum = {};
    for (int32_t n = 0; n < tile_.count; ++n) {
      const f32v e = exp2_bounded(load(x + n * kGroup) - shift);
      store(x + n * kGroup, e);
      sum += e;
    }
    store(most, now);
    store(total, load(total) * correct + sum);
  }

  void accumulate_all(int32_t g, f32v low, f32v high) {
    const float* panel = values_.get();
    float* to = out(g);
    int32_t d = 0;
    for (; d + kRegisterRows <= p.head_dim; d += kRegisterRows, panel += kTileKeys * kRegisterRows)
      accumulate<kRegisterRows>(panel, logits_.get(), tile_.count, low, high, to + d * kGroup);
    switch (p.head_dim - d) {
      case 1: return accumulate<1>(panel, logits_.get(), tile_.count, low, high, to + d * kGroup);
      case 2: return accumulate<2>(panel, logits_.get(), tile_.count, low, high, to + d * kGroup);
      case 3: return accumulate<3>(panel, logits_.get(), tile_.count, low, high, to + d * kGroup);
      case 4: return accumulate<4>(panel, logits_.get(), tile_.count, low, high, to + d * kGroup);
      case 5: return accumulate<5>(panel, logits_.get(), tile_.count, low, high, to + d * kGroup);
      default: return;
    }
  }

  void write() {
    for (int32_t r = 0; r < num_rows_; ++r) {
      const int64_t row = (int64_t{b_} * p.num_heads + h_) * p.num_queries + first_row_ + r;
      const float* from = out(r / kGroup) + r % kGroup;
      for (int32_t d = 0; d < p.head_dim; ++d) row_[d] = from[d * kGroup];
      write_row<T>(p, row, row_.get(), max_[r], sum_[r]);
    }
  }

  const BlockSparseAttentionParams& p;
  int32_t b_ = 0, h_ = 0, key_head_ = 0, first_row_ = 0, num_rows_ = 0;
  KeyTile tile_;
  const float* key_[kTileKeys];
  Scratch<float> queries_, out_;  // [groups][D][group]
  Scratch<float> max_, sum_;      // [rows], the maximum in powers of two
  Scratch<int32_t> limit_;        // [rows]
  Scratch<int32_t> window_;       // [rows], with a rule
  Scratch<float> keys_, values_;  // [keys][D], [panels][keys][6]
  Scratch<float> row_, logits_;   // [D], [keys][group]
};

}  // namespace
}  // namespace VTK_ISA
}  // namespace vtk
