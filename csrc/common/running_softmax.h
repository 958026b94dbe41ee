// The softmax of rows whose logits come a tile at a time, and the merge of rows whose keys were cut into parts. Logits
// are in powers of two. Include only from *_cpu.cpp files, which define VTK_ISA.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/simd.h"

namespace vtk {
namespace VTK_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// What one part of a row's keys leaves: rows of weighted values, their maxima and sums.
struct PartialRows {
  float* values;  // [rows][stride]
  float* most;    // [rows]
  float* sum;     // [rows], of the weights
};

// Turns the logits of a tile, whole vectors of them, into weights. `correct` is what the values so far are multiplied
// with. A maximum may miss a NaN; the sum does not.
inline void fold_logits(float* x, int32_t count, float& most, float& sum, float& correct) {
  f32v best = splat(most);
  for (int32_t i = 0; i < count; i += kLanes) best = max(load(x + i), best);
  const float now = max(best), shift = now == -kInfinity ? 0.0f : now;
  correct = most == now ? 1.0f : exp2_bounded(splat(most - now))[0];
  f32v total = {};
  for (int32_t i = 0; i < count; i += kLanes) {
    const f32v e = exp2_bounded(load(x + i) - shift);
    store(x + i, e);
    total += e;
  }
  sum = sum * correct + vtk::VTK_ISA::sum(total);
  most = now;
}

// Merges the parts of row r in their order into values [stride], whole vectors, unnormalised.
inline void merge_row(const PartialRows* parts, int64_t num_parts, int32_t r, int32_t stride, float* values,
                      float& most, float& sum) {
  most = -kInfinity, sum = 0.0f;
  for (int64_t i = 0; i < num_parts; ++i) most = std::max(most, parts[i].most[r]);
  std::fill_n(values, stride, 0.0f);
  for (int64_t i = 0; i < num_parts; ++i) {
    if (parts[i].sum[r] == 0.0f) continue;
    const float weight = parts[i].most[r] == most ? 1.0f : exp2_bounded(splat(parts[i].most[r] - most))[0];
    sum += weight * parts[i].sum[r];
    const float* from = parts[i].values + int64_t{r} * stride;
    for (int32_t d = 0; d < stride; d += kLanes) store(values + d, load(values + d) + weight * load(from + d));
  }
}

// 0 for a row without keys; a NaN is a sum too.
inline float inverse_sum(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }
inline float lse_of(float most, float sum) { return sum == 0.0f ? -kInfinity : (most + std::log2(sum)) * kLn2; }

}  // namespace
}  // namespace VTK_ISA
}  // namespace vtk
