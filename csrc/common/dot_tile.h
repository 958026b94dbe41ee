// The register tile of the matching and attention kernels: dot products of a group of tokens, a lane each, with six
// rows whose elements are broadcast: 12 accumulators, 8 loads for 12 FMAs a channel. Every dot product is summed in the
// order of the channels. Include only from *_cpu.cpp files.
#pragma once
#include "common/simd.h"

namespace vtk {
namespace VTK_ISA {

constexpr int kGroup = 2 * kLanes;  // tokens of a tile
constexpr int kTileRows = 6;

// Lane j of v[i] and lane i of v[j] change places.
template <int kStep = 1>
static inline void transpose(f32v (&v)[kLanes]) {
  if constexpr (kStep < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if ((i & kStep) == 0) exchange<kStep>(v[i], v[i + kStep], std::make_integer_sequence<int, kLanes>());
    transpose<2 * kStep>(v);
  }
}

static inline void multiply_add(f32v& sum, float a, f32v b) { sum += a * b; }

// dot[i][v] = row i . vector v of the group; columns is [channels, kGroup]. Of floats, or of pairs (bf16_pairs.h).
template <class Element>
static inline void dot_tile(const Element* const* rows, const Element* columns, int32_t channels,
                            f32v (&dot)[kTileRows][2]) {
#pragma GCC unroll 6
  for (int i = 0; i < kTileRows; ++i) dot[i][0] = dot[i][1] = f32v{};
  const Element *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3], *r4 = rows[4], *r5 = rows[5];
  for (int32_t c = 0; c < channels; ++c) {
    const Element row[kTileRows] = {r0[c], r1[c], r2[c], r3[c], r4[c], r5[c]};
    const auto low = load(columns + int64_t{c} * kGroup), high = load(columns + int64_t{c} * kGroup + kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i) {
      multiply_add(dot[i][0], row[i], low);
      multiply_add(dot[i][1], row[i], high);
    }
  }
}

}  // namespace VTK_ISA
}  // namespace vtk
