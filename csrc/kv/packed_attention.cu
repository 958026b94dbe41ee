// packed_attention on CUDA: parts (kv/packed_parts.cuh) side by side, then a warp a row merges them in their order.
#include "kv/packed_attention.h"

#include "kv/packed_float.cuh"
#include "kv/packed_mma.cuh"

namespace vtk {
namespace {

// grid: x = (b Hk + key head) rows + row; a warp
template <class T>
__global__ void __launch_bounds__(32) packed_merge_kernel(const __grid_constant__ PackedAttentionParams p) {
  const Work w = work_of(p);
  const int32_t head = blockIdx.x / w.rows, r = blockIdx.x % w.rows, group = p.heads / p.key_heads;
  float most = kNoLogit, total = 0.0f;
  for (int32_t part = 0; part < w.parts; ++part)
    most = fmaxf(most, p.workspace[partial_at(p, w, head, part, r) + p.head_dim]);
  const auto weight_of = [&](const float* partial) {
    return partial[p.head_dim + 1] == 0.0f ? 0.0f : ptx::exp2_approx(partial[p.head_dim] - most);
  };
  for (int32_t part = 0; part < w.parts; ++part) {
    const float* partial = p.workspace + partial_at(p, w, head, part, r);
    total += weight_of(partial) * partial[p.head_dim + 1];
  }
  const PackedRow at = packed_row(r, group);
  const int64_t to = (static_cast<int64_t>(head) * group + at.head) * p.num_queries + at.query;
  for (int32_t c = threadIdx.x; c < p.head_dim; c += 32) {
    float sum = 0.0f;
    for (int32_t part = 0; part < w.parts; ++part) {
      const float* partial = p.workspace + partial_at(p, w, head, part, r);
      sum += weight_of(partial) * partial[c];
    }
    static_cast<T*>(p.out)[to * p.head_dim + c] = from_float<T>(total == 0.0f ? 0.0f : sum / total);
  }
  if (threadIdx.x == 0) p.lse[to] = total == 0.0f ? kNoLogit : (most + log2f(total)) * kLn2;
}

cudaError_t launch_parts(const PackedAttentionParams& p, const dim3& grid, cudaStream_t stream) {
  LaunchShape shape;
  shape.grid = grid;
  shape.block = dim3(kThreads);
  shape.shared_bytes = float_shared_bytes(p);
  return launch(packed_float_kernel, shape, stream, p);
}

template <class T>
cudaError_t launch_mma_parts(const PackedAttentionParams& p, const dim3& grid, cudaStream_t stream) {
  const MmaPlan plan = mma_plan(p);
  LaunchShape shape;
  shape.grid = grid;
  shape.block = dim3(kMmaThreads);
  shape.shared_bytes = plan.shared_bytes;
  return launch(p.head_dim <= 128 ? packed_mma_kernel<T, 1> : packed_mma_kernel<T, 2>, shape, stream, p, plan);
}

template <class T>
cudaError_t run(const PackedAttentionParams& p, cudaStream_t stream) {
  const Work w = work_of(p);
  const unsigned heads = static_cast<unsigned>(p.batch) * p.key_heads;
  const dim3 grid(heads * w.row_blocks, w.parts);
  cudaError_t error;
  if constexpr (sizeof(T) == 4)
    error = launch_parts(p, grid, stream);
  else
    error = launch_mma_parts<T>(p, grid, stream);
  if (error != cudaSuccess) return error;
  LaunchShape merge;
  merge.grid = dim3(heads * w.rows);
  merge.block = dim3(32);
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
