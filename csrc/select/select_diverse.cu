// select_diverse on CUDA: one persistent launch, one grid barrier a pick, no host synchronisation.
//
//   grid    groups x blocks; a group serves batch items group, group + groups, ...; all blocks are resident
//   block   512 threads own a contiguous slice of tokens, one warp a token. Step: add the similarity to the last
//           pick to every token of the slice, offer the best token, agree on the best of the group.
//   shared  the first rows of the slice, as many as fit (up to the opt-in limit); the others come from L2.
//           Static: 16 candidates and 16 counts, 320 bytes
//   bound   keep passes over N * C elements: shared memory while the rows of the batch items in work fit the
//           multiprocessors (132 x 220 KiB hold 2880 x 4096 in 16 bits), L2 beyond; plus a barrier of about 1.5 us
//
// Score (smaller is picked first): the largest or the summed similarity to the picks. `inverse` holds 1 / norm of a
// token, or a negative state. Dots: lanes take 16-byte vectors in turn, one accumulator per element of the vector;
// then a fixed tree. So a score does not depend on the launch geometry.
//
// Clamped, because a report needs a sync: the seed into [0, N), a dropped seed to the lowest allowed token; when
// nothing is left, tokens with a NaN and then dropped tokens fill up, lowest index first.
#include <algorithm>

#include "device/convert.cuh"
#include "device/greedy_pick.cuh"
#include "device/launch.h"
#include "device/order_key.cuh"
#include "select/select_diverse.h"

namespace vtk {
namespace {

constexpr float kRanksLast = -1.0f, kDropped = -2.0f, kPicked = -3.0f;  // states in place of an inverse norm
constexpr int64_t kBytesPerBlock = 32 << 10;  // a smaller slice costs more in the barrier than it saves

struct SharedMemory {
  Candidate best[kGreedyWarps];
  int32_t counts[kGreedyWarps];
};

struct Geometry {
  GreedyWorkspace workspace;
  int64_t candidate_bytes, flag_bytes;  // aligned, of one group
  float* score;                         // [groups, N]
  float* inverse;                       // [groups, N]
  int32_t slice;                        // tokens of a block
  int32_t resident;                     // of them in shared memory
  int32_t pitch;                        // elements of a resident row
};

// x . y in all lanes of the warp. kVector: both rows are 16-byte aligned.
template <class T, bool kVector>
__device__ float warp_dot(const T* x, const T* y, int32_t channels) {
  constexpr int kWidth = kVector ? 16 / static_cast<int>(sizeof(T)) : 1;
  const int lane = threadIdx.x % 32;
  float acc[kWidth] = {};
  const int32_t vectors = channels / kWidth;
#pragma unroll 4
  for (int32_t v = lane; v < vectors; v += 32) {
    if constexpr (kVector) {
      const uint4 a = reinterpret_cast<const uint4*>(x)[v], b = reinterpret_cast<const uint4*>(y)[v];
      T p[kWidth], q[kWidth];
      memcpy(static_cast<void*>(p), &a, sizeof a);
      memcpy(static_cast<void*>(q), &b, sizeof b);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) acc[i] = __fmaf_rn(to_float(p[i]), to_float(q[i]), acc[i]);
    } else {
      acc[0] = __fmaf_rn(to_float(x[v]), to_float(y[v]), acc[0]);
    }
  }
  for (int32_t i = vectors * kWidth + lane; i < channels; i += 32)
    acc[0] = __fmaf_rn(to_float(x[i]), to_float(y[i]), acc[0]);
#pragma unroll
  for (int width = kWidth / 2; width > 0; width /= 2)
#pragma unroll
    for (int i = 0; i < width; ++i) acc[i] += acc[i + width];
  float sum = acc[0];
  for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, delta);
  return sum;
}

// 1 / norm, 0 for a zero vector, kRanksLast for a NaN or infinite one.
__device__ float inverse_norm(float squared) {
  if (!(squared < __int_as_float(0x7f800000))) return kRanksLast;
  return squared >= kMinSquaredNorm ? __fdiv_rn(1.0f, __fsqrt_rn(squared)) : 0.0f;
}

__device__ bool is_dropped(const SelectDiverseParams& p, int32_t b, int32_t j) {
  return p.drop_mask.data != nullptr && p.drop_mask.data[b * p.drop_mask.stride_row + j * p.drop_mask.stride_col];
}

// The clamped seed, or the lowest allowed token: every block finds it on its own.
__device__ int32_t first_pick(const SelectDiverseParams& p, int32_t b, GreedyGroup& group, SharedMemory& shared) {
  const int64_t wanted = p.seed != nullptr ? p.seed[b * p.seed_stride] : 0;
  const int32_t seed =
      static_cast<int32_t>(min(max(wanted, static_cast<int64_t>(0)), static_cast<int64_t>(p.num_tokens - 1)));
  if (!is_dropped(p, b, seed)) return seed;
  Candidate allowed = {0, 0.0f};
  for (int32_t j = threadIdx.x; j < p.num_tokens && allowed.rank == 0; j += kGreedyThreads)
    if (!is_dropped(p, b, j)) allowed = make_candidate(1, j, 0.0f);
  allowed = group.block_best(allowed, shared.best);
  return allowed.rank != 0 ? token_of(allowed) : 0;
}

__device__ Candidate make_candidate_of(float score, float inverse, int32_t token) {
  const uint32_t key = inverse >= 0.0f ? order_key(-score) : inverse == kRanksLast ? kNanKey : kDroppedKey;
  return make_candidate(key, token, inverse);
}

template <class T, bool kVector>
__global__ void __launch_bounds__(kGreedyThreads, 1)
    select_diverse_kernel(const __grid_constant__ SelectDiverseParams p, const __grid_constant__ Geometry g) {
  VTK_DYNAMIC_SHARED(dynamic_shared);
  __shared__ SharedMemory shared;
  T* sRows = reinterpret_cast<T*>(dynamic_shared);
  GreedyGroup group(g.workspace, g.candidate_bytes, g.flag_bytes);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t index = blockIdx.x / g.workspace.blocks;
  const int32_t begin = min(group.block * g.slice, p.num_tokens), end = min(begin + g.slice, p.num_tokens);
  float* gScore = g.score + static_cast<int64_t>(index) * p.num_tokens;
  float* gInverse = g.inverse + static_cast<int64_t>(index) * p.num_tokens;

  for (int32_t b = index; b < p.batch; b += g.workspace.groups) {
    const T* gRows = static_cast<const T*>(p.features) + b * p.stride_batch;
    int64_t* gIndices = p.indices + static_cast<int64_t>(b) * p.keep;
    auto row_of = [&](int32_t j) -> const T* {
      return j - begin < g.resident ? sRows + (j - begin) * g.pitch : gRows + j * p.stride_token;
    };

    // Bring the resident rows in, one warp a row.
    __syncthreads();
    for (int32_t j = begin + warp; j < min(begin + g.resident, end); j += kGreedyWarps) {
      const T* from = gRows + j * p.stride_token;
      T* to = sRows + (j - begin) * g.pitch;
      if constexpr (kVector) {
        constexpr int32_t kWidth = 16 / sizeof(T);
        for (int32_t v = lane; v < p.channels / kWidth; v += 32)
          reinterpret_cast<uint4*>(to)[v] = reinterpret_cast<const uint4*>(from)[v];
        for (int32_t i = p.channels / kWidth * kWidth + lane; i < p.channels; i += 32) to[i] = from[i];
      } else {
        for (int32_t i = lane; i < p.channels; i += 32) to[i] = from[i];
      }
    }
    group.start_record(p.num_tokens);

    // Norms and states.
    int32_t pick = first_pick(p, b, group, shared);
    for (int32_t j = begin + warp; j < end; j += kGreedyWarps) {
      const T* row = row_of(j);
      const float inverse = inverse_norm(warp_dot<T, kVector>(row, row, p.channels));
      if (lane == 0) {
        gInverse[j] = is_dropped(p, b, j) ? kDropped : inverse;
        gScore[j] = p.mode == DiverseMode::kMaxMin ? -2.0f : 0.0f;  // below every similarity; of no picks
      }
    }
    const T* seed_row = gRows + pick * p.stride_token;
    float pick_inverse = inverse_norm(warp_dot<T, kVector>(seed_row, seed_row, p.channels));

    for (int32_t step = 0;; ++step) {
      group.record(step, pick, p.order, gIndices);
      if (step + 1 == p.keep) break;

      // Add the similarity to the last pick. A token's state belongs to lane 0 of one warp.
      const T* pick_row = gRows + pick * p.stride_token;
      Candidate best = {0, 0.0f};
      for (int32_t j = begin + warp; j < end; j += kGreedyWarps) {
        float inverse = lane == 0 ? gInverse[j] : 0.0f;
        inverse = __shfl_sync(0xffffffffu, inverse, 0);
        if (inverse == kPicked) continue;
        if (j == pick) {
          if (lane == 0) gInverse[j] = kPicked;
          continue;
        }
        // Nothing is similar to a token without a norm.
        float similarity = 0.0f;
        if (inverse >= 0.0f && pick_inverse >= 0.0f)
          similarity = warp_dot<T, kVector>(row_of(j), pick_row, p.channels) * inverse * pick_inverse;
        if (lane == 0) {
          float score = gScore[j];
          score = p.mode == DiverseMode::kMaxMin ? fmaxf(score, similarity) : score + similarity;
          gScore[j] = score;
          const Candidate own = make_candidate_of(score, inverse, j);
          if (own.rank > best.rank) best = own;
        }
      }

      // Agree.
      best = group.group_best(best, shared.best);
      pick = token_of(best);
      pick_inverse = best.value;
    }
    group.finish_record(p.num_tokens, p.keep, p.order, gIndices, shared.counts);
  }
}

Geometry geometry(const SelectDiverseParams& p, int shared_limit, int multiprocessors) {
  const int64_t element = p.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t row_bytes = std::max<int64_t>(1, p.channels * element);
  const int64_t most = std::min<int64_t>((p.num_tokens + kGreedyWarps - 1) / kGreedyWarps,
                                         (p.num_tokens * row_bytes + kBytesPerBlock - 1) / kBytesPerBlock);
  const GreedyShape shape = greedy_shape(p.batch, most, multiprocessors);  // one block a multiprocessor
  Geometry g = {};
  g.workspace = {static_cast<char*>(p.workspace), shape.groups, shape.blocks, p.num_tokens};
  g.candidate_bytes = g.workspace.candidate_bytes();
  g.flag_bytes = GreedyWorkspace::align(p.num_tokens);
  const int64_t floats = static_cast<int64_t>(shape.groups) * p.num_tokens;
  g.score = reinterpret_cast<float*>(g.workspace.base + g.workspace.bytes());
  g.inverse = g.score + floats;
  g.slice = (p.num_tokens + shape.blocks - 1) / shape.blocks;
  const int64_t pitch_bytes = (p.channels * element + 15) / 16 * 16;
  g.pitch = static_cast<int32_t>(pitch_bytes / element);
  const int64_t room = std::max<int64_t>(0, shared_limit - static_cast<int64_t>(sizeof(SharedMemory)) - 1024);
  g.resident = static_cast<int32_t>(std::min<int64_t>(g.slice, pitch_bytes > 0 ? room / pitch_bytes : 0));
  return g;
}

template <class T, bool kVector>
cudaError_t run(const SelectDiverseParams& p, const Geometry& g, cudaStream_t stream) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(g.workspace.groups * g.workspace.blocks));
  shape.block = dim3(kGreedyThreads);
  shape.shared_bytes = static_cast<size_t>(g.resident) * g.pitch * sizeof(T);
  shape.cooperative = g.workspace.blocks > 1;
  return launch(select_diverse_kernel<T, kVector>, shape, stream, p, g);
}

template <class T>
cudaError_t run(const SelectDiverseParams& p, const Geometry& g, cudaStream_t stream) {
  const uint64_t bits = reinterpret_cast<uint64_t>(p.features) | static_cast<uint64_t>(p.stride_batch) * sizeof(T) |
                        static_cast<uint64_t>(p.stride_token) * sizeof(T);
  return bits % 16 == 0 ? run<T, true>(p, g, stream) : run<T, false>(p, g, stream);
}

}  // namespace

int64_t select_diverse_workspace(const SelectDiverseParams& p) {
  const Geometry g = geometry(p, max_shared_bytes(), num_multiprocessors());
  return g.workspace.bytes() + 2 * static_cast<int64_t>(g.workspace.groups) * p.num_tokens * sizeof(float);
}

cudaError_t select_diverse_cuda(const SelectDiverseParams& p, cudaStream_t stream) {
  const Geometry g = geometry(p, max_shared_bytes(), num_multiprocessors());
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
