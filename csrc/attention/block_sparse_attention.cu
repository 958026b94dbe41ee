// block_sparse_attention and rule_attention on CUDA, sm_80 and later.
//
// out_i = sum over listed n of softmax_n(scale q_i k_n + bias_n) v_n, logits in powers of two, online softmax
//
//   attend  block = (batch, head, up to 128 rows of a query block, part of its lists). Few queries: the heads of a key
//           head are rows of one block where they share their lists.
//     many rows  warp = 16 rows x all keys of a tile (64 keys; 32 or 16 where a row is longer than 256 bytes)
//     few rows   up to 16 rows (decoding): warp = these x 16 keys of a tile (float32: 8); warps are merged at the end
//   merge   block = row: adds the parts in their order. Only where lists were cut, which depends on shapes alone.
//
// Warp 0 turns lists into key numbers two tiles ahead (block_sparse_key_tiles.cuh); all threads copy the rows of K and
// V by these numbers one tile ahead, 16 bytes a cp.async, so blocks, unaligned ranges and columns cost the same. Tiles
// that every row sees whole skip the masks. One barrier a tile. Products: block_sparse_warp.cuh. Query blocks are taken
// last first, longest first under a causal mask; lists of other lengths are not sorted.
//
//   shared  two stages of K and V: 68 KiB at 256 bytes a row and above, 256 (row + 16) bytes below; Q on top where the
//           registers do not hold it (float32, D 256)
//   bound   4 D operations a listed pair; R rows do R operations a byte from L2. Few rows: reading K and V once.
//   lost    (by ptxas) lists, task and causal limits in registers, or masks that load keys and bias together: 20 to
//           80 bytes of spills at 168 registers (D 128, 12 warps resident). Not timed on a GPU yet.
#include "attention/block_sparse_plan.cuh"
#include "attention/block_sparse_rows.cuh"

namespace vtk {
namespace {

// The rows of Q; zeros beyond the block's.
template <class P, bool kAligned>
__device__ void copy_queries(const BlockSparseAttentionParams& p, const Plan& plan, const Task& task,
                             unsigned char* sQ) {
  using T = typename P::T;
  const T* gQ = static_cast<const T*>(p.query.data) + task.b * p.query.stride_batch;
  for_each_vector<P, 1>(plan.rows, [&](int row, int offset, int d) {
    const Place at = task.place(p, plan, row);
    const T* gRow = gQ + at.head * p.query.stride_head + at.query * p.query.stride_row;
    copy_vector<kAligned>(sQ + offset, row < task.num_rows ? gRow : nullptr, gQ, d, p.head_dim);
  });
  ptx::cp_async_commit();
}

// The rows of K and V that a tile lists.
template <class P, bool kAligned>
__device__ void copy_tile(const BlockSparseAttentionParams& p, const KeyTile<P::kKeys>& tile, const Task& task,
                          unsigned char* sK) {
  using T = typename P::T;
  const HeadPair<T> keys = {static_cast<const T*>(task.key), static_cast<const T*>(task.value), p.key.stride_row,
                            p.value.stride_row};
  copy_pair<P, kAligned, 4>(keys, p.head_dim, P::kKeys, sK, P::kTileBytes, [&](int row) { return tile.key[row]; });
}

// The running softmax of a lane's rows. Sums are those of the lane's keys.
template <class Warp>
struct RunningRows {
  float most[Warp::kRows];  // in powers of two
  float sum[Warp::kRows];
};

// Turns the products of a tile into weights, and scales what was summed before to the new maximum. sLimit: of the
// warp's rows, under the causal mask; kMaxRows behind it, with a rule, minus the first key of their windows.
template <class Warp, int kMaxRows, int kKeys>
__device__ void weigh(Warp& warp, RunningRows<Warp>& rows, const KeyTile<kKeys>& tile, int first_key,
                      const int32_t* sLimit, float scale, bool biased) {
  float factor = scale;
  if (tile.state != TileState::kWhole) {
    // NOTE: bias and keys one after the other: both at once are more registers than there are.
    if (biased) {
#pragma unroll
      for (int j = 0; j < Warp::kColumns; ++j)
#pragma unroll
        for (int i = 0; i < Warp::kRows; ++i)
          warp.score[i][j] = fmaf(warp.score[i][j], scale, tile.bias[first_key + Warp::column(j)]);
    } else {
#pragma unroll
      for (int j = 0; j < Warp::kColumns; ++j)
#pragma unroll
        for (int i = 0; i < Warp::kRows; ++i) warp.score[i][j] *= scale;
    }
    // NOTE: both tests by one loop, for registers again: n < window is ~n >= -window.
#pragma unroll 1
    for (int32_t flip = 0;; flip = -1) {
      int32_t limit[Warp::kRows];
#pragma unroll
      for (int i = 0; i < Warp::kRows; ++i)
        limit[i] = tile.state >= TileState::kCausal ? sLimit[(flip & kMaxRows) + Warp::row(i)] : kAbsent;
#pragma unroll
      for (int j = 0; j < Warp::kColumns; ++j) {
        const int32_t n = tile.key[first_key + Warp::column(j)] ^ flip;
#pragma unroll
        for (int i = 0; i < Warp::kRows; ++i)
          if (n >= limit[i]) warp.score[i][j] = -kInfinity;
      }
      if (tile.state != TileState::kBanded || flip != 0) break;
    }
    factor = 1.0f;
  }
#pragma unroll
  for (int i = 0; i < Warp::kRows; ++i) {
    // The maximum may miss a NaN, the sum does not.
    float best = warp.score[i][0];
#pragma unroll
    for (int j = 1; j < Warp::kColumns; ++j) best = fmaxf(best, warp.score[i][j]);
    best = fmaxf(rows.most[i], factor * warp_reduce<Warp::kRowLanes>(best, Max{}));
    const float shift = best == -kInfinity ? 0.0f : best;
    const float correct = ptx::exp2_approx(rows.most[i] - shift);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < Warp::kColumns; ++j) {
      warp.score[i][j] = ptx::exp2_approx(fmaf(warp.score[i][j], factor, -shift));
      sum += warp.score[i][j];
    }
    rows.sum[i] = fmaf(rows.sum[i], correct, sum);
    rows.most[i] = best;
#pragma unroll
    for (int c = 0; c < Warp::kChannels; ++c) warp.out[i][c] *= correct;
  }
}

__device__ inline float lse_of(float most, float sum) { return sum == 0.0f ? -kInfinity : (most + log2f(sum)) * kLn2; }

template <class P>
__global__ void __maxnreg__(P::kRegisters)
    attend_kernel(const __grid_constant__ BlockSparseAttentionParams p, const __grid_constant__ Plan plan) {
  VTK_DYNAMIC_SHARED(shared);
  __shared__ Task sTask;
  __shared__ KeyLists<P::kKeys> sLists;
  __shared__ KeyTile<P::kKeys> sTiles[3];  // multiplied, copied, listed
  __shared__ int32_t sLimit[2 * P::kMaxRows];
  __shared__ float2 sState[P::kKeyWarps * P::kMaxRows];
  using T = typename P::T;
  using Warp = typename P::Warp;
  const int warp_number = threadIdx.x / 32;
  const int warp_row = warp_number / P::kKeyWarps * 16, warp_key = warp_number % P::kKeyWarps * P::kWarpKeys;
  unsigned char* sStages = shared + P::query_bytes(plan.rows);
  const unsigned char* sQ = shared + warp_row * P::kRowBytes;

  // Open the lists, bring the queries.
  if (threadIdx.x == 0) {
    sTask.open<T>(p, plan);
    if (sTask.num_rows > 0)
      sLists.open(p, sTask.b, sTask.h, sTask.block, sTask.place(p, plan, 0).query,
                  sTask.place(p, plan, sTask.num_rows - 1).query, plan.parts, sTask.part);
  }
  __syncthreads();
  if (sTask.num_rows <= 0) return;
  if (plan.aligned)
    copy_queries<P, true>(p, plan, sTask, shared);
  else
    copy_queries<P, false>(p, plan, sTask, shared);
  if (static_cast<int32_t>(threadIdx.x) < plan.rows) {
    const int32_t row = min(static_cast<int32_t>(threadIdx.x), sTask.num_rows - 1);
    const int32_t query = sTask.place(p, plan, row).query;
    sLimit[threadIdx.x] = limit_of(p, query, sLists.length);
    if (sLists.ruled) sLimit[P::kMaxRows + threadIdx.x] = -sLists.window_of(query);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  int32_t to_list = sLists.tiles.begin;
  if (warp_number == 0) {
    to_list = sLists.list(to_list, sTiles[0]);
    to_list = sLists.list(to_list, sTiles[1]);
  }
  Warp warp;
  warp.hold_query(sQ);
  __syncthreads();  // the keys are listed, and the queries held, before the stages are filled

  RunningRows<Warp> rows;
#pragma unroll
  for (int i = 0; i < Warp::kRows; ++i) {
    rows.most[i] = -kInfinity;
    rows.sum[i] = 0.0f;
#pragma unroll
    for (int c = 0; c < Warp::kChannels; ++c) warp.out[i][c] = 0.0f;
  }

  auto copy = [&](const KeyTile<P::kKeys>& tile, unsigned char* sK) {
    if (tile.state == TileState::kEnd) return;
    if (plan.aligned)
      copy_tile<P, true>(p, tile, sTask, sK);
    else
      copy_tile<P, false>(p, tile, sTask, sK);
  };
  copy(sTiles[0], sStages);

  int now = 0, stage = 0;
  while (sTiles[now].state != TileState::kEnd) {
    // This tile has come, and the one before is done with.
    ptx::cp_async_wait<0>();
    __syncthreads();
    const int next = now == 2 ? 0 : now + 1;
    if (warp_number == 0) to_list = sLists.list(to_list, sTiles[next == 2 ? 0 : next + 1]);
    copy(sTiles[next], sStages + (stage ^ 1) * P::kStageBytes);

    // Multiply.
    const unsigned char* sK = sStages + stage * P::kStageBytes + warp_key * P::kRowBytes;
    warp.multiply_keys(sQ, sK);
    weigh<Warp, P::kMaxRows>(warp, rows, sTiles[now], warp_key, sLimit + warp_row, p.scale * kLog2E,
                             p.key_bias != nullptr);
    warp.multiply_values(sK + P::kTileBytes);
    now = next;
    stage ^= 1;
  }

  // Leave values, maxima and sums where all threads see them.
  __syncthreads();
  float* sOut = reinterpret_cast<float*>(shared);  // [key warps][rows][kOutFloats]
  const int first_staged = warp_number % P::kKeyWarps * plan.rows + warp_row;
#pragma unroll
  for (int i = 0; i < Warp::kRows; ++i) {
    const int staged = first_staged + Warp::row(i);
    const float sum = warp_reduce<Warp::kRowLanes>(rows.sum[i], Sum{});
    if (threadIdx.x % Warp::kRowLanes == 0) sState[staged] = make_float2(rows.most[i], sum);
#pragma unroll
    for (int c = 0; c < Warp::kChannels; ++c) sOut[staged * P::kOutFloats + Warp::channel(c)] = warp.out[i][c];
  }
  __syncthreads();

  // Merge the key warps of a row: its factors, its state.
  if (static_cast<int32_t>(threadIdx.x) < sTask.num_rows) {
    const int32_t row = threadIdx.x;
    float most = -kInfinity, sum = 0.0f, factor[P::kKeyWarps];
#pragma unroll
    for (int w = 0; w < P::kKeyWarps; ++w) most = fmaxf(most, sState[w * plan.rows + row].x);
#pragma unroll
    for (int w = 0; w < P::kKeyWarps; ++w) {
      const float2 state = sState[w * plan.rows + row];
      factor[w] = ptx::exp2_approx(state.x - (most == -kInfinity ? 0.0f : most));
      sum = fmaf(state.y, factor[w], sum);
    }
    const int64_t out_row = sTask.out_row(p, plan, row);
    float by_sum = 1.0f;
    if (plan.parts == 1) {
      by_sum = sum == 0.0f ? 0.0f : 1.0f / sum;
      p.lse[out_row] = lse_of(most, sum);
    } else {
      float2* gStates = reinterpret_cast<float2*>(p.workspace + plan.value_floats);
      gStates[out_row * plan.parts + sTask.part] = make_float2(most, sum);
    }
#pragma unroll
    for (int w = 0; w < P::kKeyWarps; ++w) sState[w * plan.rows + row].x = factor[w] * by_sum;
  }
  __syncthreads();

  // Write rows, 16 bytes of the output a thread.
  for (int v = threadIdx.x; v < sTask.num_rows * P::kVectors; v += blockDim.x) {
    const int row = v / P::kVectors, d = v % P::kVectors * P::kElements;
    if (d >= p.head_dim) continue;
    float x[P::kElements] = {};
#pragma unroll
    for (int w = 0; w < P::kKeyWarps; ++w) {
      const float* from = sOut + (w * plan.rows + row) * P::kOutFloats + d;
      const float factor = sState[w * plan.rows + row].x;
#pragma unroll
      for (int i = 0; i < P::kElements; ++i) x[i] = fmaf(from[i], factor, x[i]);
    }
    const int64_t out_row = sTask.out_row(p, plan, row);
    if (plan.parts == 1)
      store_channels(static_cast<T*>(p.out) + out_row * p.head_dim + d, x, p.head_dim - d, plan.out_aligned);
    else
      store_channels(p.workspace + (out_row * plan.parts + sTask.part) * p.head_dim + d, x, p.head_dim - d,
                     plan.out_aligned);
  }
}

constexpr int kMergeThreads = 256;
constexpr int kMergeChannels = 64;  // taken at a time; the threads that share a channel take a range of the parts each
constexpr int kMergeRanges = kMergeThreads / kMergeChannels;

// blockIdx.x = row of [B, H, Q].
template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    merge_parts_kernel(const __grid_constant__ BlockSparseAttentionParams p, const __grid_constant__ Plan plan) {
  __shared__ float sWeight[kMaxParts], sWarps[kMergeThreads / 32], sValues[kMergeRanges][kMergeChannels];
  const float2* gStates =
      reinterpret_cast<const float2*>(p.workspace + plan.value_floats) + int64_t{blockIdx.x} * plan.parts;
  float most = -kInfinity, sum = 0.0f;
  for (int32_t part = threadIdx.x; part < plan.parts; part += kMergeThreads) most = fmaxf(most, gStates[part].x);
  most = block_reduce<kMergeThreads>(most, Max{}, sWarps);
  for (int32_t part = threadIdx.x; part < plan.parts; part += kMergeThreads) {
    const float weight = ptx::exp2_approx(gStates[part].x - (most == -kInfinity ? 0.0f : most));
    sWeight[part] = weight;
    sum = fmaf(gStates[part].y, weight, sum);
  }
  sum = block_reduce<kMergeThreads>(sum, Sum{}, sWarps);
  const float by_sum = sum == 0.0f ? 0.0f : 1.0f / sum;
  if (threadIdx.x == 0) p.lse[blockIdx.x] = lse_of(most, sum);

  const int channel = threadIdx.x % kMergeChannels, range = threadIdx.x / kMergeChannels;
  const Range parts = split_range(plan.parts, kMergeRanges, range);
  for (int32_t d = channel; d < round_up(p.head_dim, kMergeChannels); d += kMergeChannels) {
    const float* gValues = p.workspace + int64_t{blockIdx.x} * plan.parts * p.head_dim + min(d, p.head_dim - 1);
    float value = 0.0f;
#pragma unroll 8
    for (int32_t part = parts.begin; part < parts.end; ++part)
      value = fmaf(gValues[int64_t{part} * p.head_dim], sWeight[part], value);
    __syncthreads();  // the readers of the channels before are done
    sValues[range][channel] = value;
    __syncthreads();
    if (range != 0 || d >= p.head_dim) continue;
    for (int i = 1; i < kMergeRanges; ++i) value += sValues[i][channel];
    static_cast<T*>(p.out)[int64_t{blockIdx.x} * p.head_dim + d] = from_float<T>(value * by_sum);
  }
}

template <class P>
cudaError_t launch_attention(const BlockSparseAttentionParams& p, cudaStream_t stream) {
  Plan plan = make_plan<P>(p);
  constexpr int kStaticBytes = 4 << 10;  // at most
  while (plan.rows > 32 && P::shared_bytes(plan.rows) + kStaticBytes > max_shared_bytes()) plan.rows /= 2;
  plan.row_tiles = ceil_div(list_rows(p), plan.rows);
  const int64_t heads = int64_t{p.batch} * (p.num_heads / plan.group);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(heads * plan.query_blocks * plan.row_tiles * plan.parts));
  shape.block = dim3(plan.rows / 16 * P::kKeyWarps * 32);
  shape.shared_bytes = P::shared_bytes(plan.rows);
  cudaError_t error = launch(attend_kernel<P>, shape, stream, p, plan);
  if (error != cudaSuccess || plan.parts == 1) return error;
  shape.grid = dim3(static_cast<unsigned>(int64_t{p.batch} * p.num_heads * p.num_queries));
  shape.block = dim3(kMergeThreads);
  shape.shared_bytes = 0;
  return launch(merge_parts_kernel<typename P::T>, shape, stream, p, plan);
}

// run(Policy<...>{}) with the policy of these shapes.
template <class T, class Run>
auto with_depth(const BlockSparseAttentionParams& p, const Run& run) {
  const int32_t d = p.head_dim;
  if (list_rows(p) <= kFewRows) {
    if (d <= 64) return run(Policy<T, 64, true>{});
    if (d <= 128) return run(Policy<T, 128, true>{});
    return run(Policy<T, 256, true>{});
  }
  if (d <= 64) return run(Policy<T, 64, false>{});
  if constexpr (sizeof(T) == 2)
    if (d <= 96) return run(Policy<T, 96, false>{});
  if (d <= 128) return run(Policy<T, 128, false>{});
  return run(Policy<T, 256, false>{});
}

template <class Run>
auto with_policy(const BlockSparseAttentionParams& p, const Run& run) {
  switch (p.dtype) {
    case DType::kFloat32: return with_depth<float>(p, run);
    case DType::kFloat16: return with_depth<__half>(p, run);
    default: return with_depth<__nv_bfloat16>(p, run);
  }
}

}  // namespace

int64_t block_sparse_attention_workspace(const BlockSparseAttentionParams& p) {
  return with_policy(p, [&](auto policy) { return make_plan<decltype(policy)>(p).workspace_floats; });
}

cudaError_t block_sparse_attention_cuda(const BlockSparseAttentionParams& p, cudaStream_t stream) {
  return with_policy(p, [&](auto policy) { return launch_attention<decltype(policy)>(p, stream); });
}

}  // namespace vtk
