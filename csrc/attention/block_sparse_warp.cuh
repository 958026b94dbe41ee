// The register tile of a warp in attention: 16 rows against kKeys rows of another matrix, and kOutDepth channels of
// sums.
//
// MmaTile: mma m16n8k16 for float16 and bfloat16; weights go from the accumulators of one product into the A operand of
// the next without leaving their lanes. FmaTile: FFMA, so that float32 products are float32 sums; weights are broadcast
// by shuffles. Both keep scores and sums as [rows][columns] of the lane, at row(i), column(j), channel(c). Rows in
// shared memory are kDepth elements and 16 bytes, which keeps ldmatrix and float4 reads free of bank conflicts.
#pragma once
#include "device/code_pairs.cuh"
#include "device/convert.cuh"
#include "device/ptx.cuh"
#include "device/reduce.cuh"

namespace vtk {
namespace {

template <class T, int kDepth, int kKeys, int kOutDepth = kDepth>
struct MmaTile {
  static constexpr int kRows = 2, kRowLanes = 4, kColumns = kKeys / 4, kChannels = kOutDepth / 4;
  static constexpr int kRowBytes = kDepth * sizeof(T) + 16;
  static constexpr int kSteps = kDepth / 16;
  using Scores = float[kRows][kColumns];
  using Sums = float[kRows][kChannels];
  struct Fragment {  // 16 rows by 16 channels
    uint32_t words[4];
  };

  __device__ static int row(int i) { return threadIdx.x % 32 / 4 + 8 * i; }
  __device__ static int column(int j) { return j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2; }
  __device__ static int channel(int c) { return column(c); }

  __device__ static Fragment load(const unsigned char* sA, int step) {
    const int lane = threadIdx.x % 32;
    Fragment a;
    ptx::ldmatrix_x4(a.words, sA + lane % 16 * kRowBytes + lane / 16 * 16 + step * 32);
    return a;
  }

  // to = a b^T; fragment(step): of a
  template <class FragmentAt>
  __device__ static void multiply_transposed(Scores& to, const FragmentAt& fragment, const unsigned char* sB) {
    const int lane = threadIdx.x % 32;
    const unsigned char* b_row = sB + (lane / 16 * 8 + lane % 8) * kRowBytes + lane / 8 % 2 * 16;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) to[i][j] = 0.0f;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const Fragment a = fragment(step);
#pragma unroll
      for (int pair = 0; pair < kKeys / 16; ++pair) {  // 16 rows of b: two fragments of B
        uint32_t b[4];
        ptx::ldmatrix_x4(b, b_row + pair * 16 * kRowBytes + step * 32);
        accumulate(to, 4 * pair, a.words, {b[0], b[1]});
        accumulate(to, 4 * pair + 2, a.words, {b[2], b[3]});
      }
    }
  }
  __device__ static void multiply_transposed(Scores& to, const unsigned char* sA, const unsigned char* sB) {
    multiply_transposed(to, [&](int step) { return load(sA, step); }, sB);
  }

  // to += scores b
  __device__ static void multiply(Sums& to, const Scores& scores, const unsigned char* sB) {
    const int lane = threadIdx.x % 32;
    const unsigned char* b_row = sB + lane % 16 * kRowBytes + lane / 16 * 16;
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      const int j = 4 * step;
      const uint32_t a[4] = {pack_pair<T>(scores[0][j], scores[0][j + 1]), pack_pair<T>(scores[1][j], scores[1][j + 1]),
                             pack_pair<T>(scores[0][j + 2], scores[0][j + 3]),
                             pack_pair<T>(scores[1][j + 2], scores[1][j + 3])};
#pragma unroll
      for (int pair = 0; pair < kOutDepth / 16; ++pair) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, b_row + step * 16 * kRowBytes + pair * 32);
        accumulate(to, 4 * pair, a, {b[0], b[1]});
        accumulate(to, 4 * pair + 2, a, {b[2], b[3]});
      }
    }
  }

 private:
  // Columns j and j + 1 of both rows += a b.
  template <int kWidth>
  __device__ static void accumulate(float (&to)[kRows][kWidth], int j, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    float c[4] = {to[0][j], to[0][j + 1], to[1][j], to[1][j + 1]};
    ptx::mma_m16n8k16<T>(c, a, b);
    to[0][j] = c[0], to[0][j + 1] = c[1], to[1][j] = c[2], to[1][j + 1] = c[3];
  }
};

// Eight lanes share 4 rows; columns and groups of 4 channels are interleaved over them.
template <int kDepth, int kKeys, int kOutDepth = kDepth>
struct FmaTile {
  static constexpr int kRows = 4, kRowLanes = 8, kColumns = kKeys / 8, kChannels = kOutDepth / 8;
  static constexpr int kRowBytes = kDepth * sizeof(float) + 16;
  using Scores = float[kRows][kColumns];
  using Sums = float[kRows][kChannels];

  __device__ static int row(int i) { return threadIdx.x % 32 / 8 * 4 + i; }
  __device__ static int column(int j) { return j * 8 + threadIdx.x % 8; }
  __device__ static int channel(int c) { return (c / 4 * 8 + threadIdx.x % 8) * 4 + c % 4; }

  // to = a b^T
  __device__ static void multiply_transposed(Scores& to, const unsigned char* sA, const unsigned char* sB) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) to[i][j] = 0.0f;
#pragma unroll 1
    for (int d = 0; d < kDepth; d += 4) {
      float4 a[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) a[i] = *reinterpret_cast<const float4*>(sA + row(i) * kRowBytes + d * 4);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const float4 b = *reinterpret_cast<const float4*>(sB + column(j) * kRowBytes + d * 4);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          to[i][j] = fmaf(a[i].x, b.x, to[i][j]);
          to[i][j] = fmaf(a[i].y, b.y, to[i][j]);
          to[i][j] = fmaf(a[i].z, b.z, to[i][j]);
          to[i][j] = fmaf(a[i].w, b.w, to[i][j]);
        }
      }
    }
  }

  // to += scores b
  __device__ static void multiply(Sums& to, const Scores& scores, const unsigned char* sB) {
    const int lane = threadIdx.x % 32;
    const unsigned char* b_row = sB + lane % 8 * 16;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll 1
      for (int owner = 0; owner < 8; ++owner) {
        float weight[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) weight[i] = __shfl_sync(kAllLanes, scores[i][j], lane / 8 * 8 + owner);
#pragma unroll
        for (int c = 0; c < kChannels; c += 4) {
          const float4 b = *reinterpret_cast<const float4*>(b_row + (j * 8 + owner) * kRowBytes + c / 4 * 128);
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            to[i][c] = fmaf(weight[i], b.x, to[i][c]);
            to[i][c + 1] = fmaf(weight[i], b.y, to[i][c + 1]);
            to[i][c + 2] = fmaf(weight[i], b.z, to[i][c + 2]);
            to[i][c + 3] = fmaf(weight[i], b.w, to[i][c + 3]);
          }
        }
      }
    }
  }
};

template <class T, int kDepth, int kKeys, int kOutDepth = kDepth>
struct TileOf {
  using Type = MmaTile<T, kDepth, kKeys, kOutDepth>;
};
template <int kDepth, int kKeys, int kOutDepth>
struct TileOf<float, kDepth, kKeys, kOutDepth> {
  using Type = FmaTile<kDepth, kKeys, kOutDepth>;
};

// What a warp of the forward pass holds: scores and output of 16 queries and, where registers allow, these.
template <class T, int kDepth, int kKeys>
struct MmaWarp : MmaTile<T, kDepth, kKeys> {
  using Tile = MmaTile<T, kDepth, kKeys>;
  static constexpr bool kHoldsQuery = kDepth <= 128;  // more would not fit the registers
  typename Tile::Scores score;
  typename Tile::Sums out;
  typename Tile::Fragment query[kHoldsQuery ? Tile::kSteps : 1];

  // sQ: the warp's rows. Where they are held, they may be overwritten afterwards.
  __device__ void hold_query(const unsigned char* sQ) {
    if constexpr (kHoldsQuery) {
#pragma unroll
      for (int step = 0; step < Tile::kSteps; ++step) query[step] = Tile::load(sQ, step);
    }
  }
  __device__ void multiply_keys(const unsigned char* sQ, const unsigned char* sK) {
    Tile::multiply_transposed(
        score, [&](int step) { return kHoldsQuery ? query[kHoldsQuery ? step : 0] : Tile::load(sQ, step); }, sK);
  }
  __device__ void multiply_values(const unsigned char* sV) { Tile::multiply(out, score, sV); }
};

template <int kDepth, int kKeys>
struct FmaWarp : FmaTile<kDepth, kKeys> {
  using Tile = FmaTile<kDepth, kKeys>;
  static constexpr bool kHoldsQuery = false;
  typename Tile::Scores score;
  typename Tile::Sums out;

  __device__ void hold_query(const unsigned char*) {}
  __device__ void multiply_keys(const unsigned char* sQ, const unsigned char* sK) {
    Tile::multiply_transposed(score, sQ, sK);
  }
  __device__ void multiply_values(const unsigned char* sV) { Tile::multiply(out, score, sV); }
};

template <class T, int kDepth, int kKeys>
struct WarpOf {
  using Type = MmaWarp<T, kDepth, kKeys>;
};
template <int kDepth, int kKeys>
struct WarpOf<float, kDepth, kKeys> {
  using Type = FmaWarp<kDepth, kKeys>;
};

}  // namespace
}  // namespace vtk
