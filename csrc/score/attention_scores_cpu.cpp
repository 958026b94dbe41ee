// attention_scores on the CPU.
//
// score(n) = reduce over heads of reduce over rows i of exp(scale q_i k_n - lse_i), logits in powers of two
//
// One unit of work is a head's rows of one part; units run in parallel and each adds into its own row of partial
// scores [B, H, parts, N], which a second pass reduces in a fixed order. Within a unit a tile of a few query rows by
// one block of keys (about 192 KiB, L2) holds logits, then probabilities:
//   few rows   (Q <= 8) dot products with lanes over D, kLanes keys at a time; bound by reading K once
//   many rows  K is packed once per head in panels [D][2 vectors of keys], then a 6 x 2 register tile per panel:
//              8 loads for 12 FMAs, bound by FMA; a vector of logits costs D FMAs, 17 operations of exp, 2 of adding
// Up to kMaxPackedFloats the block is all of N and every logit is computed once. Longer spans are streamed in blocks
// of kBlockKeys, twice: first the rows' maximum and sum (online softmax), then the scores. Extra memory is the tile,
// the packed block and the partial scores: nothing grows with Q * N.
//
// A NaN logit reaches its row's sum and so all probabilities of the row. A key that is excluded, by mask or causally,
// never enters, so NaN in padding cannot leak.
#include "score/attention_scores.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "common/parallel.h"
#include "common/simd.h"

namespace vtk {
namespace VTK_ISA {
namespace {

constexpr int kRows = 6;                          // query rows of the register tile
constexpr int kPanel = 2 * kLanes;                // keys of the register tile
constexpr int32_t kDotRows = 8;                   // packing K costs about 4 rows of products and saves 1/4 of each
constexpr int32_t kMaxTileRows = 96;
constexpr int64_t kTileFloats = 48 << 10;
constexpr int64_t kMaxPackedFloats = 1 << 20;     // 4 MiB: stays in L3 while the head's rows pass over it
constexpr int32_t kMaxPackedKeys = 8192;          // 6 rows of logits fill the tile
constexpr int32_t kBlockKeys = 512;
constexpr int64_t kUnits = 32;                    // enough for the threads of a desktop; depends on shapes only
constexpr int64_t kMinPartRows = 64;
constexpr int64_t kMinThreadWork = 1 << 18;       // multiplications that pay for a fork
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kLog2E = 1.4426950408889634;

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

using Floats = std::unique_ptr<float[]>;
Floats floats(int64_t count) { return Floats(new float[count]); }

struct Plan {
  bool packed;           // many rows
  int32_t block_keys;
  int32_t tile_rows;
  int64_t tile_stride;
  int32_t parts;         // the rows of a head are cut into so many units
  int32_t part_rows;
  int64_t padded_keys;   // N rounded up to whole panels

  explicit Plan(const AttentionScoresParams& p) {
    padded_keys = round_up(p.num_keys, kPanel);
    packed = p.num_queries > kDotRows;
    bool whole = !packed || (padded_keys * p.head_dim <= kMaxPackedFloats && padded_keys <= kMaxPackedKeys);
    block_keys = whole ? p.num_keys : kBlockKeys;
    tile_stride = round_up(block_keys, kPanel);
    if (tile_stride % 1024 == 0) tile_stride += kPanel;  // rows a multiple of 4 KiB apart share L1 sets
    int64_t rows = std::clamp<int64_t>(kTileFloats / tile_stride, kRows, kMaxTileRows);
    tile_rows = packed ? static_cast<int32_t>(rows / kRows * kRows) : p.num_queries;

    int64_t heads = int64_t{p.batch} * p.num_heads;
    int64_t most = (p.num_queries + kMinPartRows - 1) / kMinPartRows;
    parts = static_cast<int32_t>(std::min((kUnits + heads - 1) / heads, most));
    part_rows = (p.num_queries + parts - 1) / parts;
  }
};

// A voting row in the tile. probability(n) = weight * 2^(logit(n) - shift)
struct Row {
  int32_t query;
  int32_t limit;   // sees keys [0, limit)
  float shift;
  float weight;
  float sum;
};

// Rows of the register tile by one panel: tile = scale * q k^T.
template <int kCount>
void multiply(const float* q, const float* k, int32_t depth, float scale, float* tile, int64_t stride) {
  f32v low[kCount] = {}, high[kCount] = {};
  for (int32_t d = 0; d < depth; ++d) {
    f32v k_low = load(k + d * kPanel), k_high = load(k + d * kPanel + kLanes);
    for (int r = 0; r < kCount; ++r) {
      f32v x = splat(q[d * kRows + r]);
      low[r] += x * k_low;
      high[r] += x * k_high;
    }
  }
  for (int r = 0; r < kCount; ++r) {
    store(tile + r * stride, low[r] * scale);
    store(tile + r * stride + kLanes, high[r] * scale);
  }
}

void multiply(int count, const float* q, const float* k, int32_t depth, float scale, float* tile, int64_t stride) {
  switch (count) {
    case 1: return multiply<1>(q, k, depth, scale, tile, stride);
    case 2: return multiply<2>(q, k, depth, scale, tile, stride);
    case 3: return multiply<3>(q, k, depth, scale, tile, stride);
    case 4: return multiply<4>(q, k, depth, scale, tile, stride);
    case 5: return multiply<5>(q, k, depth, scale, tile, stride);
    default: return multiply<kRows>(q, k, depth, scale, tile, stride);
  }
}

// The products of one query row, zero-padded to whole vectors, with kLanes keys.
template <class T>
f32v dot(const float* q, const T* k, int64_t stride, int32_t depth) {
  f32v sum[kLanes] = {};
  int32_t d = 0;
  for (; d + kLanes <= depth; d += kLanes) {
    f32v x = load(q + d);
    for (int i = 0; i < kLanes; ++i) sum[i] += x * load(k + i * stride + d);
  }
  if (d < depth) {
    f32v x = load(q + d);
    for (int i = 0; i < kLanes; ++i) sum[i] += x * load_partial(k + i * stride + d, depth - d);
  }
  return sums(sum);
}

// panels[d][key] of kPanel keys, zeros beyond `count`.
template <class T>
void pack_panel(const T* k, int64_t stride, int32_t count, int32_t depth, float* panel) {
  for (int32_t first = 0; first < kPanel; first += kLanes) {
    for (int32_t d = 0; d < depth; d += kLanes) {
      int width = std::min(kLanes, depth - d);
      f32v v[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const T* from = k + (first + i) * stride + d;
        v[i] = first + i >= count ? f32v{} : width == kLanes ? load(from) : load_partial(from, width);
      }
      transpose(v);
      for (int i = 0; i < width; ++i) store(panel + (d + i) * kPanel + first, v[i]);
    }
  }
}

// Excludes masked keys and the rest of the last vector; returns the maximum, which may miss a NaN.
float mask_row(float* logits, int32_t length, const float* excluded) {
  const f32v lowest = splat(-kInfinity);
  for (int64_t n = length; n < round_up(length, kLanes); ++n) logits[n] = -kInfinity;
  f32v best = lowest;
  if (excluded == nullptr) {
    for (int32_t n = 0; n < length; n += kLanes) best = max(best, load(logits + n));
  } else {
    for (int32_t n = 0; n < length; n += kLanes) {
      f32v x = load(excluded + n) == 0.0f ? load(logits + n) : lowest;
      store(logits + n, x);
      best = max(best, x);
    }
  }
  return max(best);
}

// logits -> 2^(logit - shift), and their sum.
float exp_row(float* logits, int32_t length, float shift) {
  f32v total = {};
  for (int32_t n = 0; n < length; n += kLanes) {
    f32v e = exp2(load(logits + n) - shift);
    store(logits + n, e);
    total += e;
  }
  return sum(total);
}

template <bool kMax>
f32v reduce(f32v total, f32v x) {
  if constexpr (kMax) return (x > total) | (x != x) ? x : total;  // NaN wins and stays
  return total + x;
}

// scores += or max= weight * e over the keys that all kCount rows see whole vectors of, then row by row.
template <bool kMax, int kCount>
void add_rows(const float* tile, int64_t stride, const Row* rows, const int32_t* lengths, float* scores) {
  int32_t common = *std::min_element(lengths, lengths + kCount) / kLanes * kLanes;
  f32v weight[kCount];
  for (int r = 0; r < kCount; ++r) weight[r] = splat(rows[r].weight);
  for (int32_t n = 0; n < common; n += kLanes) {
    f32v total = load(scores + n);
    for (int r = 0; r < kCount; ++r) total = reduce<kMax>(total, weight[r] * load(tile + r * stride + n));
    store(scores + n, total);
  }
  for (int r = 0; r < kCount; ++r)
    for (int32_t n = common; n < lengths[r]; n += kLanes) {
      f32v total = load(scores + n), next = reduce<kMax>(total, weight[r] * load(tile + r * stride + n));
      for (int lane = 0; lane < std::min(kLanes, lengths[r] - n); ++lane) total[lane] = next[lane];
      store(scores + n, total);
    }
}

template <class T>
class Worker {
 public:
  Worker(const AttentionScoresParams& params, const Plan& plan) : p_(params), plan_(plan) {
    const int64_t depth = round_up(p_.head_dim, kLanes);
    tile_ = floats(plan_.tile_rows * plan_.tile_stride);
    queries_ = floats(round_up(plan_.tile_rows, kRows) * depth);
    packed_ = floats(plan_.packed ? round_up(plan_.block_keys, kPanel) * p_.head_dim : kLanes * depth);
    rows_.reset(new Row[plan_.tile_rows]);
    lengths_.reset(new int32_t[plan_.tile_rows]);
    if (p_.key_mask.data != nullptr) excluded_ = floats(plan_.padded_keys);
  }

  // Writes the scores of one part of one head, reduced over its rows.
  void run(int64_t unit, float* scores) {
    const int32_t part = static_cast<int32_t>(unit % plan_.parts);
    head_ = static_cast<int32_t>(unit / plan_.parts % p_.num_heads);
    select_batch(static_cast<int32_t>(unit / plan_.parts / p_.num_heads));
    std::fill_n(scores, plan_.padded_keys, 0.0f);
    const int32_t end = std::min((part + 1) * plan_.part_rows, p_.num_queries);
    for (int32_t next = part * plan_.part_rows; next < end;) {
      next = take_rows(next, end);
      if (num_rows_ > 0) score_rows(scores);
    }
    if (excluded_ != nullptr)  // a NaN row has left 0 * NaN there
      for (int32_t n = 0; n < p_.num_keys; ++n) scores[n] = excluded_[n] == 0.0f ? scores[n] : 0.0f;
  }

 private:
  void select_batch(int32_t batch) {
    if (batch == batch_) return;
    batch_ = batch;
    const MaskView& mask = p_.key_mask;
    if (mask.data == nullptr) return;
    for (int32_t n = 0; n < p_.num_keys; ++n)
      excluded_[n] = mask.data[batch * mask.stride_row + n * mask.stride_col] ? 0.0f : 1.0f;
    std::fill_n(&excluded_[p_.num_keys], plan_.padded_keys - p_.num_keys, 1.0f);
  }

  // Collects the next tile of voting rows that see a key; returns the first row that was not looked at.
  int32_t take_rows(int32_t query, int32_t end) {
    const MaskView& mask = p_.query_mask;
    num_rows_ = 0;
    for (; query < end && num_rows_ < plan_.tile_rows; ++query) {
      if (mask.data != nullptr && !mask.data[batch_ * mask.stride_row + query * mask.stride_col]) continue;
      Row row = {query, p_.num_keys, -kInfinity, 1.0f, 0.0f};
      if (p_.causal) row.limit = std::max<int64_t>(0, int64_t{p_.num_keys} - p_.num_queries + query + 1);
      row.limit = std::min(row.limit, p_.num_keys);
      if (p_.lse != nullptr) {
        float lse = p_.lse[batch_ * p_.lse_stride_batch + head_ * p_.lse_stride_head + query * p_.lse_stride_row];
        row.shift = lse * static_cast<float>(kLog2E);
        if (lse == -kInfinity) row.limit = 0;  // the flash pass saw nothing either
      }
      if (row.limit > 0) rows_[num_rows_++] = row;
    }
    return query;
  }

  void score_rows(float* scores) {
    load_queries();
    const bool whole = plan_.block_keys == p_.num_keys;
    // Find the rows' maximum and sum over all blocks.
    if (p_.lse == nullptr && !whole) {
      for (int32_t first = 0; first < last_limit(); first += plan_.block_keys) {
        compute_logits(first);
        for (int32_t r = 0; r < num_rows_; ++r) update_sum(r, first);
      }
      for (int32_t r = 0; r < num_rows_; ++r) close_sum(rows_[r]);
    }
    // Add the rows' probabilities.
    for (int32_t first = 0; first < last_limit(); first += plan_.block_keys) {
      compute_logits(first);
      for (int32_t r = 0; r < num_rows_; ++r) {
        if (p_.lse == nullptr && whole) {
          update_sum(r, first);
          close_sum(rows_[r]);
        } else {
          mask_row(tile_row(r), lengths_[r], excluded(first));
          exp_row(tile_row(r), lengths_[r], rows_[r].shift);
        }
      }
      if (p_.query_reduce == Reduce::kMax)
        add_tile<true>(scores + first);
      else
        add_tile<false>(scores + first);
    }
  }

  // Online softmax: folds a block into the row's maximum and sum, and leaves 2^(logit - shift) in the tile.
  void update_sum(int32_t r, int32_t first) {
    Row& row = rows_[r];
    float best = std::max(row.shift, mask_row(tile_row(r), lengths_[r], excluded(first)));
    if (best != row.shift) row.sum *= exp2(splat(row.shift - best))[0];
    row.shift = best;
    // A row of -inf alone has sum 0; a NaN beside it still reaches the sum.
    row.sum += exp_row(tile_row(r), lengths_[r], best == -kInfinity ? 0.0f : best);
  }

  static void close_sum(Row& row) {
    if (row.shift == -kInfinity) row.shift = 0.0f;
    row.weight = row.sum == 0.0f ? 0.0f : 1.0f / row.sum;
  }

  template <bool kMax>
  void add_tile(float* scores) {
    int32_t r = 0;
    for (; r + 4 <= num_rows_; r += 4)
      add_rows<kMax, 4>(tile_row(r), plan_.tile_stride, &rows_[r], &lengths_[r], scores);
    for (; r < num_rows_; ++r) add_rows<kMax, 1>(tile_row(r), plan_.tile_stride, &rows_[r], &lengths_[r], scores);
  }

  // Rows as float32: [row][D] padded with zeros for dot products, [row / 6][D][6] for register tiles.
  void load_queries() {
    const int32_t depth = p_.head_dim, padded = static_cast<int32_t>(round_up(depth, kLanes));
    const T* base = static_cast<const T*>(p_.query) + batch_ * p_.query_stride_batch + head_ * p_.query_stride_head;
    for (int32_t r = 0; r < num_rows_; ++r) {
      const T* from = base + rows_[r].query * p_.query_stride_row;
      float* to = plan_.packed ? &queries_[int64_t{r / kRows} * kRows * depth + r % kRows] : &queries_[r * padded];
      const int step = plan_.packed ? kRows : 1;
      for (int32_t d = 0; d < depth; ++d) to[d * step] = to_float(from[d]);
      if (!plan_.packed) std::fill(to + depth, to + padded, 0.0f);
    }
  }

  // Logits of the tile's rows with the keys of the block that starts at `first`.
  void compute_logits(int32_t first) {
    for (int32_t r = 0; r < num_rows_; ++r) lengths_[r] = std::clamp(rows_[r].limit - first, 0, plan_.block_keys);
    const int32_t count = std::min(plan_.block_keys, last_limit() - first);
    const int32_t key_head = head_ / (p_.num_heads / p_.key_heads);
    const T* keys = static_cast<const T*>(p_.key) + batch_ * p_.key_stride_batch + key_head * p_.key_stride_head +
                    first * p_.key_stride_row;
    const float scale = static_cast<float>(p_.scale * kLog2E);
    if (!plan_.packed) return dot_logits(keys, count, scale);

    pack_block(keys, key_head, first);
    for (int32_t n = 0; n < count; n += kPanel)
      for (int32_t r = 0; r < num_rows_; r += kRows) {
        const int rows = std::min(kRows, num_rows_ - r);
        if (lengths_[r + rows - 1] > n)  // the group's last row sees most
          multiply(rows, &queries_[int64_t{r} * p_.head_dim], &packed_[int64_t{n} * p_.head_dim], p_.head_dim, scale,
                   tile_row(r) + n, plan_.tile_stride);
      }
  }

  void pack_block(const T* keys, int32_t key_head, int32_t first) {
    const int64_t block = ((int64_t{batch_} * p_.key_heads) + key_head) * p_.num_keys + first;
    if (block == packed_block_) return;
    packed_block_ = block;
    const int32_t count = std::min(plan_.block_keys, p_.num_keys - first);
    for (int32_t n = 0; n < count; n += kPanel)
      pack_panel(keys + n * p_.key_stride_row, p_.key_stride_row, count - n, p_.head_dim,
                 &packed_[int64_t{n} * p_.head_dim]);
  }

  void dot_logits(const T* keys, int32_t count, float scale) {
    const int32_t padded = static_cast<int32_t>(round_up(p_.head_dim, kLanes));
    for (int32_t n = 0; n < count; n += kLanes) {
      const T* k = keys + n * p_.key_stride_row;
      if (count - n >= kLanes && (num_rows_ == 1 || sizeof(T) == sizeof(float))) {
        for (int32_t r = 0; r < num_rows_; ++r)
          store(tile_row(r) + n, dot(&queries_[r * padded], k, p_.key_stride_row, p_.head_dim) * scale);
      } else {
        // Convert the keys once for all rows; at the end fill up with zeros.
        for (int i = 0; i < kLanes; ++i)
          for (int32_t d = 0; d < padded; d += kLanes) {
            const int width = n + i < count ? std::min(kLanes, p_.head_dim - d) : 0;
            const T* from = k + i * p_.key_stride_row + d;
            store(&packed_[i * padded + d], width == kLanes ? load(from) : load_partial(from, width));
          }
        for (int32_t r = 0; r < num_rows_; ++r)
          store(tile_row(r) + n, dot(&queries_[r * padded], packed_.get(), padded, padded) * scale);
      }
    }
  }

  float* tile_row(int32_t r) { return &tile_[r * plan_.tile_stride]; }
  const float* excluded(int32_t first) const { return excluded_ == nullptr ? nullptr : &excluded_[first]; }
  int32_t last_limit() const { return rows_[num_rows_ - 1].limit; }

  const AttentionScoresParams& p_;
  const Plan& plan_;
  Floats tile_, queries_, packed_, excluded_;
  std::unique_ptr<Row[]> rows_;
  std::unique_ptr<int32_t[]> lengths_;  // keys of the current block that each row sees
  int32_t num_rows_ = 0;
  int32_t batch_ = -1, head_ = 0;
  int64_t packed_block_ = -1;
};

int64_t grain(int64_t work_each) { return std::max<int64_t>(1, kMinThreadWork / std::max<int64_t>(1, work_each)); }

template <class T>
void score_units(const AttentionScoresParams& p, const Plan& plan, float* partial) {
  const int64_t units = int64_t{p.batch} * p.num_heads * plan.parts;
  const int64_t work = int64_t{plan.part_rows} * p.num_keys * p.head_dim;
  parallel_for(units, grain(work), [&](int64_t begin, int64_t end) {
    Worker<T> worker(p, plan);
    for (int64_t unit = begin; unit < end; ++unit) worker.run(unit, partial + unit * plan.padded_keys);
  });
}

int32_t count_voters(const AttentionScoresParams& p, int32_t batch) {
  const MaskView& mask = p.query_mask;
  if (mask.data == nullptr) return p.num_queries;
  int32_t voters = 0;
  for (int32_t q = 0; q < p.num_queries; ++q) voters += mask.data[batch * mask.stride_row + q * mask.stride_col];
  return voters;
}

// Reduces parts, then heads, of keys [begin, end) of one output row.
void reduce_partial(const AttentionScoresParams& p, const Plan& plan, const float* partial, int32_t heads, float by_rows,
                    float* out, int64_t begin, int64_t end) {
  const bool max_rows = p.query_reduce == Reduce::kMax, max_heads = p.head_reduce == Reduce::kMax;
  for (int64_t n = begin; n < end; n += kLanes) {
    f32v total = {};
    for (int32_t h = 0; h < heads; ++h) {
      f32v head = {};
      for (int32_t part = 0; part < plan.parts; ++part) {
        f32v x = load(partial + (int64_t{h} * plan.parts + part) * plan.padded_keys + n);
        head = max_rows ? reduce<true>(head, x) : reduce<false>(head, x);
      }
      head *= by_rows;
      total = max_heads ? reduce<true>(total, head) : reduce<false>(total, head);
    }
    if (p.head_reduce == Reduce::kMean) total /= static_cast<float>(heads);
    for (int64_t lane = 0; lane < std::min<int64_t>(kLanes, end - n); ++lane) out[n + lane] = total[lane];
  }
}

void finish(const AttentionScoresParams& p, const Plan& plan, const float* partial) {
  const bool keep_heads = p.head_reduce == Reduce::kNone;
  const int32_t out_heads = keep_heads ? p.num_heads : 1, heads = p.num_heads / out_heads;
  const int64_t rows = int64_t{p.batch} * out_heads, blocks = (p.num_keys + kBlockKeys - 1) / kBlockKeys;
  const int64_t work = int64_t{kBlockKeys} * heads * plan.parts;
  parallel_for(rows * blocks, grain(work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / blocks, first = i % blocks * kBlockKeys;
      const int32_t voters = count_voters(p, static_cast<int32_t>(row / out_heads));
      const float by_rows = p.query_reduce == Reduce::kMean && voters > 0 ? 1.0f / voters : 1.0f;
      reduce_partial(p, plan, partial + row * heads * plan.parts * plan.padded_keys, heads, by_rows,
                     p.out + row * p.num_keys, first, std::min<int64_t>(first + kBlockKeys, p.num_keys));
    }
  });
}

}  // namespace

void attention_scores_cpu(const AttentionScoresParams& p) {
  const Plan plan(p);
  Floats partial = floats(int64_t{p.batch} * p.num_heads * plan.parts * plan.padded_keys);
  switch (p.dtype) {
    case DType::kFloat32: score_units<float>(p, plan, partial.get()); break;
    case DType::kFloat16: score_units<f16>(p, plan, partial.get()); break;
    case DType::kBFloat16: score_units<bf16>(p, plan, partial.get()); break;
  }
  finish(p, plan, partial.get());
}

}  // namespace VTK_ISA
}  // namespace vtk
