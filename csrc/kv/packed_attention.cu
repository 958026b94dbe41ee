// packed_attention on CUDA: parts side by side (kv/packed_parts.cuh; float16 and bfloat16 on tensor cores, float32 on
// CUDA cores), then a block a row merges them in an order that the request alone decides.
#include "kv/packed_attention.h"

#include "kv/packed_float.cuh"
#include "kv/packed_mma.cuh"

namespace vtk {
namespace {

constexpr int kMergeThreads = 128, kMergeWarps = kMergeThreads / 32;
constexpr int kMergeChannels = 8;  // of a lane, at most: D <= 256

// blockIdx.x = (b Hk + key head) rows + row. Warp w adds the parts w, w + 4, ... in their order.
template <class T>
__global__ void __launch_bounds__(kMergeThreads) packed_merge_kernel(const __grid_constant__ PackedAttentionParams p) {
  __shared__ float sWeight[kMergeThreads], sReduce[kMergeWarps], sValues[kMergeWarps][32 * kMergeChannels];
  const Work w = work_of(p);
  const int32_t head = blockIdx.x / w.rows, r = blockIdx.x % w.rows, group = p.heads / p.key_heads;
  const int32_t parts = parts_of(p, head / p.key_heads), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t apart = partial_at(p, w, 0, 1, 0);
  const float* first = p.workspace + partial_at(p, w, head, 0, r);

  float most = kNoLogit, total = 0.0f;
  for (int32_t part = threadIdx.x; part < parts; part += kMergeThreads)
    most = fmaxf(most, first[part * apart + p.head_dim]);
  most = block_reduce<kMergeThreads>(most, Max(), sReduce);

  float values[kMergeChannels] = {};
  for (int32_t begin = 0; begin < parts; begin += kMergeThreads) {
    const int32_t mine = begin + threadIdx.x, count = min(kMergeThreads, parts - begin);
    if (mine < parts) {
      const float* partial = first + mine * apart + p.head_dim;
      const float weight = partial[1] == 0.0f ? 0.0f : ptx::exp2_approx(partial[0] - most);
      sWeight[threadIdx.x] = weight;
      total = fmaf(partial[1], weight, total);
    }
    __syncthreads();
#pragma unroll 2
    for (int32_t i = warp; i < count; i += kMergeWarps) {
      const float* partial = first + (begin + i) * apart;
#pragma unroll
      for (int k = 0; k < kMergeChannels; ++k)
        if (lane + 32 * k < p.head_dim) values[k] = fmaf(partial[lane + 32 * k], sWeight[i], values[k]);
    }
    __syncthreads();
  }
  total = block_reduce<kMergeThreads>(total, Sum(), sReduce);

#pragma unroll
  for (int k = 0; k < kMergeChannels; ++k) sValues[warp][lane + 32 * k] = values[k];
  __syncthreads();
  const PackedRow at = packed_row(r, group);
  const int64_t to = (static_cast<int64_t>(head) * group + at.head) * p.num_queries + at.query;
  for (int32_t c = threadIdx.x; c < p.head_dim; c += kMergeThreads) {
    float value = 0.0f;
    for (int i = 0; i < kMergeWarps; ++i) value += sValues[i][c];
    static_cast<T*>(p.out)[to * p.head_dim + c] = from_float<T>(total == 0.0f ? 0.0f : value / total);
  }
  if (threadIdx.x == 0) p.lse[to] = total == 0.0f ? kNoLogit : (most + log2f(total)) * kLn2;
}

cudaError_t launch_float_parts(const PackedAttentionParams& p, const dim3& grid, cudaStream_t stream) {
  LaunchShape shape;
  shape.grid = grid;
  shape.block = dim3(kThreads);
  shape.shared_bytes = float_shared_bytes(p);
  return launch(packed_float_kernel, shape, stream, p);
}

cudaError_t launch_mma_parts(const PackedAttentionParams& p, const dim3& grid, cudaStream_t stream) {
  const MmaPlan plan = mma_plan(p);
  LaunchShape shape;
  shape.grid = grid;
  shape.block = dim3(kMmaThreads);
  shape.shared_bytes = plan.shared_bytes;
  return launch(p.head_dim <= 128 ? packed_mma_kernel<1> : packed_mma_kernel<2>, shape, stream, p, plan);
}

template <class T>
cudaError_t run(const PackedAttentionParams& p, cudaStream_t stream) {
  const Work w = work_of(p);
  const unsigned heads = static_cast<unsigned>(p.batch) * p.key_heads;
  const dim3 grid(heads * w.row_blocks, w.parts);
  const cudaError_t error = sizeof(T) == 4 ? launch_float_parts(p, grid, stream) : launch_mma_parts(p, grid, stream);
  if (error != cudaSuccess) return error;
  LaunchShape merge;
  merge.grid = dim3(heads * w.rows);
  merge.block = dim3(kMergeThreads);
  return launch(packed_merge_kernel<T>, merge, stream, p);
}

}  // namespace

int64_t packed_attention_workspace(const PackedAttentionParams& p) {
  const Work w = work_of(p);
  return partial_at(p, w, int64_t{p.batch} * p.key_heads, 0, 0);
}

cudaError_t packed_attention_cuda(const PackedAttentionParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::kFloat32: return run<float>(p, stream);
    case DType::kFloat16: return run<__half>(p, stream);
    default: return run<__nv_bfloat16>(p, stream);
  }
}

}  // namespace vtk
