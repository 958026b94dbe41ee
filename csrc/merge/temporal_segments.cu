// temporal_segments on CUDA: one launch, block = item, no host synchronisation.
//
//   run(p)  pairs in a row, up to this one, over which position p is similar
//   step    frame after frame: a thread a position extends the runs; a thread a window of L pairs counts the runs of
//           at least L and offers best(before the window) + count * L; the best total wins, then the shortest window
//   write   one thread numbers the segments from the end, a thread a position marks where it is static
//
// A total and its window are one integer, so nothing depends on the order in which threads offer them.
//
//   shared  16 ranks, 128 bytes; runs and totals are read by all threads at once from L1
//   bound   latency: F - 1 steps of three barriers, and min(F, window) / 512 * S reads in each
#include "merge/temporal_segments.h"

#include <algorithm>

#include "device/convert.cuh"
#include "device/launch.h"
#include "device/order_key.cuh"
#include "device/reduce.cuh"

namespace vtk {
namespace {

constexpr int kThreads = 512;

struct Item {
  const TemporalSegmentsParams& p;
  const int64_t b;
  int32_t* runs;    // [S]
  uint32_t* best;   // [F + 1], of the first frames
  int32_t* length;  // [F + 1], frames of their last segment

  __device__ Item(const TemporalSegmentsParams& p, int64_t b) : p(p), b(b) {
    runs = static_cast<int32_t*>(p.workspace) + b * (p.positions + 2 * (static_cast<int64_t>(p.frames) + 1));
    best = reinterpret_cast<uint32_t*>(runs + p.positions);
    length = reinterpret_cast<int32_t*>(best + p.frames + 1);
  }

  __device__ bool similar(int32_t pair, int32_t position) const {
    return load_float(p.similarity, p.dtype, b * p.stride_batch + pair * p.stride_pair + position) > p.threshold;
  }

  // The best last segment of frames [0, frame]: its total, and its pairs as the index.
  __device__ unsigned long long offer(int32_t frame) const {
    unsigned long long top = make_rank(best[frame], 0);
    for (int32_t pairs = 1 + threadIdx.x; pairs <= min(frame, p.max_pairs); pairs += kThreads) {
      uint32_t count = 0;
      for (int32_t position = 0; position < p.positions; ++position) count += runs[position] >= pairs;
      top = max(top, make_rank(best[frame - pairs] + count * pairs, pairs));
    }
    return top;
  }

  // By one thread.
  __device__ void number_segments() const {
    int64_t id = 0;
    for (int32_t end = p.frames; end > 0; end -= length[end]) ++id;
    for (int32_t end = p.frames; end > 0; end -= length[end]) {
      --id;
      for (int32_t frame = end - length[end]; frame < end; ++frame) p.segment[b * p.frames + frame] = id;
    }
  }

  __device__ void mark_static(int32_t position) const {
    const int64_t* segment = p.segment + b * p.frames;
    for (int32_t begin = 0, end; begin < p.frames; begin = end) {
      for (end = begin + 1; end < p.frames && segment[end] == segment[begin]; ++end) {
      }
      bool stays = end - begin > 1;
      for (int32_t pair = begin; stays && pair + 1 < end; ++pair) stays = similar(pair, position);
      for (int32_t frame = begin; frame < end; ++frame)
        p.is_static[(b * p.frames + frame) * p.positions + position] = stays;
    }
  }
};

__global__ void __launch_bounds__(kThreads) temporal_segments_kernel(const __grid_constant__ TemporalSegmentsParams p) {
  __shared__ unsigned long long sWarps[kThreads / 32];
  const Item item(p, blockIdx.x);
  for (int32_t position = threadIdx.x; position < p.positions; position += kThreads) item.runs[position] = 0;
  if (threadIdx.x == 0) {
    item.best[0] = item.best[1] = 0;
    item.length[1] = 1;
  }

  // Frame after frame, the best last segment.
  for (int32_t frame = 1; frame < p.frames; ++frame) {
    for (int32_t position = threadIdx.x; position < p.positions; position += kThreads)
      item.runs[position] = item.similar(frame - 1, position) ? item.runs[position] + 1 : 0;
    __syncthreads();
    const unsigned long long top = block_reduce<kThreads>(item.offer(frame), Max{}, sWarps);
    if (threadIdx.x == 0) {
      item.best[frame + 1] = static_cast<uint32_t>(top >> 32);
      item.length[frame + 1] = index_of(top) + 1;
    }
  }

  // Write.
  __syncthreads();
  if (threadIdx.x == 0) {
    p.gain[item.b] = item.best[p.frames];
    item.number_segments();
  }
  __syncthreads();
  for (int32_t position = threadIdx.x; position < p.positions; position += kThreads) item.mark_static(position);
}

}  // namespace

int64_t temporal_segments_workspace(const TemporalSegmentsParams& p) {
  return int64_t{p.batch} * (p.positions + 2 * (int64_t{p.frames} + 1)) * static_cast<int64_t>(sizeof(int32_t));
}

cudaError_t temporal_segments_cuda(const TemporalSegmentsParams& p, cudaStream_t stream) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(p.batch));
  shape.block = dim3(kThreads);
  return launch(temporal_segments_kernel, shape, stream, p);
}

}  // namespace vtk
