// nearest_match on CUDA: three launches, no [N, K] in memory, no host synchronisation.
//
//   prepare  one block an item settles its centers and lists them; the others: the term of a token, a warp each
//   match    block = (item, 64 tokens, part of the centers): nearest_rows.cuh
//   finish   a thread a token: its best edge over the parts
//
// A centre owns itself from the start: an atomic minimum over owner as unsigned numbers, of which -1 is the largest, so
// the first of equal centers stands in every run.
//
//   shared  match: 68 KiB and 512 bytes of terms
//   bound   2 N K C operations an item, where K is beyond about 100; else N rows over the memory bandwidth
//
// A center outside [0, N), an invalid one and a repetition count as none: a report needs a sync.
#include "merge/nearest_match.h"

#include "device/launch.h"
#include "device/tile.h"
#include "merge/nearest_rows.cuh"

namespace vtk {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

struct Workspace {
  int32_t parts, part_tiles;  // blocks that share a token tile, center tiles of each
  EdgeRank* edges;            // [B, parts, N]
  float* terms;               // [B, N]
  int32_t* tokens;            // [B, K], of the centers there are
  int32_t* rows;              // [B, K], theirs
  int32_t* counts;            // [B]
  int64_t bytes;
};

Workspace make_workspace(const NearestMatchParams& p) {
  Workspace w = {};
  const TileParts shared = share_tiles(p.batch, p.num_tokens, p.num_centers);
  w.parts = shared.parts;
  w.part_tiles = shared.part_tiles;

  WorkspaceLayout take{p.workspace};
  const int64_t tokens = int64_t{p.batch} * p.num_tokens, centers = int64_t{p.batch} * p.num_centers;
  take(w.edges, tokens * w.parts);
  take(w.terms, tokens);
  take(w.tokens, centers);
  take(w.rows, centers);
  take(w.counts, p.batch);
  w.bytes = take.bytes;
  return w;
}

__device__ bool is_valid(const NearestMatchParams& p, int32_t b, int64_t n) {
  return p.valid.data == nullptr || p.valid.data[b * p.valid.stride_row + n * p.valid.stride_col];
}

// blockIdx.x = item * blocks + block; block 0 settles the centers.
template <class T>
__global__ void __launch_bounds__(kThreads) nearest_prepare_kernel(const __grid_constant__ NearestMatchParams p,
                                                                   const __grid_constant__ Workspace w, int blocks) {
  __shared__ int32_t sWarps[kWarps];
  const int32_t b = blockIdx.x / blocks, block = blockIdx.x % blocks;
  if (block > 0) {
    const int32_t n = (block - 1) * kWarps + threadIdx.x / 32;
    if (n >= p.num_tokens) return;
    const T* row = static_cast<const T*>(p.metric) + b * p.stride_batch + n * p.stride_token;
    const float squared = squared_norm(row, p.channels);
    const float term = p.distance == Distance::kCosine ? inverse_norm(squared) : distance_term(squared);
    if (threadIdx.x % 32 == 0) w.terms[static_cast<int64_t>(b) * p.num_tokens + n] = term;
    return;
  }

  int64_t* gOwner = p.owner + static_cast<int64_t>(b) * p.num_tokens;
  auto center = [&](int32_t k) {
    const int64_t n = p.centers[b * p.centers_stride_batch + k * p.centers_stride_row];
    return n >= 0 && n < p.num_tokens && is_valid(p, b, n) ? static_cast<int32_t>(n) : -1;
  };
  for (int32_t n = threadIdx.x; n < p.num_tokens; n += kThreads) gOwner[n] = -1;
  __syncthreads();
  for (int32_t k = threadIdx.x; k < p.num_centers; k += kThreads)
    if (center(k) >= 0) atomicMin(reinterpret_cast<unsigned long long*>(gOwner + center(k)), 0ull + k);
  __syncthreads();
  const int64_t at = static_cast<int64_t>(b) * p.num_centers;
  const int32_t count = enumerate<kThreads>(
      p.num_centers, sWarps, [&](int32_t k) { return center(k) >= 0 && gOwner[center(k)] == k; },
      [&](int32_t k, int32_t i) {
        w.tokens[at + i] = center(k);
        w.rows[at + i] = k;
      });
  if (threadIdx.x == 0) w.counts[b] = count;
}

// Tokens in their order.
template <class T>
struct AllRows {
  const T* data;
  int64_t stride;
  const float* terms;
  int32_t count;
  bool aligned;
  __device__ const T* row(int32_t i) const { return data + i * stride; }
  __device__ float term(int32_t i) const { return terms[i]; }
};

// blockIdx.x = (item * token tiles + token tile) * parts + part.
template <class T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    nearest_match_kernel(const __grid_constant__ NearestMatchParams p, const __grid_constant__ Workspace w,
                         bool aligned) {
  VTK_DYNAMIC_SHARED(shared);
  __shared__ float sTerms[2][kTile];
  const int32_t token_tiles = ceil_div(p.num_tokens, kTile);
  const int32_t part = blockIdx.x % w.parts, tile = blockIdx.x / w.parts % token_tiles;
  const int32_t b = blockIdx.x / w.parts / token_tiles;
  const T* gMetric = static_cast<const T*>(p.metric) + b * p.stride_batch;
  const float* gTerms = w.terms + static_cast<int64_t>(b) * p.num_tokens;
  const AllRows<T> tokens = {gMetric, p.stride_token, gTerms, p.num_tokens, aligned};
  const ListedRows<T> centers = {gMetric, p.stride_token, w.tokens + static_cast<int64_t>(b) * p.num_centers,
                                 gTerms,  w.counts[b],    aligned};
  const int32_t first = part * w.part_tiles;
  const int32_t count = min(w.part_tiles, ceil_div(centers.count, kTile) - first);
  EdgeRank* gEdges = w.edges + (static_cast<int64_t>(b) * w.parts + part) * p.num_tokens;
  nearest_rows<T>(
      shared, sTerms, tokens, tile * kTile, centers, first, count, p.channels,
      [&](float dot, float token, float center) { return score_of(p.distance, dot, token, center); },
      [&](int32_t n, EdgeRank edge) { gEdges[n] = edge; });
}

// A thread a token.
__global__ void __launch_bounds__(kThreads)
    nearest_finish_kernel(const __grid_constant__ NearestMatchParams p, const __grid_constant__ Workspace w) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= static_cast<int64_t>(p.batch) * p.num_tokens) return;
  const int32_t b = static_cast<int32_t>(i / p.num_tokens), n = static_cast<int32_t>(i % p.num_tokens);
  if (p.owner[i] >= 0) {
    p.similarity[i] = own_similarity(p.distance);
    return;
  }
  EdgeRank edge = 0;
  if (is_valid(p, b, n))
    for (int32_t part = 0; part < w.parts; ++part)
      edge = max(edge, w.edges[(static_cast<int64_t>(b) * w.parts + part) * p.num_tokens + n]);
  p.similarity[i] = edge == 0 ? -INFINITY : similarity_of(p.distance, similarity_of(key_of(edge)));
  if (edge != 0) p.owner[i] = w.rows[static_cast<int64_t>(b) * p.num_centers + index_of(edge)];
}

template <class T>
cudaError_t run(const NearestMatchParams& p, cudaStream_t stream) {
  const Workspace w = make_workspace(p);
  const uint64_t bits = reinterpret_cast<uint64_t>(p.metric) |
                        (static_cast<uint64_t>(p.stride_batch) | p.stride_token | p.channels) * sizeof(T);
  const int blocks = 1 + ceil_div(p.num_tokens, kWarps);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(p.batch) * blocks);
  shape.block = dim3(kThreads);
  cudaError_t error = launch(nearest_prepare_kernel<T>, shape, stream, p, w, blocks);
  if (error != cudaSuccess) return error;
  shape.grid = dim3(static_cast<unsigned>(p.batch) * ceil_div(p.num_tokens, kTile) * w.parts);
  shape.block = dim3(kTileThreads);
  shape.shared_bytes = kTileProductBytes;
  error = launch(nearest_match_kernel<T>, shape, stream, p, w, bits % 16 == 0);
  if (error != cudaSuccess) return error;
  shape.grid = dim3(static_cast<unsigned>(ceil_div(int64_t{p.batch} * p.num_tokens, int64_t{kThreads})));
  shape.block = dim3(kThreads);
  shape.shared_bytes = 0;
  return launch(nearest_finish_kernel, shape, stream, p, w);
}

}  // namespace

int64_t nearest_match_workspace(const NearestMatchParams& p) { return make_workspace(p).bytes; }

cudaError_t nearest_match_cuda(const NearestMatchParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::kFloat32: return run<float>(p, stream);
    case DType::kFloat16: return run<__half>(p, stream);
    default: return run<__nv_bfloat16>(p, stream);
  }
}

}  // namespace vtk
