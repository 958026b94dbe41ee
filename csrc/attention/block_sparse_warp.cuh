// What a warp of block_sparse_attention holds and multiplies: 16 query rows against kKeys keys of a tile.
//
// MmaWarp: mma m16n8k16 for float16 and bfloat16; the weights go from the accumulators of the first product into the A
// operand of the second without leaving their lanes. FmaWarp: FFMA, so that float32 products are float32 sums; weights
// are broadcast by shuffles. Both keep score and out as [rows][columns] of the lane, at row(i), column(j), channel(c).
// Rows in shared memory are kDepth elements and 16 bytes, which keeps ldmatrix and float4 reads free of bank conflicts.
#pragma once
#include "device/convert.cuh"
#include "device/ptx.cuh"
#include "device/reduce.cuh"

namespace vtk {
namespace {

__device__ inline uint32_t pack_pair(__half, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline uint32_t pack_pair(__nv_bfloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <class T, int kDepth, int kKeys>
struct MmaWarp {
  static constexpr int kRows = 2, kRowLanes = 4, kColumns = kKeys / 4, kChannels = kDepth / 4;
  static constexpr int kRowBytes = kDepth * sizeof(T) + 16;
  static constexpr bool kHoldsQuery = kDepth <= 128;  // more would not fit the registers
  float score[kRows][kColumns];
  float out[kRows][kChannels];
  uint32_t query[kHoldsQuery ? kDepth / 16 : 1][4];

  __device__ static int row(int i) { return threadIdx.x % 32 / 4 + 8 * i; }
  __device__ static int column(int j) { return j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2; }
  __device__ static int channel(int c) { return column(c); }

  __device__ static void load_query(uint32_t (&a)[4], const unsigned char* sQ, int step) {
    const int lane = threadIdx.x % 32;
    ptx::ldmatrix_x4(a, sQ + lane % 16 * kRowBytes + lane / 16 * 16 + step * 32);
  }

  // sQ: the warp's rows. Where they are held, they may be overwritten afterwards.
  __device__ void hold_query(const unsigned char* sQ) {
    if constexpr (kHoldsQuery) {
#pragma unroll
      for (int step = 0; step < kDepth / 16; ++step) load_query(query[step], sQ, step);
    }
  }

  // score = q k^T
  __device__ void multiply_keys(const unsigned char* sQ, const unsigned char* sK) {
    const int lane = threadIdx.x % 32;
    const unsigned char* k_row = sK + (lane / 16 * 8 + lane % 8) * kRowBytes + lane / 8 % 2 * 16;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) score[i][j] = 0.0f;
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
      uint32_t read[4];
      if constexpr (!kHoldsQuery) load_query(read, sQ, step);
      const auto& a = kHoldsQuery ? query[kHoldsQuery ? step : 0] : read;
#pragma unroll
      for (int pair = 0; pair < kKeys / 16; ++pair) {  // 16 keys: two fragments of B
        uint32_t b[4];
        ptx::ldmatrix_x4(b, k_row + pair * 16 * kRowBytes + step * 32);
        accumulate(score, 4 * pair, a, {b[0], b[1]});
        accumulate(score, 4 * pair + 2, a, {b[2], b[3]});
      }
    }
  }

  // out += score v
  __device__ void multiply_values(const unsigned char* sV) {
    const int lane = threadIdx.x % 32;
    const unsigned char* v_row = sV + lane % 16 * kRowBytes + lane / 16 * 16;
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      const int j = 4 * step;
      const uint32_t a[4] = {pack_pair(T(), score[0][j], score[0][j + 1]), pack_pair(T(), score[1][j], score[1][j + 1]),
                             pack_pair(T(), score[0][j + 2], score[0][j + 3]),
                             pack_pair(T(), score[1][j + 2], score[1][j + 3])};
#pragma unroll
      for (int pair = 0; pair < kDepth / 16; ++pair) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, v_row + step * 16 * kRowBytes + pair * 32);
        accumulate(out, 4 * pair, a, {b[0], b[1]});
        accumulate(out, 4 * pair + 2, a, {b[2], b[3]});
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

// Eight lanes share 4 rows; keys and groups of 4 channels are interleaved over them.
template <int kDepth, int kKeys>
struct FmaWarp {
  static constexpr int kRows = 4, kRowLanes = 8, kColumns = kKeys / 8, kChannels = kDepth / 8;
  static constexpr int kRowBytes = kDepth * sizeof(float) + 16;
  static constexpr bool kHoldsQuery = false;
  float score[kRows][kColumns];
  float out[kRows][kChannels];

  __device__ static int row(int i) { return threadIdx.x % 32 / 8 * 4 + i; }
  __device__ static int column(int j) { return j * 8 + threadIdx.x % 8; }
  __device__ static int channel(int c) { return (c / 4 * 8 + threadIdx.x % 8) * 4 + c % 4; }

  __device__ void hold_query(const unsigned char*) {}

  __device__ void multiply_keys(const unsigned char* sQ, const unsigned char* sK) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) score[i][j] = 0.0f;
#pragma unroll 1
    for (int d = 0; d < kDepth; d += 4) {
      float4 q[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) q[i] = *reinterpret_cast<const float4*>(sQ + row(i) * kRowBytes + d * 4);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const float4 k = *reinterpret_cast<const float4*>(sK + column(j) * kRowBytes + d * 4);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          score[i][j] = fmaf(q[i].x, k.x, score[i][j]);
          score[i][j] = fmaf(q[i].y, k.y, score[i][j]);
          score[i][j] = fmaf(q[i].z, k.z, score[i][j]);
          score[i][j] = fmaf(q[i].w, k.w, score[i][j]);
        }
      }
    }
  }

  __device__ void multiply_values(const unsigned char* sV) {
    const int lane = threadIdx.x % 32;
    const unsigned char* v_row = sV + lane % 8 * 16;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll 1
      for (int owner = 0; owner < 8; ++owner) {
        float weight[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) weight[i] = __shfl_sync(kAllLanes, score[i][j], lane / 8 * 8 + owner);
#pragma unroll
        for (int c = 0; c < kChannels; c += 4) {
          const float4 v = *reinterpret_cast<const float4*>(v_row + (j * 8 + owner) * kRowBytes + c / 4 * 128);
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            out[i][c] = fmaf(weight[i], v.x, out[i][c]);
            out[i][c + 1] = fmaf(weight[i], v.y, out[i][c + 1]);
            out[i][c + 2] = fmaf(weight[i], v.z, out[i][c + 2]);
            out[i][c + 3] = fmaf(weight[i], v.w, out[i][c + 3]);
          }
        }
      }
    }
  }
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
