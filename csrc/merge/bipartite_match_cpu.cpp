// bipartite_match on the CPU: a tiled matrix product whose results are reduced to a running arg-max in registers.
//
//   split    lists the sources and destinations of an item
//   unit     x / |x| of all of them, once, as float32: sources transposed in groups of 2 vectors, destinations as rows
//   match    dot_tile.h: a lane is a source, destinations are broadcast six at a time. Each lane keeps its best
//            similarity and destination, so nothing is ever reduced across lanes.
//   merge    the r best edges by nth_element over (similarity, source) packed in one integer, then the output rows
//
// Causal: the sources are the destinations, and each lane counts the destinations before its own token only.
// Every dot product has one summation order, channels ascending, so neither threads nor tiles can change a result.
// Enough items: a thread each. Few: the threads share every item.
// Extra memory: the unit vectors, 4 N C bytes, and about 32 N, of an item in work. Bound: N^2 / 4 * C multiply-adds.
#include "merge/bipartite_match.h"

#include <algorithm>
#include <functional>
#include <limits>

#include "common/dot_tile.h"
#include "common/norm.h"
#include "common/order_key.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "device/tile.h"

namespace vtk {
namespace VTK_ISA {
namespace {

constexpr int kTileDestinations = kTileRows;
constexpr int kBlock = 4 * kGroup;       // sources that share a pass over the destinations
constexpr int64_t kWorkGrain = 1 << 17;  // multiply-adds that pay for a fork
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Larger is more similar, NaN below everything; among equal similarities the earlier source.
uint64_t edge_rank(float similarity, int32_t source) {
  return uint64_t{order_key(similarity)} << 32 | (0xffffffffu - static_cast<uint32_t>(source));
}

int32_t source_of(uint64_t rank) { return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(rank)); }

// Tokens that match among themselves: a batch row, or a packed segment.
struct Segment {
  int64_t first;   // packed: the first token
  int64_t offset;  // of the tokens in the outputs
  int32_t tokens;
  int32_t merges;  // r
};

Segment segment_of(const BipartiteMatchParams& p, int64_t b) {
  if (p.cu_seqlens == nullptr) return {0, b * p.num_tokens, p.num_tokens, p.merges};
  const int32_t first = p.cu_seqlens[b], tokens = p.cu_seqlens[b + 1] - first;
  return {first, first, tokens, std::min(p.segment_merges[b], most_merges(p, tokens))};
}

// One item: its tokens, which positions from 0 number, split in two, and what is known of each source.
class Matcher {
 public:
  Matcher(const BipartiteMatchParams& params, int64_t b)
      : p(params),
        b(b),
        segment_(segment_of(p, b)),
        sources_(scratch<int32_t>(segment_.tokens)),
        destinations_(scratch<int32_t>(segment_.tokens)),
        owner_(p.owner + segment_.offset) {
    split();
    const int64_t padded = round_up<int64_t>(num_sources_, kGroup);
    source_units_ = scratch<float>(padded * p.channels);
    destination_units_ = scratch<float>(int64_t{num_destinations_} * p.channels);
    best_ = scratch<float>(padded);
    partner_ = scratch<int32_t>(padded);
  }

  // Returns the rows that are left.
  int32_t run() {
    switch (p.dtype) {
      case DType::kFloat32: normalise<float>(); break;
      case DType::kFloat16: normalise<f16>(); break;
      case DType::kBFloat16: normalise<bf16>(); break;
    }
    const int64_t block_work = std::max<int64_t>(1, int64_t{kBlock} * num_destinations_ * p.channels);
    parallel_for((num_sources_ + kBlock - 1) / kBlock, std::max<int64_t>(1, kWorkGrain / block_work),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t block = begin; block < end; ++block) {
                     const int32_t first = static_cast<int32_t>(block) * kBlock;
                     is_causal() ? match<true>(first) : match<false>(first);
                   }
                 });
    if (p.similarity != nullptr) write_similarity();
    return merge();
  }

 private:
  bool is_causal() const { return p.split == MatchSplit::kCausal; }

  bool is_protected(int64_t n) const {
    return p.protect.data != nullptr &&
           p.protect.data[b * p.protect.stride_row + (segment_.first + n) * p.protect.stride_col];
  }

  bool has_even_rank(int64_t n) const {
    if (p.rank == nullptr) return n % 2 == 0;
    return p.rank[b * p.rank_stride_batch + (segment_.first + n) * p.rank_stride_token] % 2 == 0;
  }

  void split() {
    for (int32_t n = 0; n < segment_.tokens; ++n) {
      if (is_protected(n)) continue;
      if (is_causal() || has_even_rank(n)) sources_[num_sources_++] = n;
      if (is_causal() || !has_even_rank(n)) destinations_[num_destinations_++] = n;
    }
  }

  // The first source that may have an edge.
  int32_t first_source() const { return is_causal() ? 1 : num_destinations_ > 0 ? 0 : num_sources_; }

  // Source s becomes column s % kGroup of its group [C, kGroup], destination d row d [C].
  template <class T>
  void normalise() {
    const T* base = static_cast<const T*>(p.metric) + b * p.stride_batch + segment_.first * p.stride_token;
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
  template <bool kCausal>
  void match(int32_t first) {
    const int32_t end = std::min(first + kBlock, num_sources_);
    const int64_t padded = round_up<int64_t>(end - first, kGroup);
    std::fill_n(&best_[first], padded, -kInfinity);
    std::fill_n(&partner_[first], padded, 0);
    const int32_t num_destinations = kCausal ? end : num_destinations_;
    for (int32_t d = 0; d < num_destinations; d += kTileDestinations) {
      // The last tile repeats the last destination, which cannot beat itself.
      const float* rows[kTileDestinations];
      for (int i = 0; i < kTileDestinations; ++i)
        rows[i] = &destination_units_[int64_t{std::min(d + i, num_destinations_ - 1)} * p.channels];
      for (int32_t s = first; s < end; s += kGroup)
        match_tile<kCausal>(rows, d, &source_units_[int64_t{s} * p.channels], s);
    }
  }

  template <bool kCausal>
  void match_tile(const float* const* rows, int32_t d, const float* columns, int32_t s) {
    f32v dot[kTileDestinations][2];
    dot_tile(rows, columns, p.channels, dot);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      float* best = &best_[s + v * kLanes];
      int32_t* partner = &partner_[s + v * kLanes];
      i32v own;  // causal: the lanes' tokens, as destinations
      for (int lane = 0; lane < kLanes; ++lane) own[lane] = s + v * kLanes + lane;
      f32v top = load(best);
      i32v where;
      std::memcpy(&where, partner, sizeof where);
#pragma GCC unroll 6
      for (int i = 0; i < kTileDestinations; ++i) {
        i32v better = dot[i][v] > top;
        if constexpr (kCausal) better &= own > d + i;
        top = better ? dot[i][v] : top;
        where = better ? i32v{} + (d + i) : where;
      }
      store(best, top);
      std::memcpy(partner, &where, sizeof where);
    }
  }

  float similarity(int32_t s) const { return best_[s] == -kInfinity ? kNaN : best_[s]; }  // only NaN leaves -inf

  void write_similarity() {
    float* out = p.similarity + segment_.offset;
    std::fill_n(out, segment_.tokens, -kInfinity);
    for (int32_t s = first_source(); s < num_sources_; ++s) out[sources_[s]] = similarity(s);
  }

  int32_t merge() {
    // The best edges come first.
    Scratch<uint64_t> edges = scratch<uint64_t>(num_sources_);
    uint64_t *begin = edges.get(), *end = begin + num_sources_, *eligible = begin;
    for (int32_t s = first_source(); s < num_sources_; ++s) *eligible++ = edge_rank(similarity(s), s);
    std::generate(eligible, end, [&, s = 0]() mutable { return edge_rank(kNaN, s++); });
    if (p.has_threshold)
      eligible = std::partition(begin, eligible, [&](uint64_t e) { return similarity(source_of(e)) > p.threshold; });
    const int32_t merges = std::min(segment_.merges, static_cast<int32_t>(eligible - begin));
    if (begin + merges < eligible) std::nth_element(begin, begin + merges, eligible, std::greater<uint64_t>());

    // Number the survivors, then send the merged after their destinations.
    std::fill_n(owner_, segment_.tokens, 0);
    for (int32_t e = 0; e < merges; ++e) owner_[sources_[source_of(edges[e])]] = -1;
    if (p.order == MergeOrder::kPosition)
      number_by_position();
    else
      number_as_tome(begin + merges, end);
    follow_partners();
    return segment_.tokens - merges;
  }

  // NOTE: from the last source down, so that a destination that is merged itself still says -1.
  void follow_partners() {
    for (int32_t s = num_sources_ - 1; s >= 0; --s)
      if (owner_[sources_[s]] < 0) owner_[sources_[s]] = owner_[destinations_[partner_[s]]];
  }

  void number_by_position() {
    int64_t row = 0;
    for (int32_t n = 0; n < segment_.tokens; ++n)
      if (owner_[n] >= 0) owner_[n] = row++;
  }

  // ToMe lists unmerged sources by descending similarity, but by position as soon as a token is protected.
  void number_as_tome(uint64_t* unmerged, uint64_t* end) {
    int64_t row = 0;
    if (p.protect.data == nullptr) {
      std::sort(unmerged, end, std::greater<uint64_t>());
      for (; unmerged < end; ++unmerged) owner_[sources_[source_of(*unmerged)]] = row++;
    } else {
      for (int32_t n = 0; n < segment_.tokens; n += 2)
        if (owner_[n] >= 0) owner_[n] = row++;
    }
    for (int32_t n = 1; n < segment_.tokens; n += 2) owner_[n] = row++;
  }

  const BipartiteMatchParams& p;
  const int64_t b;
  const Segment segment_;
  Scratch<int32_t> sources_, destinations_;  // tokens
  int32_t num_sources_ = 0, num_destinations_ = 0;
  Scratch<float> source_units_, destination_units_;  // [sources / kGroup, C, kGroup], [destinations, C]
  Scratch<float> best_;                              // [sources]
  Scratch<int32_t> partner_;                         // [sources], its destination
  int64_t* const owner_;                             // [N]
};

// Moves the rows of every segment behind those of the segments before it; cu_merged holds their numbers.
void number_segments(const BipartiteMatchParams& p) {
  p.cu_merged[0] = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int32_t n = p.cu_seqlens[b]; n < p.cu_seqlens[b + 1]; ++n)
      if (p.owner[n] >= 0) p.owner[n] += p.cu_merged[b];
    p.cu_merged[b + 1] += p.cu_merged[b];
  }
}

}  // namespace

void bipartite_match_cpu(const BipartiteMatchParams& p) {
  parallel_items(p.batch, [&](int64_t b) {
    const int32_t rows = Matcher(p, b).run();
    if (p.cu_merged != nullptr) p.cu_merged[b + 1] = rows;
  });
  if (p.cu_merged != nullptr) number_segments(p);
}

}  // namespace VTK_ISA
}  // namespace vtk
