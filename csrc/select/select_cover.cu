// select_cover on CUDA: one persistent launch, one grid barrier a pick, no host synchronisation.
//
//   grid    groups x blocks; a group serves batch items group, group + groups, ...; all blocks are resident
//   block   512 threads own 32-column tiles block, block + blocks, ...; lanes over columns, warps over rows.
//           Step: raise covered by the last pick's column, sum what every column still adds, agree on the best.
//   shared  covered: 4 R bytes up to 128 KiB, in the workspace beyond. Static: 16 x 32 partial sums, candidates,
//           counts: 2.4 KiB
//   bound   keep passes over R * N gains from L2 (33 MB in float32 at 2912 x 2880), about 6 TB/s, and a barrier of
//           about 1.5 us
//
// A column's sum: warp w adds rows w, w + 16, ... in ascending order, then the 16 partial sums in ascending order; so
// it does not depend on the launch geometry.
//
// Clamped, because a report needs a sync: when every allowed token is picked, dropped tokens fill up, lowest index
// first.
#include <algorithm>

#include "device/convert.cuh"
#include "device/greedy_pick.cuh"
#include "device/launch.h"
#include "device/order_key.cuh"
#include "select/select_cover.h"

namespace vtk {
namespace {

constexpr int kTile = 32;
constexpr int32_t kSharedRows = 32 << 10;  // covered rows that fit into shared memory

struct SharedMemory {
  Candidate best[kGreedyWarps];
  int32_t counts[kGreedyWarps];
  float partial[kGreedyWarps][kTile];
};

struct Geometry {
  GreedyWorkspace workspace;
  int64_t candidate_bytes, flag_bytes;  // aligned, of one group
  uint32_t* picked;                     // [groups, tiles]: a bit a column
  float* covered;                       // [groups * blocks, R] when R does not fit into shared memory
  int32_t tiles;
};

template <class T>
__device__ float load_gain(const T* gains, int64_t index) {
  const float gain = to_float(gains[index]);
  return gain == gain ? gain : 0.0f;
}

template <class T>
__global__ void __launch_bounds__(kGreedyThreads, 1)
    select_cover_kernel(const __grid_constant__ SelectCoverParams p, const __grid_constant__ Geometry g) {
  VTK_DYNAMIC_SHARED(dynamic_shared);
  __shared__ SharedMemory shared;
  GreedyGroup group(g.workspace, g.candidate_bytes, g.flag_bytes);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t index = blockIdx.x / g.workspace.blocks;
  uint32_t* gPicked = g.picked + static_cast<int64_t>(index) * g.tiles;
  float* covered = p.num_rows <= kSharedRows ? reinterpret_cast<float*>(dynamic_shared)
                                             : g.covered + static_cast<int64_t>(blockIdx.x) * p.num_rows;

  for (int32_t b = index; b < p.batch; b += g.workspace.groups) {
    const T* gGains = static_cast<const T*>(p.gains) + b * p.stride_batch;
    int64_t* gIndices = p.indices + static_cast<int64_t>(b) * p.keep;
    auto dropped = [&](int32_t j) {
      return p.drop_mask.data != nullptr && p.drop_mask.data[b * p.drop_mask.stride_row + j * p.drop_mask.stride_col];
    };

    // Nothing is covered, nothing is picked. A tile's bits belong to lane 0 of warp 0 of its block.
    __syncthreads();
    for (int32_t r = threadIdx.x; r < p.num_rows; r += kGreedyThreads) covered[r] = 0.0f;
    if (threadIdx.x == 0)
      for (int32_t tile = group.block; tile < g.tiles; tile += group.blocks) gPicked[tile] = 0;
    group.start_record(p.num_tokens);

    for (int32_t step = 0; step < p.keep; ++step) {
      // Sum what every column adds.
      Candidate best = {0, 0.0f};
      for (int32_t tile = group.block; tile < g.tiles; tile += group.blocks) {
        const int32_t j = tile * kTile + lane;
        float sum = 0.0f;
        if (j < p.num_tokens) {
#pragma unroll 8
          for (int32_t r = warp; r < p.num_rows; r += kGreedyWarps) {
            const float more = load_gain(gGains, r * p.stride_row + j) - covered[r];
            sum += more > 0.0f ? more : 0.0f;  // infinity - infinity adds nothing
          }
        }
        __syncthreads();  // the last tile's partial sums are read
        shared.partial[warp][lane] = sum;
        __syncthreads();
        if (warp == 0) {
          float value = 0.0f;
          for (int w = 0; w < kGreedyWarps; ++w) value += shared.partial[w][lane];
          uint32_t picked = lane == 0 ? gPicked[tile] : 0u;
          picked = __shfl_sync(0xffffffffu, picked, 0);
          if (j < p.num_tokens && (picked >> lane & 1u) == 0) {
            const Candidate own = make_candidate(dropped(j) ? kDroppedKey : order_key(value), j, 0.0f);
            if (own.rank > best.rank) best = own;
          }
        }
      }

      // Agree, and raise what is covered by the pick's column.
      const int32_t pick = token_of(group.group_best(best, shared.best));
      group.record(step, pick, p.order, gIndices);
      if (threadIdx.x == 0 && pick / kTile % group.blocks == group.block) gPicked[pick / kTile] |= 1u << pick % kTile;
      for (int32_t r = threadIdx.x; r < p.num_rows; r += kGreedyThreads)
        covered[r] = fmaxf(covered[r], load_gain(gGains, r * p.stride_row + pick));
      __syncthreads();
    }
    group.finish_record(p.num_tokens, p.keep, p.order, gIndices, shared.counts);
  }
}

Geometry geometry(const SelectCoverParams& p) {
  Geometry g = {};
  g.tiles = (p.num_tokens + kTile - 1) / kTile;
  const GreedyShape shape = greedy_shape(p.batch, g.tiles, num_multiprocessors());  // one block a multiprocessor
  g.workspace = {static_cast<char*>(p.workspace), shape.groups, shape.blocks, p.num_tokens};
  g.candidate_bytes = g.workspace.candidate_bytes();
  g.flag_bytes = GreedyWorkspace::align(p.num_tokens);
  g.picked = reinterpret_cast<uint32_t*>(g.workspace.base + g.workspace.bytes());
  g.covered = reinterpret_cast<float*>(g.picked + static_cast<int64_t>(shape.groups) * g.tiles);
  return g;
}

template <class T>
cudaError_t run(const SelectCoverParams& p, const Geometry& g, cudaStream_t stream) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(g.workspace.groups * g.workspace.blocks));
  shape.block = dim3(kGreedyThreads);
  shape.shared_bytes = p.num_rows <= kSharedRows ? p.num_rows * sizeof(float) : 0;
  shape.cooperative = g.workspace.blocks > 1;
  return launch(select_cover_kernel<T>, shape, stream, p, g);
}

}  // namespace

int64_t select_cover_workspace(const SelectCoverParams& p) {
  const Geometry g = geometry(p);
  const int64_t blocks = static_cast<int64_t>(g.workspace.groups) * g.workspace.blocks;
  const int64_t covered = p.num_rows <= kSharedRows ? 0 : blocks * p.num_rows;
  return g.workspace.bytes() + (static_cast<int64_t>(g.workspace.groups) * g.tiles + covered) * sizeof(float);
}

cudaError_t select_cover_cuda(const SelectCoverParams& p, cudaStream_t stream) {
  const Geometry g = geometry(p);
  // The barrier counters. NOTE: a memset is a node of a captured graph, so a replay starts from zero again.
  cudaError_t error = cudaMemsetAsync(g.workspace.base, 0, static_cast<size_t>(g.workspace.counter_bytes()), stream);
  if (error != cudaSuccess) return error;
  switch (p.dtype) {
    case DType::kFloat32: return run<float>(p, g, stream);
    case DType::kFloat16: return run<__half>(p, g, stream);
    default: return run<__nv_bfloat16>(p, g, stream);
  }
}

}  // namespace vtk
