// kv_compact on CUDA: one launch; a block copies 16 tokens of one head and side in the widest vectors that fit.
//
//   bound   rows of keys and values read and written, over the memory bandwidth
#include "kv/kv_compact.h"

#include "device/launch.h"
#include "device/tile.h"

namespace vtk {
namespace {

constexpr int kThreads = 256;
constexpr int kTokens = 16;  // of a block: 256 vectors of 16 bytes for 128 channels of 2 bytes

// blockIdx.x = (item * heads + head) * blocks + block of tokens, blockIdx.y = side.
template <class Vector>
__global__ void __launch_bounds__(kThreads)
    kv_compact_kernel(const __grid_constant__ KvCompactParams p, int32_t blocks) {
  const int32_t head = blockIdx.x / blocks, first = blockIdx.x % blocks * kTokens;
  const int32_t b = head / p.heads, h = head % p.heads;
  const int32_t vectors = static_cast<int32_t>(p.row_bytes / sizeof(Vector));
  char* gOut = p.to[blockIdx.y] + static_cast<int64_t>(head) * p.kept * p.row_bytes;
  for (int32_t e = threadIdx.x; e < min(kTokens, p.kept - first) * vectors; e += kThreads) {
    const int32_t i = first + e / vectors;
    const int64_t n = max(int64_t{0}, min(p.index(b, h, i), int64_t{p.num_tokens} - 1));
    const Vector* row = reinterpret_cast<const Vector*>(p.from[blockIdx.y].at(b, h, n));
    reinterpret_cast<Vector*>(gOut + i * p.row_bytes)[e % vectors] = row[e % vectors];
  }
}

}  // namespace

cudaError_t kv_compact_cuda(const KvCompactParams& p, cudaStream_t stream) {
  uint64_t bits = p.row_bytes;
  for (int side = 0; side < 2; ++side) {
    const KvView<const char>& x = p.from[side];
    bits |= reinterpret_cast<uint64_t>(x.data) | reinterpret_cast<uint64_t>(p.to[side]);
    bits |= x.stride_batch | x.stride_head | x.stride_row;
  }
  const int32_t blocks = ceil_div(p.kept, kTokens);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(p.batch) * p.heads * blocks, 2);
  shape.block = dim3(kThreads);
  if (bits % 16 == 0) return launch(kv_compact_kernel<uint4>, shape, stream, p, blocks);
  if (bits % 4 == 0) return launch(kv_compact_kernel<uint32_t>, shape, stream, p, blocks);
  return launch(kv_compact_kernel<uint16_t>, shape, stream, p, blocks);
}

}  // namespace vtk
