// merge_apply on CUDA: one launch, no workspace, no atomics.
//
//   grid    blocks of 16 output rows of one item
//   block   256 threads read the item's owner map once, list the tokens of their 16 rows in ascending order, sort the
//           list by row, then reduce: a thread takes 16 bytes of a row through all its tokens
//   shared  512 listed tokens, twice, and 16 row states: 6.4 KiB
//   bound   N + M rows over the memory bandwidth; the map is read M / 16 times from L2 (8 N bytes each)
//
// A row of one token is a copy. When the 16 rows have more than 512 tokens, their threads walk the owner map instead
// of the list: the same order, the same sums.
//
// NaN or infinite weights, weights <= 0 and centers of other rows are not reported, that needs a sync: the formula is
// applied to them.
#include "merge/merge_apply.h"

#include "device/convert.cuh"
#include "device/launch.h"
#include "device/reduce.cuh"
#include "device/tile.h"

namespace vtk {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 16;
constexpr int32_t kMaxListed = 512;

struct SharedMemory {
  int32_t token[kMaxListed], row[kMaxListed];  // of the block's rows, by token
  int32_t sorted[kMaxListed];                  // tokens by row
  int32_t first[kRows + 1];
  int32_t warps[kWarps];
  int32_t count[kRows], last[kRows];  // tokens of a row, and the last of them
  int64_t center[kRows];
  float weight[kRows];
};

struct Block {
  const MergeApplyParams& p;
  SharedMemory& shared;
  int32_t b, first_row, rows;
  int32_t listed;  // more than kMaxListed: there is no list

  __device__ int32_t row_of(int32_t n) const {
    const int64_t row = p.owner[b * p.owner_stride_batch + n * p.owner_stride_token];
    if (row < first_row || row >= first_row + rows) return -1;
    return p.reduce == MergeReduce::kPrune && center_of(row) != n ? -1 : static_cast<int32_t>(row) - first_row;
  }
  __device__ int64_t center_of(int64_t row) const {
    return p.center == nullptr ? -1 : p.center[b * p.center_stride_batch + row * p.center_stride_row];
  }
  __device__ float weight_of(int32_t n) const {
    if (p.weight == nullptr) return 1.0f;
    return load_float(p.weight, p.weight_dtype, b * p.weight_stride_batch + n * p.weight_stride_token);
  }

  // Lists the tokens of the rows, ascending.
  __device__ void list_tokens() {
    listed = 0;
    for (int32_t chunk = 0; chunk < p.num_tokens; chunk += kThreads) {
      const int32_t n = chunk + threadIdx.x;
      const int32_t row = n < p.num_tokens ? row_of(n) : -1;
      const Prefix<int32_t> found = block_prefix<kThreads>(int32_t{row >= 0}, shared.warps);
      const int32_t slot = listed + found.before;
      if (row >= 0 && slot < kMaxListed) {
        shared.token[slot] = n;
        shared.row[slot] = row;
      }
      listed += found.total;
    }
    __syncthreads();
  }

  // Sorts the list by row, one warp a row; within a row the tokens stay ascending.
  __device__ void sort_list() {
    if (listed > kMaxListed) return;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int32_t row = warp; row < rows; row += kWarps) {
      int32_t before = 0;  // tokens of lower rows
      for (int32_t i = lane; i < listed; i += 32) before += shared.row[i] < row;
      before = warp_reduce(before, Sum{});
      if (lane == 0) shared.first[row] = before;
      for (int32_t chunk = 0; chunk < listed; chunk += 32) {
        const bool mine = chunk + lane < listed && shared.row[chunk + lane] == row;
        const uint32_t votes = __ballot_sync(kAllLanes, mine);
        if (mine) shared.sorted[before + __popc(votes & ((1u << lane) - 1))] = shared.token[chunk + lane];
        before += __popc(votes);
      }
    }
    if (threadIdx.x == 0) shared.first[rows] = listed;
    __syncthreads();
  }

  // Calls visit(token) for the tokens of a row, ascending.
  template <class Visit>
  __device__ void for_each_token(int32_t row, const Visit& visit) const {
    if (listed <= kMaxListed) {
      for (int32_t i = shared.first[row]; i < shared.first[row + 1]; ++i) visit(shared.sorted[i]);
    } else {
      for (int32_t n = 0; n < p.num_tokens; ++n)
        if (row_of(n) == row) visit(n);
    }
  }

  // Counts and weights of the rows, one thread a row.
  __device__ void weigh() {
    if (threadIdx.x < rows) {
      int32_t count = 0, last = 0;
      float weight = 0.0f;
      for_each_token(threadIdx.x, [&](int32_t n) {
        ++count;
        last = n;
        weight += weight_of(n);
      });
      shared.count[threadIdx.x] = count;
      shared.last[threadIdx.x] = last;
      shared.weight[threadIdx.x] = weight;
      shared.center[threadIdx.x] = center_of(first_row + threadIdx.x);
      p.weight_out[static_cast<int64_t>(b) * p.out_len + first_row + threadIdx.x] = weight;
    }
    __syncthreads();
  }
};

// One vector of a row: T by T, or 16 bytes at once.
template <class T, class Vector>
__device__ void reduce_vector(const Block& block, int32_t row, int32_t column, Vector* to) {
  constexpr int kWidth = sizeof(Vector) / sizeof(T);
  const MergeApplyParams& p = block.p;
  const T* values = static_cast<const T*>(p.values) + block.b * p.stride_batch;
  auto at = [&](int32_t n) {
    return *(reinterpret_cast<const Vector*>(values + static_cast<int64_t>(n) * p.stride_token) + column);
  };
  const int32_t count = block.shared.count[row];
  Vector out;
  memset(static_cast<void*>(&out), 0, sizeof out);
  if (count == 1) {
    out = at(block.shared.last[row]);
  } else if (count > 1) {
    const RowReduction reduction = {p.reduce, p.beta, count - 1, block.shared.weight[row]};
    const bool takes_max = p.reduce == MergeReduce::kMax;
    float acc[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) acc[i] = takes_max ? -INFINITY : 0.0f;
    int32_t before = 0;
    block.for_each_token(row, [&](int32_t n) {
      const Vector vector = at(n);
      T x[kWidth];
      memcpy(static_cast<void*>(x), &vector, sizeof vector);
      const bool is_center = n == block.shared.center[row];
      const float coefficient = reduction.coefficient(is_center, block.weight_of(n), before);
      before += !is_center;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float value = to_float(x[i]);
        acc[i] = !takes_max ? __fmaf_rn(coefficient, value, acc[i]) : value > acc[i] || value != value ? value : acc[i];
      }
    });
    const float divisor = reduction.divisor();
    T x[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = from_float<T>(__fdiv_rn(acc[i], divisor));
    memcpy(static_cast<void*>(&out), x, sizeof out);
  }
  *to = out;
}

// blockIdx.x = item * blocks + block of rows.
template <class T, class Vector>
__global__ void __launch_bounds__(kThreads, 4)
    merge_apply_kernel(const __grid_constant__ MergeApplyParams p, int32_t blocks) {
  __shared__ SharedMemory shared;
  const int32_t first_row = blockIdx.x % blocks * kRows;
  Block block{p, shared, static_cast<int32_t>(blockIdx.x / blocks), first_row, min(kRows, p.out_len - first_row), 0};
  block.list_tokens();
  block.sort_list();
  block.weigh();

  // Reduce.
  const int32_t vectors = p.channels / static_cast<int32_t>(sizeof(Vector) / sizeof(T));
  T* gMerged = static_cast<T*>(p.merged) + (static_cast<int64_t>(block.b) * p.out_len + first_row) * p.channels;
  for (int32_t e = threadIdx.x; e < block.rows * vectors; e += kThreads)
    reduce_vector<T, Vector>(block, e / vectors, e % vectors, reinterpret_cast<Vector*>(gMerged) + e);
}

template <class T>
cudaError_t run(const MergeApplyParams& p, cudaStream_t stream) {
  const uint64_t bits = reinterpret_cast<uint64_t>(p.values) | reinterpret_cast<uint64_t>(p.merged) |
                        (static_cast<uint64_t>(p.stride_batch) | p.stride_token | p.channels) * sizeof(T);
  const int32_t blocks = ceil_div(p.out_len, kRows);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(p.batch) * blocks);
  shape.block = dim3(kThreads);
  if (bits % 16 == 0) return launch(merge_apply_kernel<T, uint4>, shape, stream, p, blocks);
  return launch(merge_apply_kernel<T, T>, shape, stream, p, blocks);
}

}  // namespace

cudaError_t merge_apply_cuda(const MergeApplyParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::kFloat32: return run<float>(p, stream);
    case DType::kFloat16: return run<__half>(p, stream);
    default: return run<__nv_bfloat16>(p, stream);
  }
}

}  // namespace vtk
