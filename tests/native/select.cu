// Order keys, ranks, radix select, greedy picks and the grid barrier.
#include "device/greedy_pick.cuh"
#include "device/radix_select.cuh"
#include "native.h"

namespace vtk::native {
namespace {

__global__ void order_keys_kernel(const float* scores, int32_t count, uint32_t* keys) {
  for (int32_t i = threadIdx.x; i < count; i += blockDim.x) keys[i] = order_key(scores[i]);
}

template <int kThreads>
__global__ void arg_max_kernel(const float* scores, int32_t count, int32_t* best) {
  __shared__ unsigned long long sWarps[kThreads / 32];
  unsigned long long rank = 0;
  for (int32_t i = threadIdx.x; i < count; i += kThreads) rank = Max{}(rank, make_rank(order_key(scores[i]), i));
  rank = block_reduce<kThreads>(rank, Max{}, sWarps);
  if (threadIdx.x == 0) *best = rank == 0 ? -1 : index_of(rank);
}

__global__ void radix_select_kernel(const uint32_t* keys, int32_t count, int32_t k, uint32_t* threshold,
                                    int32_t* ties) {
  __shared__ RadixSelectStorage storage;
  const Threshold found = vtk::radix_select([&](int32_t i) { return keys[i]; }, count, k, storage);
  if (threadIdx.x == blockDim.x - 1) *threshold = found.key, *ties = found.ties;
}

struct GreedyArguments {
  const float* scores;
  int32_t tokens, keep;
  Order order;
  GreedyWorkspace workspace;
  int64_t candidate_bytes, flag_bytes;
  int64_t* indices;
};

// Each block keeps in shared memory which of its tokens are taken: block b owns tokens b, b + blocks, ...
constexpr int32_t kOwnTokens = 4096;
__global__ void greedy_pick_kernel(GreedyArguments a) {
  __shared__ Candidate sWarps[kGreedyWarps];
  __shared__ int32_t sCounts[kGreedyWarps];
  __shared__ uint8_t sTaken[kOwnTokens];
  GreedyGroup group(a.workspace, a.candidate_bytes, a.flag_bytes);
  const int item = blockIdx.x / a.workspace.blocks;
  const float* gScores = a.scores + int64_t{item} * a.tokens;
  int64_t* gIndices = a.indices + int64_t{item} * a.keep;
  for (int i = threadIdx.x; i < kOwnTokens; i += kGreedyThreads) sTaken[i] = 0;
  group.start_record(a.tokens);
  for (int32_t step = 0; step < a.keep; ++step) {
    Candidate best = {0, 0.0f};
    for (int32_t own = threadIdx.x; own * group.blocks + group.block < a.tokens; own += kGreedyThreads) {
      const int32_t token = own * group.blocks + group.block;
      const Candidate offer = make_candidate(order_key(gScores[token]), token, gScores[token]);
      if (!sTaken[own]) best = Better{}(best, offer);
    }
    const int32_t pick = token_of(group.group_best(best, sWarps));
    group.record(step, pick, a.order, gIndices);
    if (threadIdx.x == 0 && pick % group.blocks == group.block) sTaken[pick / group.blocks] = 1;
    __syncthreads();
  }
  group.finish_record(a.tokens, a.keep, a.order, gIndices, sCounts);
}

// In every round each block posts a number, and sums what its group has posted.
__global__ void grid_barrier_kernel(unsigned* counters, unsigned first, int32_t blocks, int32_t rounds, int32_t* posted,
                                    int32_t* sums) {
  const int32_t group = blockIdx.x / blocks;
  GridBarrier barrier{counters + group * (kBarrierBytes / sizeof(unsigned)), static_cast<unsigned>(blocks), first};
  for (int32_t r = 0; r < rounds; ++r) {
    if (threadIdx.x == 32) posted[r * gridDim.x + blockIdx.x] = 1 + r * 1000 + static_cast<int32_t>(blockIdx.x);
    barrier.wait();
    if (threadIdx.x != 0) continue;
    int32_t sum = 0;
    for (int32_t b = 0; b < blocks; ++b) sum += posted[r * gridDim.x + group * blocks + b];
    sums[r * gridDim.x + blockIdx.x] = sum;
  }
}

GreedyWorkspace workspace_of(void* base, int32_t batch, int32_t tokens, int32_t blocks) {
  return {static_cast<char*>(base), batch, blocks, tokens};
}

LaunchShape one_block(int32_t threads) {
  LaunchShape shape;
  shape.grid = dim3(1);
  shape.block = dim3(static_cast<unsigned>(threads));
  return shape;
}

}  // namespace

cudaError_t order_keys(const float* scores, int32_t count, uint32_t* keys) {
  return launch(order_keys_kernel, one_block(128), nullptr, scores, count, keys);
}

cudaError_t arg_max(const float* scores, int32_t count, int32_t threads, int32_t* best) {
  switch (threads) {
    case 32: return launch(arg_max_kernel<32>, one_block(32), nullptr, scores, count, best);
    case 256: return launch(arg_max_kernel<256>, one_block(256), nullptr, scores, count, best);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t radix_select(const uint32_t* keys, int32_t count, int32_t k, int32_t threads, uint32_t* threshold,
                         int32_t* ties) {
  return launch(radix_select_kernel, one_block(threads), nullptr, keys, count, k, threshold, ties);
}

int64_t greedy_workspace(int32_t batch, int32_t tokens, int32_t blocks) {
  return workspace_of(nullptr, batch, tokens, blocks).bytes();
}

cudaError_t greedy_pick(const float* scores, int32_t batch, int32_t tokens, int32_t keep, bool by_rank, int32_t blocks,
                        void* workspace, int64_t* indices) {
  if (tokens > kOwnTokens * blocks) return cudaErrorInvalidValue;
  const GreedyWorkspace w = workspace_of(workspace, batch, tokens, blocks);
  const GreedyArguments arguments = {
      scores,          tokens, keep, by_rank ? Order::kRank : Order::kPosition, w, w.candidate_bytes(),
      w.align(tokens), indices};
  LaunchShape shape = one_block(kGreedyThreads);
  shape.grid = dim3(static_cast<unsigned>(batch * blocks));
  shape.cooperative = blocks > 1;
  return launch(greedy_pick_kernel, shape, nullptr, arguments);
}

cudaError_t grid_barrier(unsigned* counters, unsigned first, int32_t groups, int32_t blocks, int32_t rounds,
                         int32_t* posted, int32_t* sums) {
  LaunchShape shape = one_block(64);
  shape.grid = dim3(static_cast<unsigned>(groups * blocks));
  shape.cooperative = true;
  return launch(grid_barrier_kernel, shape, nullptr, counters, first, blocks, rounds, posted, sums);
}

}  // namespace vtk::native
