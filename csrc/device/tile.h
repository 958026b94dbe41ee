// Index arithmetic of tiles, on the host and on the device. Arguments are not negative, divisors at least 1.
#pragma once
#include <cstdint>

#include "device/host_device.h"

namespace vtk {

template <class T>
VTK_HOST_DEVICE constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

template <class T>
VTK_HOST_DEVICE constexpr T round_up(T x, T multiple) {
  return ceil_div(x, multiple) * multiple;
}

struct Range {
  int32_t begin, end;
  VTK_HOST_DEVICE constexpr int32_t size() const { return end - begin; }
};

// Tile number `tile` of [0, total); the last one may be short.
VTK_HOST_DEVICE constexpr Range tile_range(int32_t tile, int32_t tile_size, int32_t total) {
  const int64_t begin = int64_t{tile} * tile_size, end = begin + tile_size;
  return {static_cast<int32_t>(begin < total ? begin : total), static_cast<int32_t>(end < total ? end : total)};
}

// The part of [0, count) that split number `split` of `splits` works on: whole units (the last one may be short), as
// equal as can be, longer parts first. Boundaries depend on the arguments alone, so a reduction over the splits in
// order has the same bits whatever ran beside it.
VTK_HOST_DEVICE constexpr Range split_range(int32_t count, int32_t splits, int32_t split, int32_t unit = 1) {
  const int32_t units = ceil_div(count, unit), share = units / splits, longer = units % splits;
  const int32_t first = split * share + (split < longer ? split : longer);
  const Range begin = tile_range(first, unit, count);
  const Range end = tile_range(first + share + (split < longer ? 1 : 0), unit, count);
  return {begin.begin, end.begin};
}

// Grouped-query attention: the `group` query heads of one key head share its tile, as rows side by side, so that the
// rows of one query stand together and a causal mask is a function of row / group.
struct PackedRow {
  int32_t query, head;  // head within the group
};
VTK_HOST_DEVICE constexpr PackedRow packed_row(int32_t row, int32_t group) { return {row / group, row % group}; }
VTK_HOST_DEVICE constexpr int32_t row_of(PackedRow r, int32_t group) { return r.query * group + r.head; }

// How many keys a query sees under a causal mask aligned at the bottom right: the last query sees all of them.
VTK_HOST_DEVICE constexpr int32_t visible_keys(int32_t query, int32_t num_queries, int32_t num_keys) {
  const int32_t visible = num_keys - num_queries + query + 1;
  return visible < 0 ? 0 : visible;
}

}  // namespace vtk
