// nearest_match on the CPU: a tiled matrix product of which a group of tokens keeps the best scores.
//
//   pack    the centers once as float rows, cut into chunks of 256 channels, so that a tile's rows lie side by side
//   match   a group of 2 vectors of tokens is transposed chunk by chunk, 16 KiB that stay in L1, and met by the tiles
//   of
//           dot_tile.h; the scores so far wait in 4 K floats a lane. Then each lane keeps its best.
//
// Every dot product has one summation order, channels ascending within a chunk, then chunks ascending, so neither
// threads nor groups can change a result.
// Extra memory: the centers, 4 K C bytes, and 4 N of an item in work, 64 K and 16 KiB of a thread.
// Bound: N * K * C multiply-adds. Lost: dot products along the channels (dot_panel.h), 65 GFLOP/s: every one ends with
// a sum over the lanes, and the centers come from L2 for every third token.
#include "merge/nearest_match.h"

#include <algorithm>
#include <limits>

#include "common/dot_tile.h"
#include "common/norm.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace vtk {
namespace VTK_ISA {
namespace {

constexpr int32_t kChunk = 256;          // channels
constexpr int64_t kWorkGrain = 1 << 17;  // multiply-adds that pay for a fork
constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class T>
class Matcher {
 public:
  Matcher(const NearestMatchParams& params, int64_t b)
      : p(params),
        base_(static_cast<const T*>(p.metric) + b * p.stride_batch),
        centers_(p.centers + b * p.centers_stride_batch),
        owner_(p.owner + b * p.num_tokens),
        similarity_(p.similarity + b * p.num_tokens),
        tokens_(scratch<int32_t>(p.num_tokens)),
        rows_(scratch<int32_t>(p.num_centers)) {
    split(b);
    panel_ = scratch<float>(int64_t{num_centers_} * p.channels);
    terms_ = scratch<float>(num_centers_);
  }

  void run() {
    if (num_centers_ == 0) return;
    parallel_for(num_centers_, grain(p.channels), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) pack(k);
    });
    const int64_t groups = (num_tokens_ + kGroup - 1) / kGroup;
    parallel_for(groups, grain(int64_t{kGroup} * num_centers_ * p.channels), [&](int64_t begin, int64_t end) {
      Scratch<float> columns = scratch<float>(kChunk * kGroup), dots = scratch<float>(int64_t{num_centers_} * kGroup);
      for (int64_t g = begin; g < end; ++g) match(g * kGroup, columns.get(), dots.get());
    });
  }

 private:
  static int64_t grain(int64_t work) { return std::max<int64_t>(1, kWorkGrain / work); }

  // Settles the centers and the tokens that take no part, and lists the others.
  void split(int64_t b) {
    std::fill_n(owner_, p.num_tokens, -1);
    std::fill_n(similarity_, p.num_tokens, -kInfinity);
    for (int32_t k = 0; k < p.num_centers; ++k) {
      const int64_t n = centers_[k * p.centers_stride_row];
      if (n < 0) continue;
      owner_[n] = k;
      similarity_[n] = own_similarity(p.distance);
      rows_[num_centers_++] = k;
    }
    for (int32_t n = 0; n < p.num_tokens; ++n) {
      const bool valid = p.valid.data == nullptr || p.valid.data[b * p.valid.stride_row + n * p.valid.stride_col];
      if (valid && owner_[n] < 0) tokens_[num_tokens_++] = n;
    }
  }

  const T* token(int64_t n) const { return base_ + n * p.stride_token; }

  // Channels [begin, begin + chunk) of the centers are rows side by side.
  const float* row(int64_t k, int32_t begin, int32_t chunk) const {
    return panel_.get() + int64_t{begin} * num_centers_ + k * chunk;
  }

  float term(float squared_norm) const {
    return p.distance == Distance::kCosine ? inverse_norm(squared_norm) : distance_term(squared_norm);
  }

  void pack(int64_t k) {
    const T* from = token(centers_[rows_[k] * p.centers_stride_row]);
    float squared = 0.0f;
    for (int32_t begin = 0; begin < p.channels; begin += kChunk) {
      const int32_t chunk = std::min(kChunk, p.channels - begin);
      float* to = const_cast<float*>(row(k, begin, chunk));
      int32_t c = 0;
      for (; c + kLanes <= chunk; c += kLanes) store(to + c, load(from + begin + c));
      for (; c < chunk; ++c) to[c] = to_float(from[begin + c]);
      squared += squared_norm(to, chunk);
    }
    terms_[k] = term(squared);
  }

  // The best centers of the listed tokens from `first` on, a lane each. A last group repeats its last token.
  void match(int64_t first, float* columns, float* dots) {
    const int count = static_cast<int>(std::min<int64_t>(kGroup, num_tokens_ - first));
    const T* tokens[kGroup];
    for (int i = 0; i < kGroup; ++i) tokens[i] = token(tokens_[first + std::min(i, count - 1)]);
    std::fill_n(dots, int64_t{num_centers_} * kGroup, 0.0f);
    f32v squared[2] = {};
    for (int32_t begin = 0; begin < p.channels; begin += kChunk) {
      const int32_t chunk = std::min(kChunk, p.channels - begin);
      for (int v = 0; v < 2; ++v)
        squared[v] += transpose_chunk(tokens + v * kLanes, begin, chunk, columns + v * kLanes);
      for (int32_t k = 0; k < num_centers_; k += kTileRows) add_tile(k, begin, chunk, columns, dots);
    }
    for (int v = 0; v < 2; ++v) keep_best(first + v * kLanes, count - v * kLanes, squared[v], dots + v * kLanes);
  }

  // A lane a token, a row of `to` a channel; returns the sums of the squares.
  static f32v transpose_chunk(const T* const* tokens, int32_t begin, int32_t chunk, float* to) {
    f32v squared[4] = {};  // so that no sum waits for the last
    for (int32_t c = 0; c < chunk; c += kLanes) {
      f32v x[kLanes];
      const int32_t width = std::min(kLanes, chunk - c);
      if (width == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) x[i] = load(tokens[i] + begin + c);
      } else {
        for (int i = 0; i < kLanes; ++i) x[i] = load_partial(tokens[i] + begin + c, width);
      }
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (i < width) store(to + int64_t{c + i} * kGroup, x[i]);
        squared[i % 4] += x[i] * x[i];
      }
    }
    return (squared[0] + squared[1]) + (squared[2] + squared[3]);
  }

  // The last tile repeats the last center.
  void add_tile(int32_t k, int32_t begin, int32_t chunk, const float* columns, float* dots) const {
    const float* rows[kTileRows];
    for (int i = 0; i < kTileRows; ++i) rows[i] = row(std::min(k + i, num_centers_ - 1), begin, chunk);
    f32v dot[kTileRows][2];
    dot_tile(rows, columns, chunk, dot);
    for (int i = 0; i < std::min(kTileRows, num_centers_ - k); ++i)
      for (int v = 0; v < 2; ++v) {
        float* sum = dots + int64_t{k + i} * kGroup + v * kLanes;
        store(sum, load(sum) + dot[i][v]);
      }
  }

  // A NaN is never better; the first of equals stays.
  void keep_best(int64_t first, int count, f32v squared, const float* dots) {
    f32v own, best = splat(-kInfinity);
    i32v where = {};
    for (int lane = 0; lane < kLanes; ++lane) own[lane] = term(squared[lane]);
    for (int32_t k = 0; k < num_centers_; ++k) {
      const f32v score = score_of(p.distance, load(dots + int64_t{k} * kGroup), own, terms_[k]);
      const i32v better = score > best;
      best = better ? score : best;
      where = better ? i32v{} + k : where;
    }
    for (int lane = 0; lane < std::min(kLanes, count); ++lane) {
      const int32_t n = tokens_[first + lane];
      owner_[n] = rows_[where[lane]];
      similarity_[n] = best[lane] == -kInfinity ? NAN : similarity_of(p.distance, best[lane]);  // only NaN leaves -inf
    }
  }

  const NearestMatchParams& p;
  const T* const base_;
  const int64_t* const centers_;
  int64_t* const owner_;     // [N]
  float* const similarity_;  // [N]
  Scratch<int32_t> tokens_;  // that look for a center
  Scratch<int32_t> rows_;    // of the centers there are
  int32_t num_tokens_ = 0, num_centers_ = 0;
  Scratch<float> panel_;  // [chunks, centers, channels of the chunk]
  Scratch<float> terms_;  // [centers]
};

template <class T>
void run(const NearestMatchParams& p) {
  parallel_items(p.batch, [&](int64_t b) { Matcher<T>(p, b).run(); });
}

}  // namespace

void nearest_match_cpu(const NearestMatchParams& p) {
  switch (p.dtype) {
    case DType::kFloat32: run<float>(p); break;
    case DType::kFloat16: run<f16>(p); break;
    case DType::kBFloat16: run<bf16>(p); break;
  }
}

}  // namespace VTK_ISA
}  // namespace vtk
