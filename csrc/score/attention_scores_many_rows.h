// attention_scores for more than kFewRows query rows: one query row a lane, keys broadcast from where they lie.
// Include only from attention_scores_cpu.cpp.
//
// A group is 2 * kLanes rows, its q transposed to [D][group], its tile [keys][group]. A register tile is 6 keys by
// 2 vectors of rows: 8 loads for 12 FMAs, so FMA bounds it. Because a lane is a row, softmax needs no horizontal
// step, and K is neither packed nor transposed: packing it (rows broadcast, keys in lanes) cost 10 to 20 % at 64 rows.
#pragma once
#include "score/attention_scores_unit.h"

namespace vtk {
namespace VTK_ISA {
namespace {

// kTileKeys keys by kVectors vectors of rows: tile[key][group] = scale * k q^T.
template <int kVectors>
void multiply(const float* const* keys, int64_t ahead, const float* q, int32_t depth, float scale, float* tile) {
  f32v sum[kTileKeys][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kTileKeys; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[i][v] = f32v{};
  const float *k0 = keys[0], *k1 = keys[1], *k2 = keys[2], *k3 = keys[3], *k4 = keys[4], *k5 = keys[5];
  for (int32_t d = 0; d < depth; ++d) {
    if (d % 16 == 0) {
      __builtin_prefetch(k0 + ahead + d);
      __builtin_prefetch(k1 + ahead + d);
      __builtin_prefetch(k2 + ahead + d);
      __builtin_prefetch(k3 + ahead + d);
      __builtin_prefetch(k4 + ahead + d);
      __builtin_prefetch(k5 + ahead + d);
    }
    const float k[kTileKeys] = {k0[d], k1[d], k2[d], k3[d], k4[d], k5[d]};
    f32v rows[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) rows[v] = load(q + d * kGroup + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kTileKeys; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[i][v] += k[i] * rows[v];
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileKeys; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store(tile + i * kGroup + v * kLanes, sum[i][v] * scale);
}

template <class T>
class ManyRows : Unit {
 public:
  ManyRows(const AttentionScoresParams& params, const Plan& plan)
      : Unit(params, plan), tile_keys_(round_up<int64_t>(plan.block_keys, kTileKeys * kLanes)) {
    tile_ = scratch<float>(plan.tile_rows * tile_keys_);
    queries_ = scratch<float>(int64_t{plan.tile_rows} * p.head_dim);
    keys_ = scratch<float>(int64_t{kTileKeys} * p.head_dim);
    sum_ = scratch<float>(plan.tile_rows);
  }

  // Writes the scores of one unit, reduced over its rows.
  void run(int64_t unit, float* scores) {
    select(unit);
    std::fill_n(scores, plan.padded_keys, 0.0f);
    while (take_rows()) {
      load_queries();
      const bool whole = plan.block_keys == p.num_keys;
      if (p.lse == nullptr && !whole) find_normalisers();
      for (int32_t first = 0; first < last_limit(); first += plan.block_keys) {
        compute_logits(first);
        for (int32_t g = 0; g < num_groups(); ++g) {
          if (p.lse == nullptr && whole) {
            fold_block(g, 0);
            close_group(g);
            spread_nan(g);
          } else {
            exponentiate(g, first);
          }
        }
        if (p.query_reduce == Reduce::kMax)
          add_block<true>(first, scores);
        else
          add_block<false>(first, scores);
      }
    }
  }

 private:
  int32_t num_groups() const { return (num_rows_ + kGroup - 1) / kGroup; }
  float* tile(int32_t g) { return &tile_[g * tile_keys_ * kGroup]; }

  // Keys of the block at `first` that some row of the group sees, and that all its lanes see (no masks needed).
  int32_t seen_by_some(int32_t g, int32_t first) const {
    return std::clamp(limit_[std::min((g + 1) * kGroup, num_rows_) - 1] - first, 0, plan.block_keys);
  }
  int32_t seen_by_all(int32_t g, int32_t first) const {
    if (excluded_ != nullptr || (g + 1) * kGroup > num_rows_) return 0;
    return std::clamp(limit_[g * kGroup] - first, 0, plan.block_keys);
  }
  i32v visible(int32_t g, int v, int32_t n) const {
    i32v limit;
    std::memcpy(&limit, &limit_[g * kGroup + v * kLanes], sizeof limit);
    return (n < limit) & ~(excluded_ == nullptr ? 0 : excluded_[n]);
  }

  // queries_[group][D][row]. Lanes without a row repeat the last one, see no key and weigh nothing.
  void load_queries() {
    const int32_t padded = num_groups() * kGroup;
    for (int32_t r = 0; r < padded; ++r) {
      const T* from = query_at<T>(head_, query_[std::min(r, num_rows_ - 1)]);
      float* to = &queries_[int64_t{r / kGroup} * kGroup * p.head_dim + r % kGroup];
      for (int32_t d = 0; d < p.head_dim; ++d) to[d * kGroup] = to_float(from[d]);
      if (r >= num_rows_) {
        limit_[r] = 0;
        shift_[r] = 0.0f;
        weight_[r] = 0.0f;
      }
      sum_[r] = 0.0f;
    }
  }

  // Logits of all groups with the keys of the block at `first`, rows of the tile up to a multiple of 6.
  void compute_logits(int32_t first) {
    const int32_t end = std::min(first + plan.block_keys, last_limit());
    const float scale = p.scale * kLog2E;
    const int64_t ahead = in_place() ? kTileKeys * p.head_dim : 0;  // to prefetch the next keys
    for (int32_t n = first; n < end; n += kTileKeys) {
      const float* keys[kTileKeys];
      for (int i = 0; i < kTileKeys; ++i) keys[i] = key_floats(std::min(n + i, end - 1), i);
      for (int32_t g = 0; g < num_groups(); ++g) {
        if (n - first >= seen_by_some(g, first)) continue;
        const float* q = &queries_[int64_t{g} * kGroup * p.head_dim];
        float* to = tile(g) + (n - first) * kGroup;
        if (num_rows_ - g * kGroup > kLanes)
          multiply<2>(keys, ahead, q, p.head_dim, scale, to);
        else
          multiply<1>(keys, ahead, q, p.head_dim, scale, to);
      }
    }
  }

  // Rows that lie together as float32 are read in place. Others are copied six at a time: converted, or brought
  // together, since rows a multiple of 4 KiB apart (interleaved heads) fight for the same sets of L1.
  bool in_place() const { return sizeof(T) == sizeof(float) && p.key_stride_row == p.head_dim; }

  // Key n as float32, in place or copied to slot i.
  const float* key_floats(int32_t n, int i) {
    const T* from = key_at<T>(head_ / (p.num_heads / p.key_heads), n);
    if constexpr (sizeof(T) == sizeof(float)) {
      if (in_place()) return from;
    }
    float* to = &keys_[i * p.head_dim];
    int32_t d = 0;
    for (; d + kLanes <= p.head_dim; d += kLanes) store(to + d, load(from + d));
    for (; d < p.head_dim; ++d) to[d] = to_float(from[d]);
    return to;
  }

  void find_normalisers() {
    for (int32_t first = 0; first < last_limit(); first += plan.block_keys) {
      compute_logits(first);
      for (int32_t g = 0; g < num_groups(); ++g) fold_block(g, first);
    }
    for (int32_t g = 0; g < num_groups(); ++g) close_group(g);
  }

  // Online softmax: folds a block into the rows' maxima (shift_) and sums, leaves 2^(logit - shift) in the tile.
  void fold_block(int32_t g, int32_t first) {
    const int32_t all = seen_by_all(g, first), some = seen_by_some(g, first);
    float *shifts = &shift_[g * kGroup], *totals = &sum_[g * kGroup];
    const float* x = tile(g);
    f32v low = load(shifts), high = load(shifts + kLanes);
    for (int32_t n = 0; n < all; ++n) {
      low = max(low, load(x + n * kGroup));
      high = max(high, load(x + n * kGroup + kLanes));
    }
    for (int32_t n = all; n < some; ++n) {
      low = visible(g, 0, first + n) ? max(low, load(x + n * kGroup)) : low;
      high = visible(g, 1, first + n) ? max(high, load(x + n * kGroup + kLanes)) : high;
    }
    rescale(totals, load(shifts), low);
    rescale(totals + kLanes, load(shifts + kLanes), high);
    store(shifts, low);
    store(shifts + kLanes, high);
    // A maximum may miss a NaN; the sum will not. While a row has seen nothing its shift stays -inf.
    exp_keys<true>(g, first, low == -kInfinity ? f32v{} : low, high == -kInfinity ? f32v{} : high);
  }

  static void rescale(float* totals, f32v before, f32v now) {
    f32v total = load(totals);
    store(totals, before == now ? total : total * exp2_bounded(before - now));
  }

  void exponentiate(int32_t g, int32_t first) {
    exp_keys<false>(g, first, load(&shift_[g * kGroup]), load(&shift_[g * kGroup + kLanes]));
  }

  // tile = 2^(tile - shift) for keys that a row sees, 0 for others; adds to the rows' sums.
  // kBounded: the shift is at least the maximum.
  template <bool kBounded>
  void exp_keys(int32_t g, int32_t first, f32v shift_low, f32v shift_high) {
    const int32_t all = seen_by_all(g, first), some = seen_by_some(g, first);
    float *x = tile(g), *totals = &sum_[g * kGroup];
    auto probability = [](f32v logit) { return kBounded ? exp2_bounded(logit) : exp2(logit); };
    for (int32_t begin = 0; begin < some; begin += kSumKeys) {
      f32v total_low = {}, total_high = {};
      for (int32_t n = begin; n < std::min(begin + kSumKeys, some); ++n) {
        f32v low = probability(load(x + n * kGroup) - shift_low);
        f32v high = probability(load(x + n * kGroup + kLanes) - shift_high);
        if (n >= all) {
          low = visible(g, 0, first + n) ? low : f32v{};
          high = visible(g, 1, first + n) ? high : f32v{};
        }
        store(x + n * kGroup, low);
        store(x + n * kGroup + kLanes, high);
        total_low += low;
        total_high += high;
      }
      store(totals, load(totals) + total_low);
      store(totals + kLanes, load(totals + kLanes) + total_high);
    }
  }

  // From maximum and sum to shift and weight. A NaN sum becomes the shift: every probability of the row is NaN, and
  // still no key that the row does not see is touched.
  void close_group(int32_t g) {
    for (int32_t r = g * kGroup; r < std::min((g + 1) * kGroup, num_rows_); ++r) {
      if (shift_[r] == -kInfinity) shift_[r] = 0.0f;
      weight_[r] = sum_[r] == 0.0f ? 0.0f : 1.0f / sum_[r];
      if (sum_[r] != sum_[r]) {
        shift_[r] = sum_[r];
        weight_[r] = 1.0f;
      }
    }
  }

  // The same for probabilities that are in the tile already.
  void spread_nan(int32_t g) {
    for (int32_t r = g * kGroup; r < std::min((g + 1) * kGroup, num_rows_); ++r) {
      if (shift_[r] == shift_[r]) continue;
      for (int32_t n = 0; n < limit_[r]; ++n)
        if (excluded_ == nullptr || !excluded_[n]) tile(g)[n * kGroup + r % kGroup] = shift_[r];
    }
  }

  // scores(n) += or max= weighted probabilities over all rows of the tile, kLanes keys at a time.
  template <bool kMax>
  void add_block(int32_t first, float* scores) {
    const int32_t end = seen_by_some(num_groups() - 1, first);
    for (int32_t n = 0; n < end; n += kLanes) {
      f32v total[kLanes] = {};
      for (int32_t g = 0; g < num_groups(); ++g) {
        const int32_t count = std::min(kLanes, seen_by_some(g, first) - n);
        const f32v low = load(&weight_[g * kGroup]), high = load(&weight_[g * kGroup + kLanes]);
        const float* e = tile(g) + n * kGroup;
        if (count == kLanes) {
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i)
            total[i] = combine<kMax>(combine<kMax>(total[i], low * load(e + i * kGroup)),
                                     high * load(e + i * kGroup + kLanes));
        } else {
          for (int i = 0; i < count; ++i)
            total[i] = combine<kMax>(combine<kMax>(total[i], low * load(e + i * kGroup)),
                                     high * load(e + i * kGroup + kLanes));
        }
      }
      store(scores + first + n, combine<kMax>(load(scores + first + n), reduce_each(total, combine<kMax>)));
    }
  }

  const int64_t tile_keys_;
  Scratch<float> tile_, queries_, keys_;  // [groups][block_keys][group], [groups][D][group], [6][D]
  Scratch<float> sum_;                    // [tile_rows]
};

}  // namespace
}  // namespace VTK_ISA
}  // namespace vtk
