// attention_scores for 1 to kFewRows query rows (the [CLS] row, the last prompt token): two launches.
//
//   few_logits   block = (head, part of the keys), 8 warps. A group of lanes takes one key, 16 bytes a lane, so a warp
//                reads consecutive keys as whole cache lines; the rows' q sit in shared memory as float32. Logits go to
//                the workspace (Q / D of the size of K), the block's partial normalisers beside them.
//   few_scores   thread = key: folds the normalisers, reduces rows, then heads, writes the score.
//   shared       4 Q D bytes
//   bound        reading K once; at one image the two launches
#pragma once
#include "device/launch.h"
#include "score/attention_scores_device.cuh"

namespace vtk {
namespace {

constexpr int kFewThreads = 256;
constexpr int kFewWarps = kFewThreads / 32;

// `count` elements at p as float32, zeros beyond; aligned: 16 bytes in one access when they are all there.
template <class T>
__device__ void load_vector(float (&x)[16 / sizeof(T)], const T* p, int32_t count, bool aligned) {
  constexpr int kElements = 16 / sizeof(T);
  if (aligned && count >= kElements) {
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    const T* elements = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int i = 0; i < kElements; ++i) x[i] = to_float(elements[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kElements; ++i) x[i] = i < count ? to_float(p[i]) : 0.0f;
  }
}

// kRows bounds the accumulators: 1 or kFewRows. key_lanes: lanes that share a key, a power of two.
template <class T, int kRows>
__global__ void __launch_bounds__(kFewThreads)
    few_logits_kernel(const __grid_constant__ AttentionScoresParams p, const __grid_constant__ Plan plan, int key_lanes,
                      bool aligned) {
  VTK_DYNAMIC_SHARED(dynamic_shared);
  __shared__ float2 sPart[kFewWarps][kRows];
  constexpr int kElements = 16 / sizeof(T);
  float* sQ = reinterpret_cast<float*>(dynamic_shared);  // [Q, depth]
  const int32_t part = blockIdx.x % plan.key_parts, head = blockIdx.x / plan.key_parts;
  const int32_t b = head / p.num_heads, h = head % p.num_heads,
                depth = (p.head_dim + kElements - 1) / kElements * kElements;

  // Load the rows.
  const T* gQ = static_cast<const T*>(p.query) + b * p.query_stride_batch + h * p.query_stride_head;
  for (int32_t i = threadIdx.x; i < p.num_queries * depth; i += kFewThreads) {
    const int32_t row = i / depth, d = i % depth;
    sQ[i] = d < p.head_dim ? to_float(gQ[row * p.query_stride_row + d]) : 0.0f;
  }
  __syncthreads();

  // Multiply: one key a lane group, kFewWarps * 32 / key_lanes keys at a time.
  const int32_t key_head = h / (p.num_heads / p.key_heads);
  const T* gK = static_cast<const T*>(p.key) + b * p.key_stride_batch + key_head * p.key_stride_head;
  float* gLogits = p.workspace + plan.normaliser_floats + static_cast<int64_t>(head) * p.num_queries * p.num_keys;
  const int32_t lane = threadIdx.x % key_lanes, keys_at_once = kFewThreads / key_lanes;
  const int32_t end = min(part * plan.part_keys + plan.part_keys, p.num_keys);
  const float scale = p.scale * kLog2E;
  float2 normaliser[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) normaliser[r] = {-kInfinity, 0.0f};
  for (int32_t first = part * plan.part_keys; first < end; first += keys_at_once) {
    const int32_t n = first + threadIdx.x / key_lanes;
    float dot[kRows] = {};
    for (int32_t d = lane * kElements; d < p.head_dim && n < end; d += key_lanes * kElements) {
      float x[kElements];
      load_vector(x, gK + n * p.key_stride_row + d, p.head_dim - d, aligned);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r < p.num_queries) {
#pragma unroll
          for (int i = 0; i < kElements; ++i) dot[r] += sQ[r * depth + d + i] * x[i];
        }
      }
    }
    // Sum over the lanes of the key; all of them then hold the logit.
    const bool counted = lane == 0 && n < end && is_set(p.key_mask, b, n);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      for (int step = key_lanes / 2; step > 0; step /= 2) dot[r] += __shfl_xor_sync(0xffffffffu, dot[r], step);
      if (r < p.num_queries && lane == 0 && n < end) {
        const float logit = dot[r] * scale;
        gLogits[static_cast<int64_t>(r) * p.num_keys + n] = logit;
        if (counted && n < causal_limit(p, r)) {
          const float shift = fmaxf(normaliser[r].x, logit);
          normaliser[r] = fold(normaliser[r], {logit == logit ? logit : shift, logit == logit ? 1.0f : logit});
        }
      }
    }
  }
  if (p.lse != nullptr) return;

  // Fold the normalisers of the block: lanes, then warps, in a fixed order.
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    for (int step = 16; step > 0; step /= 2) {
      float2 other = {__shfl_xor_sync(0xffffffffu, normaliser[r].x, step),
                      __shfl_xor_sync(0xffffffffu, normaliser[r].y, step)};
      normaliser[r] = fold(normaliser[r], other);
    }
    if (threadIdx.x % 32 == 0) sPart[threadIdx.x / 32][r] = normaliser[r];
  }
  __syncthreads();
  if (static_cast<int32_t>(threadIdx.x) < p.num_queries) {
    float2 total = sPart[0][threadIdx.x];
    for (int warp = 1; warp < kFewWarps; ++warp) total = fold(total, sPart[warp][threadIdx.x]);
    const int64_t row = static_cast<int64_t>(head) * p.num_queries + threadIdx.x;
    reinterpret_cast<float2*>(p.workspace)[row * plan.key_parts + part] = total;
  }
}

// blockIdx.x = (batch row or head row of the output) * key blocks + key block.
__global__ void __launch_bounds__(kFewThreads, 4)
    few_scores_kernel(const __grid_constant__ AttentionScoresParams p, const __grid_constant__ Plan plan) {
  __shared__ RowState sRows[kFewRows];
  const int32_t key_blocks = (p.num_keys + kFewThreads - 1) / kFewThreads;
  const int32_t heads = p.head_reduce == Reduce::kNone ? 1 : p.num_heads;
  const int32_t out_row = blockIdx.x / key_blocks, n = blockIdx.x % key_blocks * kFewThreads + threadIdx.x;
  const int32_t first_head = out_row * heads, b = first_head / p.num_heads;
  const bool shown = n < p.num_keys && is_set(p.key_mask, b, n);
  const float factor = row_factor(p, b);
  const float* gLogits = p.workspace + plan.normaliser_floats;

  float score = 0.0f;
  for (int32_t head = first_head; head < first_head + heads; ++head) {
    __syncthreads();  // the rows of the previous head have been read
    const int32_t q = threadIdx.x;
    if (q < p.num_queries) {
      const RowState row = row_state(p, plan, b, head % p.num_heads, q);
      sRows[q] = row;
    }
    __syncthreads();
    float votes = 0.0f;
    for (int32_t q = 0; q < p.num_queries; ++q) {
      const RowState row = sRows[q];
      if (!shown || n >= row.limit) continue;
      const float logit = gLogits[(static_cast<int64_t>(head) * p.num_queries + q) * p.num_keys + n];
      votes = combine(votes, row.weight * exp2f(logit - row.shift), p.query_reduce == Reduce::kMax);
    }
    score = combine(score, votes * factor, p.head_reduce == Reduce::kMax);
  }
  if (p.head_reduce == Reduce::kMean) score = __fdiv_rn(score, static_cast<float>(heads));
  if (n < p.num_keys) p.out[static_cast<int64_t>(out_row) * p.num_keys + n] = score;
}

template <class T>
cudaError_t launch_few_rows(const AttentionScoresParams& p, const Plan& plan, cudaStream_t stream) {
  constexpr int kElements = 16 / sizeof(T);
  int key_lanes = 1;
  while (key_lanes < 32 && key_lanes * kElements < p.head_dim) key_lanes *= 2;
  const uint64_t bits =
      reinterpret_cast<uint64_t>(p.key) | (p.key_stride_batch | p.key_stride_head | p.key_stride_row) * sizeof(T);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(int64_t{p.batch} * p.num_heads * plan.key_parts));
  shape.block = dim3(kFewThreads);
  shape.shared_bytes = ceil_div<int64_t>(p.head_dim, kElements) * kElements * p.num_queries * sizeof(float);
  cudaError_t error = p.num_queries == 1
                          ? launch(few_logits_kernel<T, 1>, shape, stream, p, plan, key_lanes, bits % 16 == 0)
                          : launch(few_logits_kernel<T, kFewRows>, shape, stream, p, plan, key_lanes, bits % 16 == 0);
  if (error != cudaSuccess) return error;
  const int64_t out_rows = int64_t{p.batch} * (p.head_reduce == Reduce::kNone ? p.num_heads : 1);
  shape.grid = dim3(static_cast<unsigned>(out_rows * ceil_div<int64_t>(p.num_keys, kFewThreads)));
  shape.shared_bytes = 0;
  return launch(few_scores_kernel, shape, stream, p, plan);
}

}  // namespace
}  // namespace vtk
