// energy_scores on CUDA: three launches, no [N, N] in memory, no atomics, no host synchronisation.
//
//   prepare  1 / norm of every token, a warp a token; NaN where it is not usable
//   energy   block = (item, 64 tokens, part of the tiles of all tokens). Products of device/tile_product.cuh; a thread
//            adds f(cos) of its rows, the lanes of a row add up at the end
//   finish   thread = token: the parts in ascending order, over the number of usable tokens
//
// The cut into parts depends on the shape alone, so the bits do not depend on the device.
//
//   shared  the loop's 68 KiB and 512 bytes of inverse norms
//   bound   2 N^2 C operations and N^2 exponentials an item. NOTE: half of the pairs would do, as on the CPU, but sums
//           along the streamed side need a place in memory for every pair of tiles.
#include "score/energy_scores.h"

#include <algorithm>

#include "device/convert.cuh"
#include "device/launch.h"
#include "device/reduce.cuh"
#include "device/tile.h"
#include "device/tile_product.cuh"

namespace vtk {
namespace {

constexpr int kThreads = kTileThreads;
constexpr int kWarps = kThreads / 32;
constexpr float kLog2E = 1.44269504f;

__device__ float quiet_nan() { return __uint_as_float(0x7fffffffu); }
__device__ bool is_nan(float x) { return x != x; }

struct Plan {
  int32_t tiles, parts, part_tiles;  // 64 tokens each; blocks that share a row of tiles; tiles of each
  float* inverse;                    // [B, N]
  float* sums;                       // [B, parts, N]
  int64_t bytes;
};

Plan make_plan(const EnergyScoresParams& p) {
  Plan plan = {};
  plan.tiles = ceil_div(p.num_tokens, kTile);
  const int64_t blocks = int64_t{p.batch} * plan.tiles;
  plan.part_tiles =
      ceil_div(plan.tiles, static_cast<int32_t>(std::clamp<int64_t>(ceil_div(kFillBlocks, blocks), 1, plan.tiles)));
  plan.parts = ceil_div(plan.tiles, plan.part_tiles);
  const int64_t tokens = int64_t{p.batch} * p.num_tokens;
  plan.inverse = static_cast<float*>(p.workspace);
  plan.sums = plan.inverse + tokens;
  plan.bytes = tokens * (1 + plan.parts) * static_cast<int64_t>(sizeof(float));
  return plan;
}

__device__ bool is_valid(const EnergyScoresParams& p, int32_t b, int32_t n) {
  return p.valid.data == nullptr || p.valid.data[b * p.valid.stride_row + n * p.valid.stride_col];
}

// blockIdx.x = item * blocks of kWarps tokens + block.
template <class T>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const __grid_constant__ EnergyScoresParams p, const __grid_constant__ Plan plan) {
  const int32_t blocks = ceil_div(p.num_tokens, kWarps), b = blockIdx.x / blocks;
  const int32_t n = blockIdx.x % blocks * kWarps + threadIdx.x / 32;
  if (n >= p.num_tokens) return;
  const T* row = static_cast<const T*>(p.metric) + b * p.stride_batch + n * p.stride_token;
  float squared = 0.0f;
  for (int32_t c = threadIdx.x % 32; c < p.channels; c += 32)
    squared = __fmaf_rn(to_float(row[c]), to_float(row[c]), squared);
  squared = warp_reduce(squared, Sum{});
  if (threadIdx.x % 32 != 0) return;
  float inverse = squared >= kMinSquaredNorm ? __fdiv_rn(1.0f, __fsqrt_rn(squared)) : 0.0f;
  if (!(squared < INFINITY) || !is_valid(p, b, n)) inverse = quiet_nan();
  plan.inverse[static_cast<int64_t>(b) * p.num_tokens + n] = inverse;
}

__device__ float energy_of(const EnergyScoresParams& p, float cosine) {
  if (p.kind == EnergyKind::kGaussian) {
    const float distance = 1.0f - cosine;
    return exp2f(distance * distance * -p.sharpness);
  }
  const float above = cosine - p.margin;
  return above > 0.0f ? above : p.alpha * (exp2f(above * kLog2E) - 1.0f);
}

// blockIdx.x = (item * tiles + tile) * parts + part.
template <class T>
__global__ void __launch_bounds__(kThreads, kTileBlocks)
    energy_kernel(const __grid_constant__ EnergyScoresParams p, const __grid_constant__ Plan plan, bool aligned) {
  VTK_DYNAMIC_SHARED(shared);
  __shared__ float sInverse[2][kTile];
  using Tile = typename TileOf<T>::Type;
  const int32_t part = blockIdx.x % plan.parts, tile = blockIdx.x / plan.parts % plan.tiles;
  const int32_t b = blockIdx.x / plan.parts / plan.tiles;
  const float* gInverse = plan.inverse + static_cast<int64_t>(b) * p.num_tokens;
  const TileRows<T> rows = {static_cast<const T*>(p.metric) + b * p.stride_batch, p.stride_token, p.num_tokens,
                            aligned};

  float energy[Tile::kRows], inverse[Tile::kRows];
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    energy[i] = 0.0f;
    inverse[i] = gInverse[min(tile * kTile + Tile::row(i), p.num_tokens - 1)];
  }

  // Stream the tokens of the part.
  const int32_t first = part * plan.part_tiles, count = min(plan.part_tiles, plan.tiles - first);
  auto begin = [&](int32_t streamed, int32_t buffer) {
    if (threadIdx.x >= kTile) return;
    const int32_t n = streamed * kTile + threadIdx.x;
    sInverse[buffer][threadIdx.x] = n < p.num_tokens ? gInverse[n] : quiet_nan();
  };
  auto reduce = [&](int32_t, int32_t buffer, const Tile& products) {
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) {
      const float factor = sInverse[buffer][Tile::column(j)];
      if (is_nan(factor)) continue;
#pragma unroll
      for (int i = 0; i < Tile::kRows; ++i) energy[i] += energy_of(p, products.value[i][j] * inverse[i] * factor);
    }
  };
  stream_tiles<T>(shared, rows, tile * kTile, rows, first, count, p.channels, begin, reduce);

  // Add up the lanes of a row.
  float* gSums = plan.sums + (static_cast<int64_t>(b) * plan.parts + part) * p.num_tokens;
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    const float total = warp_reduce<Tile::kRowLanes>(energy[i], Sum{});
    const int32_t n = tile * kTile + Tile::row(i);
    if (threadIdx.x % Tile::kRowLanes == 0 && n < p.num_tokens) gSums[n] = total;
  }
}

// blockIdx.x = item * blocks of kThreads tokens + block.
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ EnergyScoresParams p, const __grid_constant__ Plan plan) {
  __shared__ int32_t sWarps[kWarps];
  const int32_t blocks = ceil_div(p.num_tokens, kThreads), b = blockIdx.x / blocks;
  const int32_t n = blockIdx.x % blocks * kThreads + threadIdx.x;
  const float* gInverse = plan.inverse + static_cast<int64_t>(b) * p.num_tokens;
  int32_t usable = 0;
  for (int32_t i = threadIdx.x; i < p.num_tokens; i += kThreads) usable += !is_nan(gInverse[i]);
  usable = block_reduce<kThreads>(usable, Sum{}, sWarps);
  if (n >= p.num_tokens) return;
  float total = 0.0f;
  for (int32_t part = 0; part < plan.parts; ++part)
    total += plan.sums[(static_cast<int64_t>(b) * plan.parts + part) * p.num_tokens + n];
  float energy = __fdiv_rn(total, static_cast<float>(usable)) * p.scale;
  if (is_nan(gInverse[n])) energy = is_valid(p, b, n) ? quiet_nan() : -INFINITY;
  p.out[static_cast<int64_t>(b) * p.num_tokens + n] = energy;
}

template <class T>
cudaError_t run(const EnergyScoresParams& p, cudaStream_t stream) {
  const Plan plan = make_plan(p);
  const uint64_t bits = reinterpret_cast<uint64_t>(p.metric) |
                        (static_cast<uint64_t>(p.stride_batch) | p.stride_token | p.channels) * sizeof(T);
  const unsigned batch = static_cast<unsigned>(p.batch);
  LaunchShape shape;
  shape.block = dim3(kThreads);
  shape.grid = dim3(batch * ceil_div(p.num_tokens, kWarps));
  cudaError_t error = launch(prepare_kernel<T>, shape, stream, p, plan);
  if (error != cudaSuccess) return error;
  shape.grid = dim3(batch * plan.tiles * plan.parts);
  shape.shared_bytes = kTileProductBytes;
  error = launch(energy_kernel<T>, shape, stream, p, plan, bits % 16 == 0);
  if (error != cudaSuccess) return error;
  shape.grid = dim3(batch * ceil_div(p.num_tokens, kThreads));
  shape.shared_bytes = 0;
  return launch(finish_kernel, shape, stream, p, plan);
}

}  // namespace

int64_t energy_scores_workspace(const EnergyScoresParams& p) { return make_plan(p).bytes; }

cudaError_t energy_scores_cuda(const EnergyScoresParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::kFloat32: return run<float>(p, stream);
    case DType::kFloat16: return run<__half>(p, stream);
    default: return run<__nv_bfloat16>(p, stream);
  }
}

}  // namespace vtk
