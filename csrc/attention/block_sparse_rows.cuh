// Rows between global and shared memory in attention, 16 bytes at a time.
//
// P: T, kRowBytes in shared memory, kElements of 16 bytes, kVectors of 16 bytes a row.
#pragma once
#include "attention/block_sparse_key_tiles.cuh"
#include "device/convert.cuh"
#include "device/ptx.cuh"

namespace vtk {
namespace {

constexpr int power_of_two_from(int n) { return n <= 1 ? 1 : 2 * power_of_two_from((n + 1) / 2); }

template <class T>
__device__ const T* head_of(const HeadsView& x, int32_t b, int32_t h) {
  return static_cast<const T*>(x.data) + b * x.stride_batch + h * x.stride_head;
}

// Elements [d, d + 16 bytes) of a row to shared memory; zeros beyond D, and where there is no row (null).
template <bool kAligned, class T>
__device__ void copy_vector(unsigned char* to, const T* row, const T* readable, int32_t d, int32_t depth) {
  const bool present = row != nullptr && d < depth;
  if constexpr (kAligned) {
    ptx::cp_async_16(to, present ? row + d : readable, present);
  } else {
#pragma unroll 1
    for (int i = 0; i < 16 / static_cast<int>(sizeof(T)); ++i)
      reinterpret_cast<T*>(to)[i] = present && d + i < depth ? row[d + i] : T(0.0f);
  }
}

// copy(row, offset of 16 bytes in a tile, their first element) over a tile, by all threads of the block.
template <class P, int kUnroll, class Copy>
__device__ void for_each_vector(int rows, const Copy& copy) {
  constexpr int kLanes = power_of_two_from(P::kVectors);
  const int vector = threadIdx.x % kLanes;
  if (vector >= P::kVectors) return;
#pragma unroll kUnroll
  for (int row = threadIdx.x / kLanes; row < rows; row += blockDim.x / kLanes)
    copy(row, row * P::kRowBytes + vector * 16, vector * P::kElements);
}

// A head of two matrices whose rows are copied together: keys and values, or queries and gradients.
template <class T>
struct HeadPair {
  const T *first, *second;
  int64_t first_stride, second_stride;
};

// Row row_at(i) of both to row i of two tiles that lie `apart` bytes from each other; zeros where it is kAbsent.
template <class P, bool kAligned, int kUnroll, class RowAt>
__device__ void copy_pair(const HeadPair<typename P::T>& from, int32_t depth, int rows, unsigned char* to, int apart,
                          const RowAt& row_at) {
  for_each_vector<P, kAligned ? kUnroll : 1>(rows, [&](int row, int offset, int d) {
    const int64_t n = row_at(row);
    const bool exists = n != kAbsent;
    copy_vector<kAligned>(to + offset, exists ? from.first + n * from.first_stride : nullptr, from.first, d, depth);
    copy_vector<kAligned>(to + apart + offset, exists ? from.second + n * from.second_stride : nullptr, from.second, d,
                          depth);
  });
  ptx::cp_async_commit();
}

// Tiles through a block: warp 0 lists tile i + 2, all threads copy tile i + 1, and multiply tile i, with one barrier a
// tile. list(tile); copy(tile, stage); multiply(tile, stage): stage is 0 or 1 in turn. Copies committed before are
// waited for too; when it returns, shared memory is free.
template <class Tile, class List, class Copy, class Multiply>
__device__ void for_each_tile(Tile (&sTiles)[3], const List& list, const Copy& copy, const Multiply& multiply) {
  const bool lists = threadIdx.x < 32;
  if (lists) {
    list(sTiles[0]);
    list(sTiles[1]);
  }
  __syncthreads();
  if (sTiles[0].state != TileState::kEnd) copy(sTiles[0], 0);
  int now = 0, stage = 0;
  while (sTiles[now].state != TileState::kEnd) {
    // This tile has come, and the one before is done with.
    ptx::cp_async_wait<0>();
    __syncthreads();
    const int next = now == 2 ? 0 : now + 1;
    if (lists) list(sTiles[next == 2 ? 0 : next + 1]);
    stage ^= 1;
    if (sTiles[next].state != TileState::kEnd) copy(sTiles[next], stage);
    multiply(sTiles[now], stage ^ 1);
    now = next;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
}

// Stores kCount channels, of which `left` exist; aligned: all of them do, at a multiple of 16 bytes.
template <class T, int kCount>
__device__ void store_channels(T* to, const float (&x)[kCount], int32_t left, bool aligned) {
  if (aligned) {
    __align__(16) T y[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) y[i] = from_float<T>(x[i]);
#pragma unroll
    for (int i = 0; i < kCount * static_cast<int>(sizeof(T)) / 16; ++i)
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(y)[i];
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (i < left) to[i] = from_float<T>(x[i]);
  }
}

}  // namespace
}  // namespace vtk
