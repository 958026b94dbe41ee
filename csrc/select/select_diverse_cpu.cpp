// select_diverse on the CPU: the picks of the plain greedy loop, without one pass over the features per pick.
//
//   cos(j, c) = (x_j . x_c) / |x_j| / |x_c|, always summed in the order of dot_panel.h, so what is computed when
//               cannot change a pick
//   max_min   lazy: a token's largest similarity to the picks only grows, so a stale one is a lower bound. A step
//             refreshes only tokens whose bound still beats the best exact one, the most promising first, group of
//             picks by group, and drops a token as soon as it is beaten: 0.3 of the N * keep dots on random features.
//   max_sum   speculative: when the similarities to a pick are not cached, the next picks are drafted greedily
//             among the kDraftTokens most promising tokens, and one pass over the features computes all their
//             rows. A wrong draft costs time only; the panel shrinks when drafts fail.
//
// Extra memory per item in work: max_min keep * C floats (the packed picks), max_sum kCachedRows * N floats and
// kMaxAhead * C; both about 6 N words.
// Bound: the plain loop is a matrix-vector product a pick, bound by memory (14 GFLOP/s at 27 GB/s). Here the dots run
// at 60 to 70 GFLOP/s of 95: max_sum is bound by its N * keep * C multiply-adds, a fifth of it drafts.
// Tried and lost: unpacked columns (strides of 4 KiB thrash the first cache level, half the speed), software prefetch
// of the next rows, converting 16-bit rows once a group, sweeping over all stale tokens at once (2.4 times the dots:
// they miss one pick each and a group has four).
#include "select/select_diverse.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/dot_panel.h"
#include "common/extremum.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace vtk {
namespace VTK_ISA {
namespace {

constexpr float kExcluded = std::numeric_limits<float>::infinity();
constexpr int kEagerRounds = 8;     // three tokens each, refreshed best-first before a step sweeps over the others
constexpr int kMaxAheadGroups = 4;  // similarity rows computed in one pass: up to 4 groups of 4
constexpr int kMaxAhead = kMaxAheadGroups * kPanelWidth;
constexpr int32_t kDraftTokens = 128;
constexpr int kCachedRows = 64;

template <class T>
struct Rows {
  const T* base;
  int64_t stride;
  int64_t channels;
  const T* operator[](int64_t token) const { return base + token * stride; }
  // Rows of one parallel range: enough work to pay for the fork.
  int64_t grain(int64_t multiply_adds) const {
    return std::max<int64_t>(3, multiply_adds / std::max<int64_t>(1, channels));
  }
};

struct Item {
  Scratch<float> score;      // the smallest is picked next; kExcluded: picked, dropped or ranked last
  Scratch<float> inverse;    // 1 / norm, 0 for a zero vector
  Scratch<bool> ranks_last;  // a NaN or infinite norm
  Scratch<int32_t> picks;
  int32_t tokens, keep, count = 0;

  Item(int32_t tokens, int32_t keep)
      : score(scratch<float>(tokens)),
        inverse(scratch<float>(tokens)),
        ranks_last(scratch<bool>(tokens)),
        picks(scratch<int32_t>(keep)),
        tokens(tokens),
        keep(keep) {}

  void pick(int32_t token) {
    picks[count++] = token;
    score[token] = kExcluded;
  }
};

bool dropped(const SelectDiverseParams& p, int64_t b, int64_t n) {
  return p.drop_mask.data != nullptr && p.drop_mask.data[b * p.drop_mask.stride_row + n * p.drop_mask.stride_col];
}

int32_t first_pick(const SelectDiverseParams& p, int64_t b) {
  if (p.seed != nullptr) return static_cast<int32_t>(p.seed[b * p.seed_stride]);
  int32_t token = 0;
  while (dropped(p, b, token)) ++token;
  return token;
}

// Norms, and the similarity of every token to the first pick, in one pass. A NaN pick is similar to nothing.
template <class T>
void start(const SelectDiverseParams& p, int64_t b, const Rows<T>& rows, Item& item) {
  const int32_t seed = first_pick(p, b);
  Scratch<float> panel = scratch<float>(panel_group_size(p.channels));
  std::fill_n(panel.get(), panel_group_size(p.channels), 0.0f);
  pack_column(rows[seed], p.channels, 0, panel.get());
  parallel_for(p.num_tokens, rows.grain(1 << 16), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const float norm = dot_pair(rows[j], rows[j], p.channels);
      item.ranks_last[j] = !(norm < std::numeric_limits<float>::infinity());
      item.inverse[j] = norm >= kMinSquaredNorm ? 1.0f / std::sqrt(norm) : 0.0f;
    }
    dot_rows<1>([&](int64_t j) { return rows[j]; }, begin, end, panel.get(), 1, p.channels,
                [&](int64_t j, const float* dots) { item.score[j] = dots[0]; });
  });
  for (int32_t j = 0; j < p.num_tokens; ++j) {
    if (item.ranks_last[j] || dropped(p, b, j))
      item.score[j] = kExcluded;
    else
      item.score[j] = item.ranks_last[seed] ? 0.0f : item.score[j] * item.inverse[j] * item.inverse[seed];
  }
  item.pick(seed);
}

// max_min. score[j] is the largest similarity to the first seen[j] picks.
template <class T>
class LazyMaxMin {
 public:
  LazyMaxMin(const Rows<T>& rows, Item& item)
      : rows_(rows),
        item_(item),
        group_size_(panel_group_size(rows.channels)),
        panel_(scratch<float>((item.keep + kPanelWidth - 1) / kPanelWidth * group_size_)),
        seen_(scratch<int32_t>(item.tokens)),
        stale_(scratch<int32_t>(item.tokens)) {
    std::fill_n(seen_.get(), item.tokens, 1);
    add_pick();
  }

  // Packs the latest pick.
  void add_pick() {
    const int32_t slot = item_.count - 1;
    float* group = panel_.get() + slot / kPanelWidth * group_size_;
    if (slot % kPanelWidth == 0) std::fill_n(group, group_size_, 0.0f);
    pack_column(rows_[item_.picks[slot]], rows_.channels, slot % kPanelWidth, group);
  }

  // The token whose largest similarity is smallest; kExcluded when there is none.
  Extremum next() {
    Extremum best{kExcluded, INT32_MAX};
    for (int round = 0;; ++round) {
      const Extremum candidate = smallest(item_.score.get(), item_.tokens);
      if (candidate.value == kExcluded || seen_[candidate.index] == item_.count) return candidate;
      if (round < std::max(1, kEagerRounds / num_threads()))  // more threads gain more from the sweep
        refresh_first(best);
      else
        sweep(best);
    }
  }

 private:
  // Refreshes the most promising stale tokens and lowers `best` to the best exact one among them.
  void refresh_first(Extremum& best) {
    int32_t first[kMaxPanelRows];
    float bound[kMaxPanelRows];
    int count = 0;
    while (count < kMaxPanelRows) {
      const Extremum next = smallest(item_.score.get(), item_.tokens);
      if (next.value == kExcluded || seen_[next.index] == item_.count || !before(next.value, next.index, best)) break;
      first[count] = next.index;
      bound[count++] = next.value;
      item_.score[next.index] = kExcluded;  // so that the next search finds the next one
    }
    for (int i = 0; i < count; ++i) item_.score[first[i]] = bound[i];
    refresh(first, count, best);
    for (int i = 0; i < count; ++i) {
      const int32_t j = first[i];
      if (seen_[j] == item_.count && before(item_.score[j], j, best)) best = {item_.score[j], j};
    }
  }

  // Refreshes every token that may beat `best`; afterwards the smallest score is an exact one.
  void sweep(const Extremum& best) {
    int32_t count = 0;
    for (int32_t j = 0; j < item_.tokens; ++j)
      if (before(item_.score[j], j, best) && seen_[j] < item_.count) stale_[count++] = j;
    parallel_for(count, rows_.grain(1 << 15),
                 [&](int64_t begin, int64_t end) { refresh(stale_.get() + begin, end - begin, best); });
  }

  // Brings tokens up to date, all of them through one group of picks before the next group, so that a group is
  // read once; a token leaves when it no longer beats `best`.
  void refresh(int32_t* tokens, int64_t count, const Extremum& best) {
    std::sort(tokens, tokens + count,
              [&](int32_t a, int32_t b) { return seen_[a] != seen_[b] ? seen_[a] < seen_[b] : a < b; });
    int64_t active = 0, waiting = 0;
    for (int32_t g = seen_[tokens[0]] / kPanelWidth; g * kPanelWidth < item_.count; ++g) {
      while (waiting < count && seen_[tokens[waiting]] / kPanelWidth == g)
        std::swap(tokens[active++], tokens[waiting++]);
      if (active == 0) {
        if (waiting == count) return;
        continue;
      }
      const int32_t end = std::min((g + 1) * kPanelWidth, item_.count);
      dot_rows<1>(
          [&](int64_t i) { return rows_[tokens[i]]; }, 0, active, panel_.get() + g * group_size_, 1, rows_.channels,
          [&](int64_t i, const float* dots) {
            const int32_t j = tokens[i];
            for (int32_t k = seen_[j]; k < end; ++k)
              item_.score[j] =
                  std::max(item_.score[j], dots[k % kPanelWidth] * item_.inverse[j] * item_.inverse[item_.picks[k]]);
            seen_[j] = end;
          });
      int64_t left = 0;
      for (int64_t i = 0; i < active; ++i)
        if (before(item_.score[tokens[i]], tokens[i], best)) std::swap(tokens[left++], tokens[i]);
      active = left;
    }
  }

  const Rows<T> rows_;
  Item& item_;
  const int64_t group_size_;
  Scratch<float> panel_;
  Scratch<int32_t> seen_, stale_;
};

// max_sum. score[j] is the sum of the similarities to all picks, added in pick order.
template <class T>
class SpeculativeMaxSum {
 public:
  SpeculativeMaxSum(const Rows<T>& rows, Item& item)
      : rows_(rows),
        item_(item),
        group_size_(panel_group_size(rows.channels)),
        panel_(scratch<float>(kMaxAheadGroups * group_size_)),
        cache_(scratch<float>(int64_t{kCachedRows} * item.tokens)),
        slot_of_(scratch<int32_t>(item.tokens)),
        alive_(scratch<int32_t>(item.tokens)),
        draft_(scratch<int32_t>(item.tokens)) {
    std::fill_n(slot_of_.get(), item.tokens, -1);
    std::fill_n(owner_, kCachedRows, -1);
  }

  // The token with the smallest sum; kExcluded when there is none.
  Extremum next() { return smallest(item_.score.get(), item_.tokens); }

  // Adds the similarities to the latest pick.
  void add_pick() {
    const int32_t pick = item_.picks[item_.count - 1];
    if (slot_of_[pick] < 0) compute_rows(pick);
    const float* row = cached_row(pick);
    for (int32_t j = 0; j < item_.tokens; ++j) item_.score[j] += row[j];
    owner_[slot_of_[pick]] = -1;
    ++served_;
  }

 private:
  float* cached_row(int32_t token) { return cache_.get() + int64_t{slot_of_[token]} * item_.tokens; }

  void take_slot(int32_t token) {
    if (owner_[next_slot_] >= 0) slot_of_[owner_[next_slot_]] = -1;
    owner_[next_slot_] = token;
    slot_of_[token] = next_slot_;
    next_slot_ = (next_slot_ + 1) % kCachedRows;
    std::fill_n(cached_row(token), item_.tokens, 0.0f);
  }

  // Computes the similarity rows of `pick` and of the picks that will probably follow.
  void compute_rows(int32_t pick) {
    int32_t alive = 0;
    for (int32_t j = 0; j < item_.tokens; ++j)
      if (item_.score[j] != kExcluded) alive_[alive++] = j;

    // Draft, as far ahead as the last pass has served, and a group further.
    const int groups = std::min(kMaxAheadGroups, served_ / kPanelWidth + 1);
    served_ = 0;
    int32_t ahead[kMaxAhead];
    const int count = draft(pick, alive, groups * kPanelWidth, ahead);
    for (int c = 0; c < count; ++c) take_slot(ahead[c]);

    // Multiply.
    parallel_for(alive, rows_.grain(1 << 15), [&](int64_t begin, int64_t end) {
      dot_rows<kMaxAheadGroups>([&](int64_t i) { return rows_[alive_[i]]; }, begin, end, panel_.get(),
                                (count + kPanelWidth - 1) / kPanelWidth, rows_.channels,
                                [&](int64_t i, const float* dots) {
                                  const int32_t j = alive_[i];
                                  for (int c = 0; c < count; ++c)
                                    cached_row(ahead[c])[j] = dots[c] * item_.inverse[j] * item_.inverse[ahead[c]];
                                });
    });
  }

  // Continues the greedy selection among the most promising tokens alone. Lists and packs `pick` and the tokens
  // after it whose rows are not cached, up to `limit`.
  int draft(int32_t pick, int32_t alive, int limit, int32_t* ahead) {
    int32_t size = std::min(kDraftTokens, alive);
    std::copy_n(alive_.get(), alive, draft_.get());
    if (size < alive)
      std::nth_element(draft_.get(), draft_.get() + size, draft_.get() + alive, [&](int32_t a, int32_t b) {
        return item_.score[a] != item_.score[b] ? item_.score[a] < item_.score[b] : a < b;
      });
    float score[kDraftTokens];
    for (int32_t i = 0; i < size; ++i) score[i] = item_.score[draft_[i]];

    int count = 0;
    int32_t last = pick;
    for (int32_t left = item_.keep - item_.count;; --left) {
      if (slot_of_[last] < 0) {
        float* group = panel_.get() + count / kPanelWidth * group_size_;
        if (count % kPanelWidth == 0) std::fill_n(group, group_size_, 0.0f);
        pack_column(rows_[last], rows_.channels, count % kPanelWidth, group);
        ahead[count++] = last;
      }
      if (count == limit || size == 0 || left <= 1) return count;
      for (int32_t i = 0; i < size; ++i)
        score[i] += slot_of_[last] >= 0 ? cached_row(last)[draft_[i]] : similarity(draft_[i], last);
      const int32_t best = smallest(score, size).index;
      last = draft_[best];
      --size;
      score[best] = score[size];
      draft_[best] = draft_[size];
    }
  }

  float similarity(int32_t a, int32_t b) const {
    return dot_pair(rows_[a], rows_[b], rows_.channels) * item_.inverse[a] * item_.inverse[b];
  }

  const Rows<T> rows_;
  Item& item_;
  const int64_t group_size_;
  Scratch<float> panel_, cache_;
  Scratch<int32_t> slot_of_, alive_, draft_;
  int32_t owner_[kCachedRows];  // token of each cached row, or -1
  int32_t next_slot_ = 0;
  int served_ = kMaxAhead;  // picks since the last pass
};

template <class Greedy, class T>
void pick_greedily(const Rows<T>& rows, Item& item) {
  Greedy greedy(rows, item);
  while (item.count < item.keep) {
    const Extremum next = greedy.next();
    if (next.value == kExcluded) return;
    item.pick(next.index);
    if (item.count < item.keep) greedy.add_pick();
  }
}

template <class T>
void select_item(const SelectDiverseParams& p, int64_t b) {
  const Rows<T> rows{static_cast<const T*>(p.features) + b * p.stride_batch, p.stride_token, p.channels};
  Item item(p.num_tokens, p.keep);
  start(p, b, rows, item);
  if (p.mode == DiverseMode::kMaxMin)
    pick_greedily<LazyMaxMin<T>>(rows, item);
  else
    pick_greedily<SpeculativeMaxSum<T>>(rows, item);
  // Nothing else is left: tokens with a NaN.
  for (int32_t j = 0; j < p.num_tokens && item.count < p.keep; ++j)
    if (item.ranks_last[j] && j != item.picks[0] && !dropped(p, b, j)) item.pick(j);
  if (p.order == Order::kPosition) std::sort(item.picks.get(), item.picks.get() + p.keep);
  std::copy_n(item.picks.get(), p.keep, p.indices + b * p.keep);
}

}  // namespace

void select_diverse_cpu(const SelectDiverseParams& p) {
  parallel_items(p.batch, [&](int64_t b) {
    switch (p.dtype) {
      case DType::kFloat32: return select_item<float>(p, b);
      case DType::kFloat16: return select_item<f16>(p, b);
      case DType::kBFloat16: return select_item<bf16>(p, b);
    }
  });
}

}  // namespace VTK_ISA
}  // namespace vtk
