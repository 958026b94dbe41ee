// energy_scores on the CPU: half of a matrix product, each block of it reduced along rows and columns at once.
//
//   pack   x / |x| of the usable tokens as float32, in groups of kGroup tokens: [C, kGroup], a lane a token. Both
//          operands of a product read this one layout, rows as broadcast scalars and columns as vectors.
//   pairs  the cosine is symmetric: of two groups I <= J one block of products gives f to the tokens of I (sums down
//          its columns) and to those of J (sums along its rows). 6 x 2 register tiles, 8 loads for 12 FMAs; the depth
//          in chunks, so that the operands of a block stay in L1.
//   sum    a part is a fixed set of groups I with its own sums over the tokens; the parts are added in order
//
// The cut into parts depends on the shape alone, so neither threads nor the number of items can change a result.
// Extra memory: 4 N C bytes, and 4 N for each of at most 16 parts, of an item in work. Bound: N^2 / 2 * C
// multiply-adds and N^2 / 2 exponentials of about 25 operations.
#include "score/energy_scores.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/dot_panel.h"
#include "common/norm.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "device/tile.h"

namespace vtk {
namespace VTK_ISA {
namespace {

constexpr int kTileRows = 6;
constexpr int kGroup = kTileRows * kLanes;  // a whole number of register tiles along rows and along columns
constexpr int32_t kDepth = 256;
constexpr int32_t kMaxParts = 16;
constexpr int64_t kWorkGrain = 1 << 17;  // multiply-adds that pay for a fork
constexpr float kLog2E = 1.44269504f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

template <EnergyKind kKind>
f32v energy_of(f32v cosine, const EnergyScoresParams& p) {
  if constexpr (kKind == EnergyKind::kGaussian) {
    const f32v distance = 1.0f - cosine;
    return exp2_bounded(distance * distance * -p.sharpness);
  } else {
    const f32v above = cosine - p.margin;
    const f32v below = p.alpha * (exp2_bounded(above * kLog2E) - 1.0f);  // where above > 0, of no meaning
    return above > 0.0f ? above : below;
  }
}

// dots[6][2 vectors] (+)= rows [depth][6] times columns [depth][2 vectors], both with a pitch of kGroup.
void multiply_tile(const float* rows, const float* columns, int32_t depth, bool add, float* dots) {
  f32v total[kTileRows][2];
#pragma GCC unroll 6
  for (int i = 0; i < kTileRows; ++i) total[i][0] = total[i][1] = f32v{};
  for (int32_t c = 0; c < depth; ++c) {
    const f32v low = load(columns + int64_t{c} * kGroup), high = load(columns + int64_t{c} * kGroup + kLanes);
    const float* row = rows + int64_t{c} * kGroup;
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i) {
      total[i][0] += row[i] * low;
      total[i][1] += row[i] * high;
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      float* to = dots + i * kGroup + v * kLanes;
      store(to, add ? load(to) + total[i][v] : total[i][v]);
    }
}

// One item: the unit vectors of its usable tokens, and what its groups add up.
class Energies {
 public:
  Energies(const EnergyScoresParams& params, int64_t b)
      : p(params),
        b(b),
        inverse_(scratch<float>(p.num_tokens)),
        tokens_(scratch<int32_t>(p.num_tokens)),
        out_(p.out + b * p.num_tokens) {}

  void run() {
    switch (p.dtype) {
      case DType::kFloat32: load_tokens<float>(); break;
      case DType::kFloat16: load_tokens<f16>(); break;
      case DType::kBFloat16: load_tokens<bf16>(); break;
    }
    parts_ = std::min(ceil_div(groups_, 2), kMaxParts);
    sums_ = scratch<float>(int64_t{parts_} * groups_ * kGroup);
    parallel_for(parts_, grain(int64_t{kGroup} * count_ * p.channels), [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) add_part(static_cast<int32_t>(part));
    });
    for (int32_t i = 0; i < count_; ++i) {
      float total = 0.0f;
      for (int32_t part = 0; part < parts_; ++part) total += sums_[int64_t{part} * groups_ * kGroup + i];
      out_[tokens_[i]] = total / static_cast<float>(count_) * p.scale;
    }
  }

 private:
  static int64_t grain(int64_t work_each) { return std::max<int64_t>(1, kWorkGrain / std::max<int64_t>(1, work_each)); }
  template <class T>
  const T* row(int64_t n) const {
    return static_cast<const T*>(p.metric) + b * p.stride_batch + n * p.stride_token;
  }
  bool is_valid(int64_t n) const {
    return p.valid.data == nullptr || p.valid.data[b * p.valid.stride_row + n * p.valid.stride_col];
  }
  const float* units(int32_t group) const { return &units_[int64_t{group} * kGroup * p.channels]; }

  template <class T>
  void load_tokens() {
    parallel_for(p.num_tokens, grain(p.channels), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) inverse_[n] = inverse_norm(dot_pair(row<T>(n), row<T>(n), p.channels));
    });
    for (int32_t n = 0; n < p.num_tokens; ++n) {
      out_[n] = is_valid(n) ? kNaN : -kInfinity;
      if (is_valid(n) && inverse_[n] == inverse_[n]) tokens_[count_++] = n;
    }
    groups_ = ceil_div(count_, kGroup);
    units_ = scratch<float>(int64_t{groups_} * kGroup * p.channels);
    parallel_for(groups_, grain(int64_t{kGroup} * p.channels), [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) pack<T>(static_cast<int32_t>(group));
    });
  }

  // Lanes without a token are zero vectors.
  template <class T>
  void pack(int32_t group) {
    float* to = &units_[int64_t{group} * kGroup * p.channels];
    const int32_t lanes = std::min(kGroup, count_ - group * kGroup);
    if (lanes < kGroup) std::fill_n(to, int64_t{kGroup} * p.channels, 0.0f);
    for (int32_t lane = 0; lane < lanes; ++lane) {
      const int32_t n = tokens_[group * kGroup + lane];
      const T* from = row<T>(n);
      int32_t c = 0;
      for (; c + kLanes <= p.channels; c += kLanes) {
        const f32v x = load(from + c) * inverse_[n];
        for (int i = 0; i < kLanes; ++i) to[int64_t{c + i} * kGroup + lane] = x[i];
      }
      for (; c < p.channels; ++c) to[int64_t{c} * kGroup + lane] = to_float(from[c]) * inverse_[n];
    }
  }

  // Group k has groups_ - k partners, so k and groups_ - 1 - k together are equal work.
  void add_part(int32_t part) {
    float* sums = &sums_[int64_t{part} * groups_ * kGroup];
    std::fill_n(sums, groups_ * kGroup, 0.0f);
    const Range pairs = split_range(ceil_div(groups_, 2), parts_, part);
    for (int32_t pair = pairs.begin; pair < pairs.end; ++pair) {
      add_group(pair, sums);
      if (groups_ - 1 - pair != pair) add_group(groups_ - 1 - pair, sums);
    }
  }

  void add_group(int32_t columns, float* sums) const {
    alignas(64) float dots[kGroup * kGroup];
    for (int32_t rows = columns; rows < groups_; ++rows) {
      multiply(units(rows), units(columns), dots);
      const int32_t count = std::min(kGroup, count_ - rows * kGroup);
      float* row_sums = rows == columns ? nullptr : sums + rows * kGroup;
      if (p.kind == EnergyKind::kElu)
        add_block<EnergyKind::kElu>(dots, count, sums + columns * kGroup, row_sums);
      else
        add_block<EnergyKind::kGaussian>(dots, count, sums + columns * kGroup, row_sums);
    }
  }

  void multiply(const float* rows, const float* columns, float* dots) const {
    for (int32_t c = 0; c < p.channels; c += kDepth) {
      const int32_t depth = std::min(kDepth, p.channels - c);
      const int64_t first = int64_t{c} * kGroup;
      for (int v = 0; v < kGroup; v += 2 * kLanes)
        for (int r = 0; r < kGroup; r += kTileRows)
          multiply_tile(rows + first + r, columns + first + v, depth, c > 0, dots + r * kGroup + v);
    }
  }

  // A block on the diagonal holds every pair twice and is summed down its columns alone.
  template <EnergyKind kKind>
  void add_block(const float* dots, int32_t rows, float* column_sums, float* row_sums) const {
    f32v columns[kTileRows] = {};
    for (int32_t r = 0; r < rows; ++r) {
      f32v along = {};
#pragma GCC unroll 6
      for (int v = 0; v < kTileRows; ++v) {
        const f32v energy = energy_of<kKind>(load(dots + r * kGroup + v * kLanes), p);
        columns[v] += energy;
        along += energy;
      }
      if (row_sums != nullptr) row_sums[r] += sum(along);
    }
    for (int v = 0; v < kTileRows; ++v) store(column_sums + v * kLanes, load(column_sums + v * kLanes) + columns[v]);
  }

  const EnergyScoresParams& p;
  const int64_t b;
  Scratch<float> inverse_;   // [N]
  Scratch<int32_t> tokens_;  // usable ones
  Scratch<float> units_;     // [groups, C, kGroup]
  Scratch<float> sums_;      // [parts, groups * kGroup]
  float* const out_;         // [N]
  int32_t count_ = 0, groups_ = 0, parts_ = 0;
};

}  // namespace

void energy_scores_cpu(const EnergyScoresParams& p) {
  parallel_items(p.batch, [&](int64_t b) { Energies(p, b).run(); });
}

}  // namespace VTK_ISA
}  // namespace vtk
