// select_cover on the CPU: the picks of the plain greedy loop, by lazy evaluation over shrinking columns.
//
//   value_j = sum_r max(gains[r, j] - covered_r, 0), covered only grows, so a stale value is an upper bound: every
//             term of a fixed-order float32 sum that does not grow leaves a sum that does not grow. A step refreshes
//             only the tokens whose stale value still beats the best exact one; ties go to the lower index.
//   columns   gains are transposed once into columns of lane vectors (kLanes rows each). A vector whose lanes are
//             all covered adds zeros for ever: it leaves its column, and no sum changes.
//
// Extra memory: (4 + 4 / kLanes) * N * R bytes per batch item in work.
// Bound: the plain loop reads N * R gains per pick. Here the transposition reads them once; refreshes cost 2 ns per
// vector left, with uniform random gains about N * R * ln(keep) elements in all, with softmax gains far less.
#include "select/select_cover.h"

#include <algorithm>
#include <limits>

#include "common/extremum.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace vtk {
namespace VTK_ISA {
namespace {

constexpr float kExcluded = std::numeric_limits<float>::infinity();
constexpr int kEagerRefreshes = 16;  // tokens refreshed best-first before a step sweeps over the others
constexpr int kTileColumns = 32;     // columns transposed at once: 128 bytes of a float row, 32 columns fit the L2

class LazyCover {
 public:
  LazyCover(const SelectCoverParams& p, int64_t b)
      : p_(p),
        vectors_((p.num_rows + kLanes - 1) / kLanes),
        values_(scratch<float>(vectors_ * kLanes * p.num_tokens)),
        rows_(scratch<int32_t>(vectors_ * p.num_tokens)),
        covered_(scratch<float>(vectors_ * kLanes)),
        score_(scratch<float>(p.num_tokens)),
        left_(scratch<int32_t>(p.num_tokens)),
        fresh_(scratch<int32_t>(p.num_tokens)),
        stale_(scratch<int32_t>(p.num_tokens)) {
    std::fill_n(covered_.get(), vectors_ * kLanes, 0.0f);
    const int64_t tiles = (p.num_tokens + kTileColumns - 1) / kTileColumns;
    parallel_for(tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        const int32_t first = static_cast<int32_t>(tile * kTileColumns);
        const int32_t last = std::min(first + kTileColumns, p.num_tokens);
        switch (p.dtype) {
          case DType::kFloat32: transpose<float>(b, first, last); break;
          case DType::kFloat16: transpose<f16>(b, first, last); break;
          case DType::kBFloat16: transpose<bf16>(b, first, last); break;
        }
        for (int32_t j = first; j < last; ++j) {
          refresh(j);
          const MaskView& drop = p.drop_mask;
          if (drop.data != nullptr && drop.data[b * drop.stride_row + j * drop.stride_col]) score_[j] = kExcluded;
        }
      }
    });
  }

  // Picks the token that covers most.
  int32_t pick() {
    const int32_t token = best_token();
    cover(token);
    score_[token] = kExcluded;
    ++picked_;
    return token;
  }

 private:
  // Columns [first, last), NaN as 0, rows padded with 0.
  template <class T>
  void transpose(int64_t b, int32_t first, int32_t last) {
    const T* gains = static_cast<const T*>(p_.gains) + b * p_.stride_batch + first;
    const int32_t width = last - first;
    float block[kLanes][kTileColumns];
    for (int64_t v = 0; v < vectors_; ++v) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t r = v * kLanes + lane;
        const T* row = gains + r * p_.stride_row;
        for (int32_t c = 0; c < width; ++c) {
          const float gain = r < p_.num_rows ? to_float(row[c]) : 0.0f;
          block[lane][c] = gain == gain ? gain : 0.0f;
        }
      }
      for (int32_t c = 0; c < width; ++c) {
        float* column = values_.get() + ((first + c) * vectors_ + v) * kLanes;
        for (int lane = 0; lane < kLanes; ++lane) column[lane] = block[lane][c];
      }
    }
    for (int32_t j = first; j < last; ++j) {
      left_[j] = static_cast<int32_t>(vectors_);
      for (int32_t v = 0; v < vectors_; ++v) rows_[j * vectors_ + v] = v;
    }
  }

  // Computes the value of a token and drops the covered vectors of its column. score = -value: smallest wins.
  void refresh(int32_t j) {
    float* values = values_.get() + j * vectors_ * kLanes;
    int32_t* rows = rows_.get() + j * vectors_;
    const float* covered = covered_.get();
    f32v total = {};
    int32_t kept = 0;
    for (int32_t v = 0; v < left_[j]; ++v) {
      const f32v gain = load(values + int64_t{v} * kLanes);
      const int32_t row = rows[v];
      const f32v more = gain - load(covered + int64_t{row} * kLanes);
      const i32v adds = more > f32v{};  // false for inf - inf
      total += adds ? more : f32v{};
      store(values + int64_t{kept} * kLanes, gain);
      rows[kept] = row;
      kept += any_lane(adds);
    }
    left_[j] = kept;
    score_[j] = -sum(total);
    fresh_[j] = picked_;
  }

  int32_t best_token() {
    Extremum best{kExcluded, INT32_MAX};
    for (int round = 0;; ++round) {
      const Extremum candidate = smallest(score_.get(), p_.num_tokens);
      const int32_t j = candidate.index;
      if (fresh_[j] == picked_) return j;
      if (round < kEagerRefreshes) {
        refresh(j);
        if (before(score_[j], j, best)) best = {score_[j], j};
      } else {
        sweep(best);
      }
    }
  }

  // Refreshes every token that may beat `best`; afterwards the smallest score is an exact one.
  void sweep(const Extremum& best) {
    int32_t count = 0;
    for (int32_t j = 0; j < p_.num_tokens; ++j)
      if (fresh_[j] != picked_ && before(score_[j], j, best)) stale_[count++] = j;
    const int64_t grain = std::max<int64_t>(1, (1 << 14) / (vectors_ + 1));
    parallel_for(count, grain, [&](int64_t begin, int64_t end) {
      Extremum own = best;
      for (int64_t i = begin; i < end; ++i) {
        const int32_t j = stale_[i];
        if (!before(score_[j], j, own)) continue;
        refresh(j);
        if (before(score_[j], j, own)) own = {score_[j], j};
      }
    });
  }

  void cover(int32_t token) {
    for (int32_t v = 0; v < left_[token]; ++v) {
      float* covered = covered_.get() + int64_t{rows_[token * vectors_ + v]} * kLanes;
      store(covered, max(load(values_.get() + (token * vectors_ + v) * kLanes), load(covered)));
    }
  }

  const SelectCoverParams& p_;
  const int64_t vectors_;   // lane vectors of a full column
  Scratch<float> values_;   // [N, vectors, kLanes]; the first left[j] vectors of a column count
  Scratch<int32_t> rows_;   // [N, vectors]: which vector of rows that is
  Scratch<float> covered_;  // [vectors, kLanes]
  Scratch<float> score_;    // minus an upper bound of the value
  Scratch<int32_t> left_, fresh_, stale_;
  int32_t picked_ = 0;  // fresh[j] == picked: score[j] is exact
};

void select_item(const SelectCoverParams& p, int64_t b) {
  LazyCover cover(p, b);
  int64_t* indices = p.indices + b * p.keep;
  for (int32_t i = 0; i < p.keep; ++i) indices[i] = cover.pick();
  if (p.order == Order::kPosition) std::sort(indices, indices + p.keep);
}

}  // namespace

void select_cover_cpu(const SelectCoverParams& p) {
  parallel_items(p.batch, [&](int64_t b) { select_item(p, b); });
}

}  // namespace VTK_ISA
}  // namespace vtk
