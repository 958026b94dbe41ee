// Squared Euclidean distances on CUDA: float32 differences of every type, so that equal tokens have distance 0 and a
// distance is the same from either side. NOTE: tensor cores would need |x|^2 + |y|^2 - 2 x y, which has neither.
#pragma once
#include <cstdint>

#include "device/convert.cuh"
#include "device/reduce.cuh"
#include "device/tile_product.cuh"
#include "merge/cluster_tokens.h"

namespace vtk {
namespace {

__device__ bool is_valid(const ClusterTokens& t, int32_t b, int32_t n) {
  return t.valid.data == nullptr || t.valid.data[b * t.valid.stride_row + n * t.valid.stride_col];
}

template <class T>
__device__ const T* token_row(const ClusterTokens& t, int32_t b, int32_t n) {
  return static_cast<const T*>(t.data) + b * t.stride_batch + n * t.stride_token;
}

// By one warp, in all its lanes.
template <class T>
__device__ float warp_squared_norm(const T* x, int32_t channels) {
  float sum = 0.0f;
  for (int32_t c = threadIdx.x % 32; c < channels; c += 32) sum = __fmaf_rn(to_float(x[c]), to_float(x[c]), sum);
  return warp_reduce(sum, Sum{});
}

template <class T>
__device__ float warp_squared_distance(const T* x, const T* y, int32_t channels) {
  float sum = 0.0f;
  for (int32_t c = threadIdx.x % 32; c < channels; c += 32) {
    const float difference = to_float(x[c]) - to_float(y[c]);
    sum = __fmaf_rn(difference, difference, sum);
  }
  return warp_reduce(sum, Sum{});
}

// Four elements from an address that is a multiple of their size.
__device__ inline float4 load_four(const float* x) { return *reinterpret_cast<const float4*>(x); }
template <class T>
__device__ float4 load_four(const T* x) {
  const uint2 bits = *reinterpret_cast<const uint2*>(x);
  T element[4];
  memcpy(static_cast<void*>(element), &bits, sizeof bits);
  return {to_float(element[0]), to_float(element[1]), to_float(element[2]), to_float(element[3])};
}

// 64 x 64 squared distances, for stream_tiles of device/tile_product.cuh.
template <class T>
struct DistanceTile : FloatTile {
  __device__ void multiply(const unsigned char* sA, const unsigned char* sB, int depth) {
    auto four = [](const unsigned char* tile, int row, int d) {
      return load_four(reinterpret_cast<const T*>(tile + row * kPaddedBytes) + d);
    };
    auto add = [](float& sum, float x, float y) { sum = __fmaf_rn(x - y, x - y, sum); };
    for (int d = 0; d < depth; d += kDepthStep) {
      float4 a[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) a[i] = four(sA, row(i), d);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const float4 b = four(sB, column(j), d);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          add(value[i][j], a[i].x, b.x);
          add(value[i][j], a[i].y, b.y);
          add(value[i][j], a[i].z, b.z);
          add(value[i][j], a[i].w, b.w);
        }
      }
    }
  }
};

}  // namespace
}  // namespace vtk
