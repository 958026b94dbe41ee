// What greedy selections share: a group of resident blocks serves one batch item, and in every step each block
// offers its best token, all agree on the best of the group, and block 0 records it.
//
// Nothing depends on the number of blocks: the best is a maximum over integers.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/dtype.h"
#include "device/grid_barrier.cuh"
#include "device/launch.h"
#include "device/order_key.cuh"
#include "device/reduce.cuh"

namespace vtk {

inline constexpr int kGreedyThreads = 512;
inline constexpr int kGreedyWarps = kGreedyThreads / 32;

// Larger is better; among equal keys the lower token. 0: no token.
struct Candidate {
  unsigned long long rank;
  float value;  // travels with the token, so that no block has to look it up
};

__device__ inline Candidate make_candidate(uint32_t key, int32_t token, float value) {
  return {make_rank(key, token), value};
}

__device__ inline int32_t token_of(const Candidate& c) { return index_of(c.rank); }

struct Better {
  __device__ Candidate operator()(const Candidate& a, const Candidate& b) const { return a.rank >= b.rank ? a : b; }
};

__device__ inline Candidate shuffle_xor(const Candidate& c, int lanes) {
  return {shuffle_xor(c.rank, lanes), shuffle_xor(c.value, lanes)};
}

struct GreedyShape {
  int groups;  // batch items in work at once
  int blocks;  // of one group
};

// Resident blocks shared out among the batch; most_blocks: what one item can use.
inline GreedyShape greedy_shape(int32_t batch, int64_t most_blocks, int resident) {
  const int groups = std::min(batch, resident);
  return {groups, static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(most_blocks, resident / groups)))};
}

// Workspace of a launch: counters (zeroed by the launcher), then for each group two sets of candidates and N flags.
struct GreedyWorkspace {
  char* base;
  int groups, blocks;
  int32_t tokens;

  static int64_t align(int64_t bytes) { return (bytes + 127) / 128 * 128; }
  int64_t counter_bytes() const { return groups * kBarrierBytes; }
  int64_t candidate_bytes() const { return align(2 * blocks * static_cast<int64_t>(sizeof(Candidate))); }
  int64_t bytes() const { return counter_bytes() + groups * (candidate_bytes() + align(tokens)); }
};

// One group's view; all members are the same in all of its blocks except `block`.
struct GreedyGroup {
  GridBarrier barrier;
  Candidate* candidates;  // [2, blocks]
  uint8_t* flags;         // [N], written and read by block 0 alone
  int block, blocks;
  unsigned parity = 0;

  __device__ GreedyGroup(const GreedyWorkspace& w, int64_t candidate_bytes, int64_t flag_bytes) {
    const int group = blockIdx.x / w.blocks;
    char* own = w.base + w.groups * kBarrierBytes + group * (candidate_bytes + flag_bytes);
    barrier.counter = reinterpret_cast<unsigned*>(w.base + group * kBarrierBytes);
    barrier.blocks = static_cast<unsigned>(w.blocks);
    candidates = reinterpret_cast<Candidate*>(own);
    flags = reinterpret_cast<uint8_t*>(own + candidate_bytes);
    block = blockIdx.x % w.blocks;
    blocks = w.blocks;
  }

  // The best of the block, in all its threads.
  __device__ Candidate block_best(Candidate own, Candidate* sWarps) {
    return block_reduce<kGreedyThreads>(own, Better{}, sWarps);
  }

  // The best of the group, in all threads of all its blocks.
  __device__ Candidate group_best(Candidate own, Candidate* sWarps) {
    own = block_best(own, sWarps);
    if (blocks == 1) return own;
    // NOTE: two sets suffice. A block writes set p again two steps later, after a barrier that every reader passed.
    Candidate* set = candidates + parity * blocks;
    parity ^= 1u;
    if (threadIdx.x == 0) set[block] = own;
    barrier.wait();
    own = {0, 0.0f};
    for (int b = threadIdx.x; b < blocks; b += kGreedyThreads) own = Better{}(own, set[b]);
    return block_best(own, sWarps);
  }

  // Block 0 records the picks.
  __device__ void start_record(int32_t tokens) {
    if (block == 0)
      for (int32_t j = threadIdx.x; j < tokens; j += kGreedyThreads) flags[j] = 0;
    __syncthreads();
  }
  __device__ void record(int32_t step, int32_t token, Order order, int64_t* indices) {
    if (block != 0 || threadIdx.x != 0) return;
    if (order == Order::kRank)
      indices[step] = token;
    else
      flags[token] = 1;
  }
  // Position order: writes the flagged tokens in ascending order.
  __device__ void finish_record(int32_t tokens, int32_t keep, Order order, int64_t* indices, int32_t* sCounts) {
    if (block != 0 || order == Order::kRank) return;
    __syncthreads();  // the flags are written
    int32_t before = 0;
    for (int32_t first = 0; first < tokens && before < keep; first += kGreedyThreads) {
      const int32_t j = first + static_cast<int32_t>(threadIdx.x);
      const bool picked = j < tokens && flags[j] != 0;
      const Prefix<int32_t> count = block_prefix<kGreedyThreads>(int32_t{picked}, sCounts);
      if (picked) indices[before + count.before] = j;
      before += count.total;
    }
    __syncthreads();
  }
};

}  // namespace vtk
