// A rule says which keys a query sees in five numbers a head, so that no list is stored: sinks, a window, a stride.
//
// Positions count from the first key that exists. The query at position t sees the key at position j <= t if
//   j < sink,  or  j >= window_start(t),  or  stride > 0 and (j / 64 + phase + 1) mod stride = 0.
// Windows are whole units of keys, counted from the end of the sinks: unit 1 is a sliding window, a larger one blocks.
#pragma once
#include <cstdint>

#include "device/tile.h"

namespace vtk {
namespace {

constexpr int32_t kRuleNumbers = 5;
constexpr int32_t kRuleBlock = 64;  // keys of a strided block; keys of a range, at most

VTK_HOST_DEVICE constexpr int32_t at_least(int32_t x, int32_t least) { return x < least ? least : x; }
VTK_HOST_DEVICE constexpr int32_t at_most(int32_t x, int32_t most) { return x > most ? most : x; }

struct AttentionRule {
  int32_t sink, window, unit, stride, phase;

  // Over so many keys. CUDA sources clamp what the CPU reports.
  VTK_HOST_DEVICE static AttentionRule read(const int32_t* numbers, int32_t keys) {
    return {at_most(at_least(numbers[0], 0), keys), at_least(numbers[1], 1), at_least(numbers[2], 1),
            at_least(numbers[3], 0), at_least(numbers[4], 0)};
  }

  // Where the window of the query at position t begins: never within the sinks.
  VTK_HOST_DEVICE int32_t window_start(int32_t t) const {
    const int32_t units = t > sink ? (t - sink) / unit : 0;
    return sink + (units < window ? 0 : (units - window + 1) * unit);
  }
};

// What a block of queries sees, as ranges of at most kRuleBlock keys, no key twice: sinks, strided blocks, and what is
// neither of these in the window of any query. The causal mask of the last query is applied, no other.
struct RuleRanges {
  int32_t first_key;                // at position 0
  int32_t limit;                    // positions that the last query sees: [0, limit)
  int32_t sink;                     // of these, the sinks
  int32_t window;                   // where the first query's window begins
  int32_t stride, phase;            // blocks with number % stride == phase are strided blocks, with stride > 0
  int32_t first_strided;            // the first of them that is not all sinks
  int32_t sinks, strided, windows;  // ranges of each kind, in this order
  bool banded;                      // the queries' windows differ

  // Of queries from position `first` to position `last`; `first_key` is at position 0.
  VTK_HOST_DEVICE void open(const AttentionRule& rule, int32_t first, int32_t last, int32_t key) {
    first_key = key;
    limit = at_least(last + 1, 0);
    sink = at_most(rule.sink, limit);
    window = rule.window_start(first);
    banded = window != rule.window_start(last);
    stride = rule.stride;
    sinks = ceil_div(sink, kRuleBlock);
    strided = windows = 0;
    if (window < limit) windows = (limit - 1) / kRuleBlock - window / kRuleBlock + 1;
    if (stride == 0 || sink == limit) return;
    phase = stride - 1 - rule.phase % stride;
    const int32_t from = sink / kRuleBlock, behind = phase - from % stride, end = (limit - 1) / kRuleBlock + 1;
    const int64_t next = int64_t{from} + behind + (behind < 0 ? stride : 0);
    first_strided = static_cast<int32_t>(next < end ? next : end);
    if (first_strided < end) strided = (end - 1 - first_strided) / stride + 1;
  }

  VTK_HOST_DEVICE int32_t count() const { return sinks + strided + windows; }
  VTK_HOST_DEVICE int32_t first_window() const { return sinks + strided; }

  // The keys of a range; none where a window meets a strided block.
  VTK_HOST_DEVICE Range keys(int32_t range) const {
    if (range < sinks) return within(range, 0, sink);
    if (range < first_window()) return within(first_strided + (range - sinks) * stride, sink, limit);
    const int32_t block = window / kRuleBlock + range - first_window();
    const bool listed_before = strided > 0 && block % stride == phase;
    return within(block, window, listed_before ? window : limit);
  }

  // Keys of all ranges, at most.
  VTK_HOST_DEVICE int64_t num_keys() const {
    return int64_t{sink} + int64_t{strided} * kRuleBlock + (windows > 0 ? limit - window : 0);
  }

 private:
  VTK_HOST_DEVICE Range within(int32_t block, int32_t begin, int32_t end) const {
    const int32_t from = at_least(block * kRuleBlock, begin);
    const int32_t to = at_most(end - block * kRuleBlock, kRuleBlock) + block * kRuleBlock;
    return {first_key + from, first_key + at_least(to, from)};
  }
};

}  // namespace
}  // namespace vtk
