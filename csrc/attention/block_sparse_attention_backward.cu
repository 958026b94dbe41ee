// block_sparse_attention_backward on CUDA, sm_80 and later.
//
// P = m exp(scale q k + bias - lse), m: how often the key is listed;  dS = P (dO v^T - delta),  delta = out dO -
// grad_lse dq = scale dS k,  dk = scale dS^T q,  dv = P^T dO
//
//   delta            warp = row
//   mark             block = (batch, list head, query block): which chunks of keys its lists touch, a bit a chunk
//   query_gradient   block = (batch, head, up to 128 rows of a query block): the tiles of keys of the forward pass;
//                    warp = 16 rows x all keys of a tile
//   key_gradients    block = (batch, key head, chunk of up to 64 keys): tiles of the rows whose marks are set, head by
//                    head, query block by query block; warp = 16 keys x all rows of a tile. Above D 128 two warps share
//                    16 keys, half of the channels each, and both compute P and dS.
//
// Both gradients are the same loop (block_sparse_rows.cuh): two matrices stay, Q and dO or K and V, tiles of the other
// two pass by. A block sums in one order, so there is no atomic, and no bit depends on the number of rows in a block.
//
//   shared  two stages of two tiles of at most 8 KiB and 16 bytes a row, beside what stays: 36 to 68 KiB for dk and dv,
//           54 to 102 KiB for dq up to D 128; more rows stay where a block may have more, fewer where it may not
//   bound   10 D operations a listed pair. 14 D are done, for P and dO v^T are computed in both kernels, and 18 D above
//           D 128. Each chunk that a list touches reads the list whole, 32 entries a load.
//   lost    (by ptxas) tiles of 64 rows at D 64: 8 to 24 bytes of spills. Not timed on a GPU yet. One kernel for all
//           three gradients would do 10 D, but dq would be summed by float atomics, in another order in every run.
#include "attention/block_sparse_plan.cuh"
#include "attention/block_sparse_row_tiles.cuh"
#include "attention/block_sparse_rows.cuh"

namespace vtk {
namespace {

using BackwardParams = BlockSparseAttentionBackwardParams;

template <class Element, int kDepthBucket>
struct BackwardPolicy {
  using T = Element;
  static constexpr int kDepth = kDepthBucket;
  static constexpr int kFit = kTileDataBytes / (kDepth * static_cast<int>(sizeof(T)));
  static constexpr int kChunk = kFit >= 64 ? 64 : kFit >= 32 ? 32 : 16;  // keys that stay
  static constexpr int kTile = kChunk / 2;                               // rows or keys that pass by
  static constexpr int kChannelWarps = kDepth > 128 ? 2 : 1;
  static constexpr int kWarpChannels = kDepth / kChannelWarps;
  using QueryTile = typename TileOf<T, kDepth, kTile>::Type;
  using KeyGradientTile = typename TileOf<T, kDepth, kTile, kWarpChannels>::Type;

  static constexpr int kMaxRows = 128;
  static constexpr int kKeyThreads = kChunk / 16 * kChannelWarps * 32;
  // A register file holds 16, 12 or 8 warps with so many.
  static constexpr int kQueryRegisters = kDepth <= 64 ? 128 : kDepth <= 128 ? 168 : 255;
  static constexpr int kKeyRegisters = kDepth <= 64 ? 168 : 255;
  static constexpr int kRowBytes = QueryTile::kRowBytes;
  static constexpr int kTileBytes = kTile * kRowBytes, kStageBytes = 2 * kTileBytes;
  static constexpr int kOutFloats = kDepth + 8;  // a row of the sums in shared memory; 8 against bank conflicts
  static constexpr int kElements = 16 / sizeof(T);
  static constexpr int kVectors = kDepth / kElements;

  static constexpr int shared_bytes(int staying) { return 2 * staying * kRowBytes + 2 * kStageBytes; }
  static_assert(2 * kChunk * kOutFloats * 4 <= shared_bytes(kChunk), "both gradients are staged there");
  static_assert(kMaxRows * kOutFloats * 4 <= shared_bytes(kMaxRows), "and so is that of the queries");
};

struct BackwardPlan {
  Plan queries;  // of query_gradient
  Marks marks;
  int32_t chunks;  // of keys
};

// delta = out . grad_out - grad_lse; 0 of a row without keys.
template <class T>
__global__ void __launch_bounds__(256) delta_kernel(const __grid_constant__ BackwardParams params) {
  const BlockSparseAttentionParams& p = params.forward;
  const int64_t row = int64_t{blockIdx.x} * 8 + threadIdx.x / 32;
  if (row >= int64_t{p.batch} * p.num_heads * p.num_queries) return;
  const int64_t head = row / p.num_queries, query = row % p.num_queries;
  const T* gOut = static_cast<const T*>(p.out) + row * p.head_dim;
  const T* gGrad =
      head_of<T>(params.grad_out, head / p.num_heads, head % p.num_heads) + query * params.grad_out.stride_row;
  float delta = 0.0f;
  for (int32_t d = threadIdx.x % 32; d < p.head_dim; d += 32)
    delta = fmaf(to_float(gOut[d]), to_float(gGrad[d]), delta);
  delta = warp_reduce(delta, Sum{});
  if (threadIdx.x % 32 != 0) return;
  if (params.grad_lse != nullptr) delta -= params.grad_lse[row];
  params.delta[row] = p.lse[row] == -kInfinity ? 0.0f : delta;
}

constexpr int kMarkThreads = 128;
constexpr int kMarkWords = 1024;  // written at a time

template <int kChunk>
__global__ void __launch_bounds__(kMarkThreads)
    mark_kernel(const __grid_constant__ BlockSparseAttentionParams p, const __grid_constant__ Marks marks) {
  __shared__ uint32_t sWords[kMarkWords];
  const int32_t block = blockIdx.x % marks.query_blocks, head = blockIdx.x / marks.query_blocks;
  const int32_t b = head / marks.heads, h = head % marks.heads;
  const int32_t length = length_of(p, b), last_query = min((block + 1) * p.block_q, p.num_queries) - 1;
  const uint32_t last_limit = limit_of(p, last_query, length);
  for (int32_t first = 0; first < marks.row_words; first += kMarkWords) {
    for (int i = threadIdx.x; i < kMarkWords; i += kMarkThreads) sWords[i] = 0;
    __syncthreads();
    for_each_list(p, b, h, block, [&](const ListedRanges& ranges) {
      for (int32_t i = threadIdx.x; i < ranges.list.count; i += kMarkThreads) {
        const uint32_t begin = ranges.begin(i), limit = ranges.causal ? last_limit : length;
        if (begin >= limit) continue;
        const uint32_t last = min(begin + ranges.width, limit) - 1;
        for (uint32_t chunk = begin / kChunk; chunk <= last / kChunk; ++chunk) {
          const uint32_t word = chunk / 32 - first;
          if (word < kMarkWords) atomicOr(&sWords[word], 1u << chunk % 32);
        }
      }
    });
    __syncthreads();
    uint32_t* gWords = marks.row(b, h, block) + first;
    for (int i = threadIdx.x; i < min(kMarkWords, marks.row_words - first); i += kMarkThreads) gWords[i] = sWords[i];
  }
}

// Leaves the sums of a warp's rows in shared memory.
template <class P, class Tile>
__device__ void stage_sums(float* sSums, const typename Tile::Sums& sums, float factor) {
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i)
#pragma unroll
    for (int c = 0; c < Tile::kChannels; ++c)
      sSums[Tile::row(i) * P::kOutFloats + Tile::channel(c)] = sums[i][c] * factor;
}

// Writes staged rows to consecutive rows of a gradient, 16 bytes a thread; zeros where keep(row) is false.
template <class P, class Keep>
__device__ void write_rows(void* to, int64_t first_row, int32_t rows, int32_t depth, bool aligned, const float* sSums,
                           const Keep& keep) {
  for (int v = threadIdx.x; v < rows * P::kVectors; v += blockDim.x) {
    const int row = v / P::kVectors, d = v % P::kVectors * P::kElements;
    if (d >= depth) continue;
    float x[P::kElements];
#pragma unroll
    for (int i = 0; i < P::kElements; ++i) x[i] = keep(row) ? sSums[row * P::kOutFloats + d + i] : 0.0f;
    store_channels(static_cast<typename P::T*>(to) + (first_row + row) * depth + d, x, depth - d, aligned);
  }
}

template <class P>
__global__ void __maxnreg__(P::kQueryRegisters)
    query_gradient_kernel(const __grid_constant__ BackwardParams params, const __grid_constant__ BackwardPlan plan) {
  VTK_DYNAMIC_SHARED(shared);
  __shared__ Task sTask;
  __shared__ KeyLists<P::kTile> sLists;
  __shared__ KeyTile<P::kTile> sTiles[3];
  __shared__ int32_t sLimit[P::kMaxRows];
  __shared__ float sLse[P::kMaxRows], sDelta[P::kMaxRows];
  using T = typename P::T;
  using Tile = typename P::QueryTile;
  const BlockSparseAttentionParams& p = params.forward;
  const int32_t rows = plan.queries.rows, warp_row = threadIdx.x / 32 * 16;
  const int apart = rows * P::kRowBytes;
  unsigned char* sStages = shared + 2 * apart;

  // Open the lists, bring the queries and the gradients of their output.
  if (threadIdx.x == 0) {
    sTask.open<T>(p, plan.queries);
    if (sTask.num_rows > 0)
      sLists.open(p, sTask.b, sTask.h, sTask.block, sTask.place(p, plan.queries, 0).query,
                  sTask.place(p, plan.queries, sTask.num_rows - 1).query, 1, 0);
  }
  __syncthreads();
  if (sTask.num_rows <= 0) return;
  const int32_t num_rows = sTask.num_rows, first_query = sTask.place(p, plan.queries, 0).query;
  const int64_t first_row = sTask.out_row(p, plan.queries, 0);
  if (static_cast<int32_t>(threadIdx.x) < rows) {
    const int32_t row = min(static_cast<int32_t>(threadIdx.x), num_rows - 1);
    const float lse = p.lse[first_row + row];
    sLimit[threadIdx.x] = limit_of(p, first_query + row, sLists.length);
    sLse[threadIdx.x] = lse == -kInfinity ? kInfinity : lse * kLog2E;
    sDelta[threadIdx.x] = params.delta[first_row + row];
  }
  auto copy_pair_of = [&](const HeadPair<T>& from, int count, unsigned char* to, int bytes, const auto& row_at) {
    if (plan.queries.aligned)
      copy_pair<P, true, 2>(from, p.head_dim, count, to, bytes, row_at);
    else
      copy_pair<P, false, 1>(from, p.head_dim, count, to, bytes, row_at);
  };
  copy_pair_of({head_of<T>(p.query, sTask.b, sTask.h), head_of<T>(params.grad_out, sTask.b, sTask.h),
                p.query.stride_row, params.grad_out.stride_row},
               rows, shared, apart, [&](int row) { return row < num_rows ? first_query + row : kAbsent; });

  typename Tile::Sums out;
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i)
#pragma unroll
    for (int c = 0; c < Tile::kChannels; ++c) out[i][c] = 0.0f;

  int32_t to_list = 0;
  for_each_tile(
      sTiles, [&](KeyTile<P::kTile>& tile) { to_list = sLists.list(to_list, tile); },
      [&](const KeyTile<P::kTile>& tile, int stage) {
        copy_pair_of({static_cast<const T*>(sTask.key), static_cast<const T*>(sTask.value), p.key.stride_row,
                      p.value.stride_row},
                     P::kTile, sStages + stage * P::kStageBytes, P::kTileBytes, [&](int row) { return tile.key[row]; });
      },
      [&](const KeyTile<P::kTile>& tile, int stage) {
        const unsigned char* sQ = shared + warp_row * P::kRowBytes;
        const unsigned char* sK = sStages + stage * P::kStageBytes;
        typename Tile::Scores score, slope;

        // P
        Tile::multiply_transposed(score, sQ, sK);
        const float scale = p.scale * kLog2E;
#pragma unroll
        for (int j = 0; j < Tile::kColumns; ++j) {
          const float bias = tile.bias[Tile::column(j)];
#pragma unroll
          for (int i = 0; i < Tile::kRows; ++i)
            score[i][j] = ptx::exp2_approx(fmaf(score[i][j], scale, bias - sLse[warp_row + Tile::row(i)]));
        }
        if (tile.state != TileState::kWhole) {
          const bool causal = tile.state == TileState::kCausal;
#pragma unroll
          for (int j = 0; j < Tile::kColumns; ++j) {
            const int32_t n = tile.key[Tile::column(j)];
#pragma unroll
            for (int i = 0; i < Tile::kRows; ++i)
              if (n >= (causal ? sLimit[warp_row + Tile::row(i)] : kAbsent)) score[i][j] = 0.0f;
          }
        }

        // dS
        Tile::multiply_transposed(slope, sQ + apart, sK + P::kTileBytes);
#pragma unroll
        for (int i = 0; i < Tile::kRows; ++i) {
          const float delta = sDelta[warp_row + Tile::row(i)];
#pragma unroll
          for (int j = 0; j < Tile::kColumns; ++j) score[i][j] *= slope[i][j] - delta;
        }
        Tile::multiply(out, score, sK);
      });

  float* sSums = reinterpret_cast<float*>(shared);
  stage_sums<P, Tile>(sSums + warp_row * P::kOutFloats, out, p.scale);
  __syncthreads();
  write_rows<P>(params.grad_query, first_row, num_rows, p.head_dim, plan.queries.out_aligned, sSums,
                [&](int row) { return sLse[row] != kInfinity; });
}

template <class P>
__global__ void __maxnreg__(P::kKeyRegisters)
    key_gradients_kernel(const __grid_constant__ BackwardParams params, const __grid_constant__ BackwardPlan plan) {
  VTK_DYNAMIC_SHARED(shared);
  __shared__ RowLists<P::kTile, P::kChunk> sLists;
  __shared__ RowTile<P::kTile, P::kChunk> sTiles[3];
  using T = typename P::T;
  using Tile = typename P::KeyGradientTile;
  const BlockSparseAttentionParams& p = params.forward;
  const int warp = threadIdx.x / 32, warp_key = warp / P::kChannelWarps * 16;
  const int warp_channel = warp % P::kChannelWarps * P::kWarpChannels;
  constexpr int kApart = P::kChunk * P::kRowBytes;
  unsigned char* sStages = shared + 2 * kApart;
  // The first chunks first: under a causal mask these are seen by most.
  const int32_t heads = p.batch * p.key_heads, chunk = blockIdx.x / heads, number = blockIdx.x % heads;
  const int32_t b = number / p.key_heads, key_head = number % p.key_heads, first_key = chunk * P::kChunk;

  // Open the lists, bring keys and values.
  if (warp == 0) sLists.open(p, b, key_head, chunk);
  __syncthreads();
  auto copy_pair_of = [&](const HeadPair<T>& from, int count, unsigned char* to, int bytes, const auto& row_at) {
    if (plan.queries.aligned)
      copy_pair<P, true, 2>(from, p.head_dim, count, to, bytes, row_at);
    else
      copy_pair<P, false, 1>(from, p.head_dim, count, to, bytes, row_at);
  };
  copy_pair_of({head_of<T>(p.key, b, key_head), head_of<T>(p.value, b, key_head), p.key.stride_row, p.value.stride_row},
               P::kChunk, shared, kApart, [&](int row) { return sLists.exists[row] ? first_key + row : kAbsent; });

  typename Tile::Sums grad_key, grad_value;
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i)
#pragma unroll
    for (int c = 0; c < Tile::kChannels; ++c) grad_key[i][c] = grad_value[i][c] = 0.0f;

  int32_t to_list = 0;
  for_each_tile(
      sTiles, [&](RowTile<P::kTile, P::kChunk>& tile) { to_list = sLists.list(params, plan.marks, to_list, tile); },
      [&](const RowTile<P::kTile, P::kChunk>& tile, int stage) {
        copy_pair_of({head_of<T>(p.query, b, tile.head), head_of<T>(params.grad_out, b, tile.head), p.query.stride_row,
                      params.grad_out.stride_row},
                     P::kTile, sStages + stage * P::kStageBytes, P::kTileBytes,
                     [&](int row) { return tile.lse[row] != kInfinity ? tile.first_query + row : kAbsent; });
      },
      [&](const RowTile<P::kTile, P::kChunk>& tile, int stage) {
        const unsigned char* sK = shared + warp_key * P::kRowBytes;
        const unsigned char* sQ = sStages + stage * P::kStageBytes;
        const unsigned char* sGrad = sQ + P::kTileBytes;
        const int channel_bytes = warp_channel * static_cast<int>(sizeof(T));
        typename Tile::Scores score, slope;

        // P^T
        Tile::multiply_transposed(score, sK, sQ);
        const float scale = p.scale * kLog2E;
#pragma unroll
        for (int j = 0; j < Tile::kColumns; ++j) {
          const float lse = tile.lse[Tile::column(j)];
#pragma unroll
          for (int i = 0; i < Tile::kRows; ++i)
            score[i][j] = ptx::exp2_approx(fmaf(score[i][j], scale, sLists.bias[warp_key + Tile::row(i)] - lse));
        }
        if (tile.state != TileState::kWhole) {
#pragma unroll
          for (int i = 0; i < Tile::kRows; ++i) {
            const int key = warp_key + Tile::row(i);
            const float causal = tile.causal[key], full = tile.full[key];
            const int32_t hidden_from = first_key + key - tile.first_limit;  // rows up to this one, under the mask
#pragma unroll
            for (int j = 0; j < Tile::kColumns; ++j) {
              const float times = full + (Tile::column(j) > hidden_from ? causal : 0.0f);
              score[i][j] = times == 0.0f ? 0.0f : times * score[i][j];
            }
          }
        }
        Tile::multiply(grad_value, score, sGrad + channel_bytes);

        // dS^T
        Tile::multiply_transposed(slope, sK + kApart, sGrad);
#pragma unroll
        for (int j = 0; j < Tile::kColumns; ++j) {
          const float delta = tile.delta[Tile::column(j)];
#pragma unroll
          for (int i = 0; i < Tile::kRows; ++i) score[i][j] *= slope[i][j] - delta;
        }
        Tile::multiply(grad_key, score, sQ + channel_bytes);
      });

  float *sGradKey = reinterpret_cast<float*>(shared), *sGradValue = sGradKey + P::kChunk * P::kOutFloats;
  const int staged = warp_key * P::kOutFloats + warp_channel;
  stage_sums<P, Tile>(sGradKey + staged, grad_key, p.scale);
  stage_sums<P, Tile>(sGradValue + staged, grad_value, 1.0f);
  __syncthreads();
  // NOTE: a NaN of a row reaches every key of the chunk through 0 NaN; keys that no list names stay 0.
  const int64_t first_row = int64_t{number} * p.num_keys + first_key;
  const int32_t rows = min(P::kChunk, p.num_keys - first_key);
  auto write = [&](void* to, const float* sSums) {
    write_rows<P>(to, first_row, rows, p.head_dim, plan.queries.out_aligned, sSums,
                  [&](int row) { return sLists.listed[row]; });
  };
  write(params.grad_key, sGradKey);
  write(params.grad_value, sGradValue);
}

inline bool heads_share_lists(const BlockSparseAttentionParams& p) {
  for (const BlockLists* lists : {&p.partial, &p.full, &p.columns})
    if (lists->count_stride_head != 0 || lists->entry_stride_head != 0) return false;
  return true;
}

template <class P>
BackwardPlan make_backward_plan(const BackwardParams& params) {
  using T = typename P::T;
  const BlockSparseAttentionParams& p = params.forward;
  BackwardPlan plan = {};
  plan.chunks = ceil_div(p.num_keys, P::kChunk);
  plan.marks = {static_cast<uint32_t*>(params.workspace), heads_share_lists(p) ? 1 : p.num_heads,
                ceil_div(p.num_queries, p.block_q), ceil_div(plan.chunks, 32)};
  Plan& queries = plan.queries;
  queries.group = queries.parts = 1;
  queries.query_blocks = plan.marks.query_blocks;
  const int32_t list_rows = std::min(p.block_q, p.num_queries);
  for (queries.rows = 16; queries.rows < std::min(list_rows, P::kMaxRows);) queries.rows *= 2;
  constexpr int kStaticBytes = 4 << 10;  // at most
  while (queries.rows > 16 && P::shared_bytes(queries.rows) + kStaticBytes > max_shared_bytes()) queries.rows /= 2;
  queries.row_tiles = ceil_div(list_rows, queries.rows);
  auto bits = [](const HeadsView& x) {
    return reinterpret_cast<uint64_t>(x.data) | (x.stride_batch | x.stride_head | x.stride_row) * sizeof(T);
  };
  queries.out_aligned = p.head_dim * sizeof(T) % 16 == 0;
  queries.aligned =
      queries.out_aligned && (bits(p.query) | bits(p.key) | bits(p.value) | bits(params.grad_out)) % 16 == 0;
  return plan;
}

template <class P>
cudaError_t launch_backward(const BackwardParams& params, cudaStream_t stream) {
  const BlockSparseAttentionParams& p = params.forward;
  const BackwardPlan plan = make_backward_plan<P>(params);
  const int64_t heads = int64_t{p.batch} * p.num_heads;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(ceil_div<int64_t>(heads * p.num_queries, 8)));
  shape.block = dim3(256);
  if (cudaError_t error = launch(delta_kernel<typename P::T>, shape, stream, params); error != cudaSuccess)
    return error;

  shape.grid = dim3(static_cast<unsigned>(p.batch * plan.marks.heads * plan.marks.query_blocks));
  shape.block = dim3(kMarkThreads);
  if (cudaError_t error = launch(mark_kernel<P::kChunk>, shape, stream, p, plan.marks); error != cudaSuccess)
    return error;

  shape.grid = dim3(static_cast<unsigned>(heads * plan.queries.query_blocks * plan.queries.row_tiles));
  shape.block = dim3(plan.queries.rows / 16 * 32);
  shape.shared_bytes = P::shared_bytes(plan.queries.rows);
  if (cudaError_t error = launch(query_gradient_kernel<P>, shape, stream, params, plan); error != cudaSuccess)
    return error;

  shape.grid = dim3(static_cast<unsigned>(int64_t{p.batch} * p.key_heads * plan.chunks));
  shape.block = dim3(P::kKeyThreads);
  shape.shared_bytes = P::shared_bytes(P::kChunk);
  return launch(key_gradients_kernel<P>, shape, stream, params, plan);
}

// run(BackwardPolicy<...>{}) with the policy of these shapes.
template <class T, class Run>
auto with_backward_depth(int32_t depth, const Run& run) {
  if (depth <= 64) return run(BackwardPolicy<T, 64>{});
  if constexpr (sizeof(T) == 2)
    if (depth <= 96) return run(BackwardPolicy<T, 96>{});
  if (depth <= 128) return run(BackwardPolicy<T, 128>{});
  return run(BackwardPolicy<T, 256>{});
}

template <class Run>
auto with_backward_policy(const BlockSparseAttentionParams& p, const Run& run) {
  switch (p.dtype) {
    case DType::kFloat32: return with_backward_depth<float>(p.head_dim, run);
    case DType::kFloat16: return with_backward_depth<__half>(p.head_dim, run);
    default: return with_backward_depth<__nv_bfloat16>(p.head_dim, run);
  }
}

}  // namespace

int64_t block_sparse_attention_backward_workspace(const BackwardParams& params) {
  return with_backward_policy(params.forward, [&](auto policy) -> int64_t {
    return make_backward_plan<decltype(policy)>(params).marks.count(params.forward.batch) * sizeof(uint32_t);
  });
}

cudaError_t block_sparse_attention_backward_cuda(const BackwardParams& params, cudaStream_t stream) {
  return with_backward_policy(params.forward,
                              [&](auto policy) { return launch_backward<decltype(policy)>(params, stream); });
}

}  // namespace vtk
