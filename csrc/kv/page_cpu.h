// Matrices of a page in scratch memory: what packing and unpacking on the CPU share. Include only from *_cpu.cpp files.
#pragma once
#include <algorithm>

#include "common/dot_tile.h"
#include "common/narrow.h"
#include "common/simd.h"
#include "kv/quantise.h"

namespace vtk {
namespace VTK_ISA {
namespace {

// Rows of scratch matrices are whole vectors of the widest instruction set.
inline int32_t padded(int32_t count) { return round_up(count, 16); }

struct CpuHalf {
  static uint16_t from(float x) { return to_half(x).bits; }
  static float to(uint16_t bits) { return to_float(f16{bits}); }
};

// to(c)[r] = from(r)[c] for r < rows, c < cols. Rows are read and written in whole vectors.
template <class From, class To>
void transpose_matrix(int32_t rows, int32_t cols, const From& from, const To& to) {
  for (int32_t r = 0; r < rows; r += kLanes)
    for (int32_t c = 0; c < cols; c += kLanes) {
      f32v v[kLanes];
      for (int i = 0; i < kLanes; ++i) v[i] = load(from(std::min(r + i, rows - 1)) + c);
      transpose(v);
      for (int i = 0; i < std::min(kLanes, cols - c); ++i) store(to(c + i) + r, v[i]);
    }
}

// The transform of a mix over `count` rows.
inline void hadamard(float* x, int32_t count, int32_t stride) {
  for (int32_t first = 0, block; first < count; first += block) {
    block = hadamard_block(count - first);
    float* rows = x + int64_t{first} * stride;
    for (int32_t step = 1; step < block; step *= 2)
      for (int32_t r = 0; r < block; ++r) {
        if ((r & step) != 0) continue;
        float *low = rows + int64_t{r} * stride, *high = low + int64_t{step} * stride;
        for (int32_t l = 0; l < stride; l += kLanes) {
          const f32v a = load(low + l), b = load(high + l);
          store(low + l, a + b);
          store(high + l, a - b);
        }
      }
    const float norm = hadamard_norm(block);
    for (int64_t i = 0; i < int64_t{block} * stride; i += kLanes) store(rows + i, load(rows + i) * norm);
  }
}

template <class T>
void load_row(const T* from, int32_t count, float* to) {
  int32_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store(to + i, load_partial(from + i, count - i));
}

template <class T>
void store_row(const float* from, int32_t count, T* to) {
  int32_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store_partial(to + i, load(from + i), count - i);
}

inline u32v load_words(const void* from, int32_t count = kLanes) {
  u32v v = {};
  std::memcpy(&v, from, std::min(count, kLanes) * sizeof(uint32_t));
  return v;
}
inline void store_words(void* to, u32v v, int32_t count = kLanes) {
  std::memcpy(to, &v, std::min(count, kLanes) * sizeof(uint32_t));
}

inline int code_place(int bits, int i) { return bits * (i / 2) + 16 * (i % 2); }

}  // namespace
}  // namespace VTK_ISA
}  // namespace vtk
