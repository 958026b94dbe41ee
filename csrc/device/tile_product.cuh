// The main loop of kernels that reduce a matrix of dot products without storing it: 64 stationary rows times a stream
// of 64-row tiles, each product of tiles handed to the caller in registers.
//
// 4 warps; a warp owns 16 stationary rows. float16 and bfloat16: mma m16n8k16; float32: FFMA, so that float32 products
// are float32 sums. Depth is taken in chunks of 256 bytes a row; the next chunk arrives by cp.async meanwhile.
//
//   shared  4 tiles of 64 * (256 + 16) bytes: 68 KiB. The 16 bytes keep ldmatrix and float4 reads free of conflicts.
#pragma once
#include <cstdint>

#include "device/ptx.cuh"

namespace vtk {

inline constexpr int kTile = 64;  // rows of a tile
inline constexpr int kTileThreads = 128;
inline constexpr int kTileRowBytes = 256;  // of a tile's depth chunk
inline constexpr int kPaddedBytes = kTileRowBytes + 16;
inline constexpr int kTileBytes = kTile * kPaddedBytes;
inline constexpr int kTileProductBytes = 4 * kTileBytes;  // dynamic shared memory
inline constexpr int kTileBlocks = 3;                     // of a multiprocessor of sm_90, which that memory allows

// 64 x 64 products by FFMA. Eight lanes share 4 stationary rows; the streamed rows are interleaved over the lanes.
struct FloatTile {
  static constexpr int kRows = 4, kColumns = 8, kRowLanes = 8, kDepthStep = 4;
  float value[kRows][kColumns];
  __device__ static int row(int i) { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 8 * 4 + i; }
  __device__ static int column(int j) { return j * 8 + threadIdx.x % 8; }

  __device__ void multiply(const unsigned char* sA, const unsigned char* sB, int depth) {
    for (int d = 0; d < depth; d += 4) {
      float4 a[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) a[i] = *reinterpret_cast<const float4*>(sA + row(i) * kPaddedBytes + d * 4);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        float4 b = *reinterpret_cast<const float4*>(sB + column(j) * kPaddedBytes + d * 4);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          value[i][j] = fmaf(a[i].x, b.x, value[i][j]);
          value[i][j] = fmaf(a[i].y, b.y, value[i][j]);
          value[i][j] = fmaf(a[i].z, b.z, value[i][j]);
          value[i][j] = fmaf(a[i].w, b.w, value[i][j]);
        }
      }
    }
  }
};

// 64 x 64 products by tensor cores: per warp one 16-row fragment of A against eight 8-column fragments of B.
template <class T>
struct MmaTile {
  static constexpr int kRows = 2, kColumns = 16, kRowLanes = 4, kDepthStep = 16;
  float value[kRows][kColumns];
  __device__ static int row(int i) { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * i; }
  __device__ static int column(int j) { return j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2; }

  __device__ void multiply(const unsigned char* sA, const unsigned char* sB, int depth) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned char* a_row = sA + (warp * 16 + lane % 16) * kPaddedBytes + lane / 16 * 16;
    const unsigned char* b_row = sB + (lane / 16 * 8 + lane % 8) * kPaddedBytes + lane / 8 % 2 * 16;
    for (int d = 0; d < depth; d += 16) {
      uint32_t a[4];
      ptx::ldmatrix_x4(a, a_row + d * 2);
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {  // 16 streamed rows: two fragments of B
        uint32_t b[4];
        ptx::ldmatrix_x4(b, b_row + pair * 16 * kPaddedBytes + d * 2);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int j = 4 * pair + 2 * half;
          float c[4] = {value[0][j], value[0][j + 1], value[1][j], value[1][j + 1]};
          ptx::mma_m16n8k16<T>(c, a, {b[2 * half], b[2 * half + 1]});
          value[0][j] = c[0], value[0][j + 1] = c[1], value[1][j] = c[2], value[1][j + 1] = c[3];
        }
      }
    }
  }
};

template <class T>
struct TileOf {
  using Type = MmaTile<T>;
};
template <>
struct TileOf<float> {
  using Type = FloatTile;
};

// Rows that lie a stride apart.
template <class T>
struct TileRows {
  const T* data;
  int64_t stride;
  int32_t count;
  bool aligned;  // rows start at multiples of 16 bytes and are a multiple of 16 bytes long
  __device__ const T* row(int32_t i) const { return data + i * stride; }
};

// Brings rows [first, first + 64), elements [depth, depth + 256 bytes) to a tile; zeros beyond the tensor. Rows is
// TileRows or something else with data, count, aligned and row(i).
template <class T, class Rows>
__device__ void load_tile(unsigned char* tile, const Rows& rows, int32_t first, int32_t depth, int32_t channels) {
  constexpr int kElements = 16 / sizeof(T), kVectors = kTileRowBytes / 16;
  for (int v = threadIdx.x; v < kTile * kVectors; v += kTileThreads) {
    const int32_t row = first + v / kVectors, d = depth + v % kVectors * kElements;
    unsigned char* to = tile + v / kVectors * kPaddedBytes + v % kVectors * 16;
    const bool present = row < rows.count && d < channels;
    const T* from = present ? rows.row(row) + d : rows.data;
    if (rows.aligned) {
      ptx::cp_async_16(to, from, present);
    } else {
      for (int i = 0; i < kElements; ++i) reinterpret_cast<T*>(to)[i] = present && d + i < channels ? from[i] : T(0.0f);
    }
  }
}

// value[i][j] of every pair of tiles: calls begin(tile, buffer) when a streamed tile starts to load, and
// reduce(tile, buffer, products) when its products are complete. `first` and `count` are streamed tiles. Another Tile
// than the product's brings another multiply.
template <class T, class Tile = typename TileOf<T>::Type, class Stationary, class Streamed, class Begin, class Reduce>
__device__ void stream_tiles(unsigned char* shared, const Stationary& stationary, int32_t stationary_first,
                             const Streamed& streamed, int32_t first, int32_t count, int32_t channels,
                             const Begin& begin, const Reduce& reduce) {
  constexpr int32_t kChunk = kTileRowBytes / sizeof(T);
  const int32_t chunks = (channels + kChunk - 1) / kChunk, steps = count * chunks;
  auto sStationary = [&](int32_t step) { return shared + (chunks == 1 ? 0 : step % 2) * kTileBytes; };
  auto sStreamed = [&](int32_t step) { return shared + (2 + step % 2) * kTileBytes; };
  auto issue = [&](int32_t step) {
    const int32_t tile = first + step / chunks, depth = step % chunks * kChunk;
    if (step % chunks == 0) begin(tile, step / chunks % 2);
    if (chunks > 1 || step == 0) load_tile<T>(sStationary(step), stationary, stationary_first, depth, channels);
    load_tile<T>(sStreamed(step), streamed, tile * kTile, depth, channels);
    ptx::cp_async_commit();
  };

  issue(0);
  Tile products;
  for (int32_t step = 0; step < steps; ++step) {
    // Load the next chunk while this one multiplies.
    if (step + 1 < steps) {
      issue(step + 1);
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    __syncthreads();
    const int32_t chunk = step % chunks, left = min(kChunk, channels - chunk * kChunk);
    if (chunk == 0) {
#pragma unroll
      for (int i = 0; i < Tile::kRows; ++i)
#pragma unroll
        for (int j = 0; j < Tile::kColumns; ++j) products.value[i][j] = 0.0f;
    }
    products.multiply(sStationary(step), sStreamed(step),
                      (left + Tile::kDepthStep - 1) / Tile::kDepthStep * Tile::kDepthStep);
    if (chunk == chunks - 1) reduce(first + step / chunks, step / chunks % 2, products);
    __syncthreads();  // before the buffers are filled again
  }
}

}  // namespace vtk
