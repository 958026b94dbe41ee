// unmerge on CUDA: one launch; a block copies the rows of 8 tokens in the widest vectors that fit.
//
//   bound   N rows written, and at most N read, over the memory bandwidth
#include "merge/unmerge.h"

#include "device/launch.h"
#include "device/tile.h"

namespace vtk {
namespace {

constexpr int kThreads = 256;
constexpr int kTokens = 8;  // of a block

// blockIdx.x = item * blocks + block of tokens.
template <class Vector>
__global__ void __launch_bounds__(kThreads) unmerge_kernel(const __grid_constant__ UnmergeParams p, int32_t blocks) {
  const int32_t b = blockIdx.x / blocks, first = blockIdx.x % blocks * kTokens;
  const int32_t vectors = static_cast<int32_t>(p.row_bytes / sizeof(Vector));
  for (int32_t e = threadIdx.x; e < min(kTokens, p.num_tokens - first) * vectors; e += kThreads) {
    const int32_t n = first + e / vectors;
    const int64_t row = p.owner[b * p.owner_stride_batch + n * p.owner_stride_token];
    Vector x = {};
    if (row >= 0 && row < p.num_rows)
      x = reinterpret_cast<const Vector*>(p.merged + b * p.stride_batch + row * p.stride_row)[e % vectors];
    reinterpret_cast<Vector*>(p.out + (static_cast<int64_t>(b) * p.num_tokens + n) * p.row_bytes)[e % vectors] = x;
  }
}

}  // namespace

cudaError_t unmerge_cuda(const UnmergeParams& p, cudaStream_t stream) {
  const uint64_t bits = reinterpret_cast<uint64_t>(p.merged) | reinterpret_cast<uint64_t>(p.out) | p.stride_batch |
                        p.stride_row | p.row_bytes;
  const int32_t blocks = ceil_div(p.num_tokens, kTokens);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(p.batch) * blocks);
  shape.block = dim3(kThreads);
  if (bits % 16 == 0) return launch(unmerge_kernel<uint4>, shape, stream, p, blocks);
  if (bits % 4 == 0) return launch(unmerge_kernel<uint32_t>, shape, stream, p, blocks);
  return launch(unmerge_kernel<uint16_t>, shape, stream, p, blocks);
}

}  // namespace vtk
