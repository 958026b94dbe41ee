// bipartite_match on the CPU: a tiled matrix product whose results are reduced to a running arg-max in registers.
//
//   split    lists the sources and destinations of an item
//   unit     x / |x| of all of them, once, as float32: sources transposed in groups of 2 vectors, destinations as rows
//   match    dot_tile.h: a lane is a source, destinations are broadcast six at a time. Each lane keeps its best
//            similarity and destination, so nothing is ever reduced across lanes.
//   merge    the r best edges by nth_element over (similarity, source) packed in one integer, then the output rows
//
// Every dot product has one summation order, channels ascending, so neither threads nor tiles can change a result.
// Enough items: a thread each. Few: the threads share every item.
// Extra memory: the unit vectors, 4 N C bytes, and about 32 N, of an item in work. Bound: N^2 / 4 * C multiply-adds.
#include "merge/bipartite_match.h"

#include <algorithm>
#include <functional>
#include <limits>

#include "common/order_key.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "device/tile.h"
#include "merge/dot_tile.h"

namespace vtk {
namespace VTK_ISA {
namespace {

constexpr int kTileDestinations = kTileRows;
constexpr int kBlock = 4 * kGroup;       // sources that share a pass over the destinations
constexpr int64_t kWorkGrain = 1 << 17;  // multiply-adds that pay for a fork
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

bool is_protected(const BipartiteMatchParams& p, int64_t b, int64_t n) {
  return p.protect.data != nullptr && p.protect.data[b * p.protect.stride_row + n * p.protect.stride_col];
}

bool is_source(const BipartiteMatchParams& p, int64_t b, int64_t n) {
  return (p.rank == nullptr ? n : p.rank[b * p.rank_stride_batch + n * p.rank_stride_token]) % 2 == 0;
}

// Larger is more similar, NaN below everything; among equal similarities the earlier source.
uint64_t edge_rank(float similarity, int32_t source) {
  return uint64_t{order_key(similarity)} << 32 | (0xffffffffu - static_cast<uint32_t>(source));
}

int32_t source_of(uint64_t rank) { return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(rank)); }

// One item: its tokens, split in two, and what is known of each source.
class Matcher {
 public:
  Matcher(const BipartiteMatchParams& params, int64_t b)
      : p(params),
        b(b),
        sources_(scratch<int32_t>(p.num_tokens)),
        destinations_(scratch<int32_t>(p.num_tokens)),
        owner_(p.owner + b * p.num_tokens) {
    split();
    const int64_t padded = round_up<int64_t>(num_sources_, kGroup);
    source_units_ = scratch<float>(padded * p.channels);
    destination_units_ = scratch<float>(int64_t{num_destinations_} * p.channels);
    best_ = scratch<float>(padded);
    partner_ = scratch<int32_t>(padded);
  }

  void run() {
    switch (p.dtype) {
      case DType::kFloat32: normalise<float>(); break;
      case DType::kFloat16: normalise<f16>(); break;
      case DType::kBFloat16: normalise<bf16>(); break;
    }
    const int64_t block_work = std::max<int64_t>(1, int64_t{kBlock} * num_destinations_ * p.channels);
    parallel_for((num_sources_ + kBlock - 1) / kBlock, std::max<int64_t>(1, kWorkGrain / block_work),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t block = begin; block < end; ++block) match(static_cast<int32_t>(block) * kBlock);
                 });
    if (p.similarity != nullptr) write_similarity();
    merge();
  }

 private:
  void split() {
    for (int32_t n = 0; n < p.num_tokens; ++n) {
      if (is_protected(p, b, n)) continue;
      if (is_source(p, b, n))
        sources_[num_sources_++] = n;
      else
        destinations_[num_destinations_++] = n;
    }
  }

  // Source s becomes column s % kGroup of its group [C, kGroup], destination d row d [C].
  template <class T>
  void normalise() {
    const T* base = static_cast<const T*>(p.metric) + b * p.stride_batch;
    parallel_for(num_sources_ + num_destinations_, std::max<int64_t>(1, kWorkGrain / (4 * p.channels)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t d = i - num_sources_;
                     if (d >= 0)
                       unit_row(base + destinations_[d] * p.stride_token, &destination_units_[d * p.channels]);
                     else
                       unit_column(base + sources_[i] * p.stride_token,
                                   &source_units_[i / kGroup * kGroup * p.channels + i % kGroup]);
                   }
                 });
  }

  template <class T>
  void unit_row(const T* from, float* to) {
    const float factor = inverse_norm(squared_norm(from, p.channels));
    int32_t c = 0;
    for (; c + kLanes <= p.channels; c += kLanes) store(to + c, load(from + c) * factor);
    for (; c < p.channels; ++c) to[c] = to_float(from[c]) * factor;
  }

  template <class T>
  void unit_column(const T* from, float* to) {
    const float factor = inverse_norm(squared_norm(from, p.channels));
    for (int32_t c = 0; c < p.channels; ++c) to[int64_t{c} * kGroup] = to_float(from[c]) * factor;
  }

  // The best destination of the sources of a block. A NaN is never better; the first of equals stays.
  void match(int32_t first) {
    const int32_t end = std::min(first + kBlock, num_sources_);
    const int64_t padded = round_up<int64_t>(end - first, kGroup);
    std::fill_n(&best_[first], padded, -kInfinity);
    std::fill_n(&partner_[first], padded, 0);
    for (int32_t d = 0; d < num_destinations_; d += kTileDestinations) {
      // The last tile repeats the last destination, which cannot beat itself.
      const float* rows[kTileDestinations];
      for (int i = 0; i < kTileDestinations; ++i)
        rows[i] = &destination_units_[int64_t{std::min(d + i, num_destinations_ - 1)} * p.channels];
      for (int32_t s = first; s < end; s += kGroup)
        match_tile(rows, d, &source_units_[int64_t{s} * p.channels], &best_[s], &partner_[s]);
    }
  }

  void match_tile(const float* const* rows, int32_t d, const float* columns, float* best, int32_t* partner) const {
    f32v dot[kTileDestinations][2];
    dot_tile(rows, columns, p.channels, dot);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      f32v top = load(best + v * kLanes);
      i32v where;
      std::memcpy(&where, partner + v * kLanes, sizeof where);
#pragma GCC unroll 6
      for (int i = 0; i < kTileDestinations; ++i) {
        const i32v better = dot[i][v] > top;
        top = better ? dot[i][v] : top;
        where = better ? i32v{} + (d + i) : where;
      }
      store(best + v * kLanes, top);
      std::memcpy(partner + v * kLanes, &where, sizeof where);
    }
  }

  float similarity(int32_t s) const { return best_[s] == -kInfinity ? kNaN : best_[s]; }  // only NaN leaves -inf

  void write_similarity() {
    float* out = p.similarity + b * p.num_tokens;
    std::fill_n(out, p.num_tokens, -kInfinity);
    for (int32_t s = 0; num_destinations_ > 0 && s < num_sources_; ++s) out[sources_[s]] = similarity(s);
  }

  void merge() {
    // The best edges come first.
    Scratch<uint64_t> edges = scratch<uint64_t>(num_sources_);
    uint64_t *begin = edges.get(), *end = begin + num_sources_, *eligible = num_destinations_ > 0 ? end : begin;
    for (int32_t s = 0; s < num_sources_; ++s) begin[s] = edge_rank(similarity(s), s);
    if (p.has_threshold)
      eligible = std::partition(begin, eligible, [&](uint64_t e) { return similarity(source_of(e)) > p.threshold; });
    const int32_t merges = std::min(p.merges, static_cast<int32_t>(eligible - begin));
    if (begin + merges < eligible) std::nth_element(begin, begin + merges, eligible, std::greater<uint64_t>());

    // Number the survivors, then send the merged after their destinations.
    std::fill_n(owner_, p.num_tokens, 0);
    for (int32_t e = 0; e < merges; ++e) owner_[sources_[source_of(edges[e])]] = -1;
    if (p.order == MergeOrder::kPosition)
      number_by_position();
    else
      number_as_tome(begin + merges, end);
    for (int32_t e = 0; e < merges; ++e) {
      const int32_t s = source_of(edges[e]);
      owner_[sources_[s]] = owner_[destinations_[partner_[s]]];
    }
  }

  void number_by_position() {
    int64_t row = 0;
    for (int32_t n = 0; n < p.num_tokens; ++n)
      if (owner_[n] >= 0) owner_[n] = row++;
  }

  // ToMe lists unmerged sources by descending similarity, but by position as soon as a token is protected.
  void number_as_tome(uint64_t* unmerged, uint64_t* end) {
    int64_t row = 0;
    if (p.protect.data == nullptr) {
      std::sort(unmerged, end, std::greater<uint64_t>());
      for (; unmerged < end; ++unmerged) owner_[sources_[source_of(*unmerged)]] = row++;
    } else {
      for (int32_t n = 0; n < p.num_tokens; ++n)
        if (owner_[n] >= 0 && is_source(p, b, n)) owner_[n] = row++;
    }
    for (int32_t n = 0; n < p.num_tokens; ++n)
      if (!is_source(p, b, n)) owner_[n] = row++;
  }

  const BipartiteMatchParams& p;
  const int64_t b;
  Scratch<int32_t> sources_, destinations_;  // tokens
  int32_t num_sources_ = 0, num_destinations_ = 0;
  Scratch<float> source_units_, destination_units_;  // [sources / kGroup, C, kGroup], [destinations, C]
  Scratch<float> best_;                              // [sources]
  Scratch<int32_t> partner_;                         // [sources], its destination
  int64_t* const owner_;                             // [N]
};

}  // namespace

void bipartite_match_cpu(const BipartiteMatchParams& p) {
  auto match = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) Matcher(p, b).run();
  };
  if (p.batch >= num_threads())
    parallel_for(p.batch, 1, match);
  else
    match(0, p.batch);
}

}  // namespace VTK_ISA
}  // namespace vtk
