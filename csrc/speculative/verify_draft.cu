// verify_draft on CUDA: one launch, block = request, no host synchronisation. The rules are in verify_draft_walk.h.
//
//   load    maximum, then 2^((z - max) log2(e) / T) of every logit into the workspace, and their sum
//   select  top-k: radix select on the logits; top-p: bisection over the bits of the weights, a pass a bit
//   draw    sums of tiles by warps; one warp walks the tiles, then the tile, 32 tokens at a time
//
// All threads walk the tree together, so every branch of the walk is uniform over the block. A thread adds up every
// kThreads-th weight, then the block adds up its threads: the bits do not depend on the batch or the device.
//
//   shared  tiles' sums, 8 KiB; typical paths, 16 KiB; reductions and the radix select's histogram, 2 KiB
//   bound   latency of the rows on the path, one after the other: 3 passes over a row, of which one reads memory
#include <algorithm>

#include "device/convert.cuh"
#include "device/launch.h"
#include "device/order_key.cuh"
#include "device/radix_select.cuh"
#include "device/reduce.cuh"
#include "device/tile.h"
#include "speculative/verify_draft_walk.h"

namespace vtk {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int32_t kMaxTiles = 1024;
constexpr float kLog2E = 1.44269504f;
constexpr uint32_t kLowestKey = 0x007fffffu;  // of -inf
constexpr uint32_t kOneBits = 0x3f800000u;    // of 1.0f, the largest weight

struct Shared {
  TypicalPath paths[kMaxDraftNodes];
  double tile_sums[kMaxTiles];
  double sums[kWarps];
  unsigned long long ranks[kWarps];
  RadixSelectStorage select;
  int32_t token;
};

struct Filters {
  float temperature = 1.0f;
  int32_t top_k = 0;
  float top_p = 1.0f, min_p = 0.0f;
};

class Rows {
 public:
  __device__ Rows(const VerifyDraftParams& params, int64_t b, Shared& shared)
      : p(params), b_(b), shared_(shared), target_(static_cast<float*>(p.workspace) + b * p.vocab) {
    draft_ = target_ + static_cast<int64_t>(p.batch) * p.vocab;
    const float temperature = p.temperature.at(b, 1.0f);
    filters_.temperature = temperature > 0.0f ? temperature : 1.0f;
    filters_.top_k = p.top_k.at(b, 0);
    filters_.top_p = p.top_p.at(b, 1.0f);
    filters_.min_p = p.min_p.at(b, 0.0f);
  }

  __device__ int32_t argmax(int32_t node) { return top_index(top_rank(p.target, node)); }
  __device__ double load_target(int32_t node) { return load(p.target, node, filters_, target_); }
  __device__ double load_draft(int32_t node) { return load(p.draft, node, Filters(), draft_); }

  __device__ float target(int32_t token) const { return target_[token]; }
  __device__ float draft(int32_t token) const { return draft_[token]; }
  __device__ float take(int32_t token) { return take_from(target_, token); }
  __device__ float take_draft(int32_t token) { return take_from(draft_, token); }

  __device__ double excess(double scale) {
    return sum_over([&](int32_t i) { return above_draft(i, static_cast<float>(scale)); });
  }
  __device__ double subtract(double scale) {
    barrier();
    return sum_over([&](int32_t i) { return target_[i] = above_draft(i, static_cast<float>(scale)); });
  }
  __device__ double surprise(double total) {
    const float inverse = static_cast<float>(1.0 / total);
    return -sum_over([&](int32_t i) {
      const float probability = target_[i] * inverse;
      return probability * logf(probability + 1e-5f);
    });
  }
  __device__ void keep_at_least(float least) {
    barrier();
    cut(target_, least);
  }
  __device__ int32_t sample(double u);

  __device__ TypicalPath* paths() { return shared_.paths; }
  __device__ void barrier() const { __syncthreads(); }
  __device__ bool writes() const { return threadIdx.x == 0; }

 private:
  // value(i) over the vocabulary; every thread gets the sum, and sees what all of them wrote.
  template <class Value>
  __device__ double sum_over(const Value& value) {
    float total = 0.0f;
    for (int32_t i = threadIdx.x; i < p.vocab; i += kThreads) total += value(i);
    return block_reduce<kThreads>(static_cast<double>(total), Sum{}, shared_.sums);
  }

  __device__ float above_draft(int32_t i, float scale) const {
    return fmaxf(__fmaf_rn(target_[i], scale, -draft_[i]), 0.0f);
  }

  __device__ float take_from(float* weights, int32_t token) {
    const float weight = weights[token];
    barrier();
    if (writes()) weights[token] = 0.0f;
    barrier();
    return weight;
  }

  __device__ double cut(float* weights, float least) {
    return sum_over([&](int32_t i) { return weights[i] = weights[i] >= least ? weights[i] : 0.0f; });
  }

  __device__ float logit(const LogitRows& rows, int32_t node, int32_t i) const {
    return load_float(rows.data, rows.dtype, b_ * rows.stride_batch + node * rows.stride_node + i);
  }
  __device__ unsigned long long top_rank(const LogitRows& rows, int32_t node) {
    unsigned long long top = 0;
    for (int32_t i = threadIdx.x; i < p.vocab; i += kThreads)
      top = max(top, make_rank(order_key(logit(rows, node, i)), i));
    return block_reduce<kThreads>(top, Max{}, shared_.ranks);
  }
  __device__ static int32_t top_index(unsigned long long rank) {
    return static_cast<uint32_t>(rank >> 32) > kLowestKey ? index_of(rank) : -1;
  }

  __device__ double load(const LogitRows& rows, int32_t node, const Filters& filters, float* weights) {
    const int32_t best = top_index(top_rank(rows, node));
    if (best < 0) return sum_over([&](int32_t i) { return weights[i] = 0.0f; });
    const float most = logit(rows, node, best), scale = __fdiv_rn(kLog2E, filters.temperature);
    auto key_at = [&](int32_t i) { return order_key(logit(rows, node, i)); };
    uint32_t lowest = kLowestKey + 1;
    if (filters.top_k > 0 && filters.top_k < p.vocab)
      lowest = max(lowest, radix_select(key_at, p.vocab, filters.top_k, shared_.select).key);
    double total = sum_over([&](int32_t i) {
      const float z = logit(rows, node, i);
      const float weight = z == most ? 1.0f : exp2f((z - most) * scale);
      return weights[i] = order_key(z) >= lowest ? weight : 0.0f;
    });
    const float least =
        fmaxf(filters.top_p < 1.0f ? top_p_weight(weights, filters.top_p * total) : 0.0f, filters.min_p);
    return least > 0.0f ? cut(weights, least) : total;
  }

  // The least weight w for which the weights above w have less mass than `target`.
  __device__ float top_p_weight(const float* weights, double target) {
    uint32_t low = 0, high = kOneBits;
    while (low < high) {
      const uint32_t pivot = low + (high - low) / 2;
      const float border = __uint_as_float(pivot);
      const double above = sum_over([&](int32_t i) { return weights[i] > border ? weights[i] : 0.0f; });
      if (above >= target)
        low = pivot + 1;
      else
        high = pivot;
    }
    return __uint_as_float(low);
  }

  const VerifyDraftParams& p;
  const int64_t b_;
  Shared& shared_;
  Filters filters_;
  float* target_;  // [V]
  float* draft_;   // [V]
};

__device__ int32_t Rows::sample(double u) {
  const int32_t tile = round_up(ceil_div(p.vocab, kMaxTiles), 32), tiles = ceil_div(p.vocab, tile);
  const int32_t lane = threadIdx.x % 32;
  barrier();
  for (int32_t t = threadIdx.x / 32; t < tiles; t += kWarps) {
    const Range range = tile_range(t, tile, p.vocab);
    float total = 0.0f;
    for (int32_t i = range.begin + lane; i < range.end; i += 32) total += target_[i];
    total = warp_reduce(total, Sum{});
    if (lane == 0) shared_.tile_sums[t] = total;
  }
  barrier();
  if (threadIdx.x < 32) {
    double total = 0.0, before = 0.0;
    for (int32_t t = 0; t < tiles; ++t) total += shared_.tile_sums[t];
    const double wanted = u * total;
    int32_t last = -1;
    for (int32_t t = 0; t < tiles; ++t) {
      if (!(shared_.tile_sums[t] > 0.0)) continue;
      last = t;
      if (before + shared_.tile_sums[t] > wanted) break;
      before += shared_.tile_sums[t];
    }
    int32_t token = -1;
    const Range range = tile_range(max(last, 0), tile, last < 0 ? 0 : p.vocab);
    for (int32_t first = range.begin; first < range.end; first += 32) {
      const int32_t i = first + lane;
      const float weight = i < range.end ? target_[i] : 0.0f;
      const double through = before + warp_inclusive_sum(static_cast<double>(weight));
      const unsigned there = __ballot_sync(kAllLanes, weight > 0.0f);
      const unsigned beyond = __ballot_sync(kAllLanes, weight > 0.0f && through > wanted);
      if (beyond != 0) {
        token = first + __ffs(beyond) - 1;
        break;
      }
      if (there != 0) token = first + 31 - __clz(there);
      before = __shfl_sync(kAllLanes, through, 31);
    }
    if (lane == 0) shared_.token = token;
  }
  barrier();
  return shared_.token;
}

// blockIdx.x = request.
__global__ void __launch_bounds__(kThreads) verify_draft_kernel(const __grid_constant__ VerifyDraftParams p) {
  __shared__ Shared shared;
  Rows rows(p, blockIdx.x, shared);
  Walk<Rows>(p, blockIdx.x, rows).run();
}

}  // namespace

int64_t verify_draft_workspace(const VerifyDraftParams& p) {
  const int64_t rows = p.draft.data == nullptr ? 1 : 2;
  return rows * p.batch * p.vocab * static_cast<int64_t>(sizeof(float));
}

cudaError_t verify_draft_cuda(const VerifyDraftParams& p, cudaStream_t stream) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(p.batch));
  shape.block = dim3(kThreads);
  return launch(verify_draft_kernel, shape, stream, p);
}

}  // namespace vtk
