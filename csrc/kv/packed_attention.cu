// packed_attention on CUDA: the portable kernel, float32 on CUDA cores.
//
//   grid    [part of 8 pages, 16 rows of one key head, key head and item]; then a block a row merges the parts in order
//   block   256 threads; a row is a query of one of the heads that share the key head
//   source  keys decoded to shared memory as [depth][lane] -> logits -> online softmax, a warp two rows -> values
//   decoded
//           to the same memory -> sums. Residual tokens go the same way, 128 at a time.
//   shared  the page, 66 KiB at D = 128, and queries, sums and weights of 16 rows, 24 KiB
//   bound   decoding and 4 D multiply-adds a row and token on CUDA cores; it reads every page once for 16 rows
//
// NOTE: no GPU has run it. The kernel for tensor cores feeds words of codes to mma m16n8k16 as docs/kv.md tells.
#include "kv/packed_attention.h"

#include "device/ptx.cuh"
#include "device/reduce.cuh"
#include "kv/page_device.cuh"

namespace vtk {
namespace {

constexpr int32_t kRows = 16;
constexpr int32_t kPartPages = 8;
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kNoLogit = -INFINITY;

struct Work {
  int32_t rows, row_blocks;  // of a key head
  int32_t sources, parts;
};

__host__ __device__ inline Work work_of(const PackedAttentionParams& p) {
  Work w;
  w.rows = p.heads / p.key_heads * p.num_queries;
  w.row_blocks = ceil_div(w.rows, kRows);
  w.sources = p.pages[0].count + ceil_div(p.residual_tokens, kPageTokens);
  w.parts = max(ceil_div(w.sources, kPartPages), 1);
  return w;
}

// A part's row in the workspace: D sums, the maximum of the logits in powers of two, the sum of the weights.
__host__ __device__ inline int64_t partial_at(const PackedAttentionParams& p, const Work& w, int64_t key_head,
                                              int32_t part, int32_t row) {
  return ((key_head * w.parts + part) * w.rows + row) * (p.head_dim + 2);
}

struct Shared {
  float *page, *query, *turned, *out, *weights, *most, *sum, *correct;
};

__host__ __device__ inline int32_t page_floats(const PackedAttentionParams& p) {
  const int32_t keys = p.head_dim * (kPageTokens + 1), values = kPageTokens * (p.head_dim + 1);
  return keys > values ? keys : values;
}
inline size_t shared_floats(const PackedAttentionParams& p) {
  return page_floats(p) + kRows * (3 * p.head_dim + kPageTokens + 3);
}

__device__ inline Shared carve(const PackedAttentionParams& p, float* memory) {
  Shared s;
  s.page = memory;
  s.query = s.page + page_floats(p);
  s.turned = s.query + kRows * p.head_dim;
  s.out = s.turned + kRows * p.head_dim;
  s.weights = s.out + kRows * p.head_dim;
  s.most = s.weights + kRows * kPageTokens;
  s.sum = s.most + kRows;
  s.correct = s.sum + kRows;
  return s;
}

// Rows r of the block: query and head by packed_row(first + r, group).
template <class T>
struct Block {
  const PackedAttentionParams& p;
  Shared s;
  int32_t b, key_head, group, first, rows;

  // query [row][channel]; of a mix turned [depth][row], with the transform over the depth.
  __device__ void load_queries() const {
    for (int32_t e = threadIdx.x; e < rows * p.head_dim; e += kThreads) {
      const int32_t r = e / p.head_dim, c = e % p.head_dim;
      const PackedRow at = packed_row(first + r, group);
      const T* from = reinterpret_cast<const T*>(p.query.at(b, key_head * group + at.head, at.query));
      s.query[e] = to_float(from[c]) * (p.scale * kLog2E);
      s.out[e] = 0.0f;
    }
    for (int32_t r = threadIdx.x; r < kRows; r += kThreads) s.most[r] = kNoLogit, s.sum[r] = 0.0f;
    __syncthreads();
    if (p.order.data == nullptr) return;
    const PageIndex at = {b, key_head, 0, 0};
    for (int32_t e = threadIdx.x; e < rows * p.head_dim; e += kThreads)
      s.turned[e] = s.query[e % rows * p.head_dim + channel_of(p.order, at, e / rows, p.head_dim)];
    __syncthreads();
    const KvSection& easy = p.pages[0].page[0].section[1];
    hadamard(s.turned + easy.first * rows, easy.depth, rows, rows);
  }

  __device__ float query_at(int32_t r, int32_t d, bool packed) const {
    return packed && p.order.data != nullptr ? s.turned[d * rows + r] : s.query[r * p.head_dim + d];
  }

  // One side of a source as [depth][lane] of float32. Tokens beyond `count` are zeros.
  __device__ void load_source(int side, int32_t source) const {
    const PackedClass& from = p.pages[0];
    const KvPage& page = from.page[side];
    const int32_t stride = shared_stride(page);
    const bool packed = source < p.pages[0].count;
    if (packed && page.section[0].scheme != KvScheme::kNone) {
      for (int32_t i = 0; i < page.sections; ++i) {
        const KvSection& section = page.section[i];
        read_section(page, section, from.codes[side].at(b, key_head, source), from.meta[side].at(b, key_head, source),
                     s.page + section.first * stride);
      }
      return;
    }
    const T* codes = packed ? reinterpret_cast<const T*>(from.codes[side].at(b, key_head, source)) : nullptr;
    const int32_t begin = (source - p.pages[0].count) * kPageTokens;
    for (int32_t e = threadIdx.x; e < kPageTokens * p.head_dim; e += kThreads) {
      const int32_t t = e / p.head_dim, c = e % p.head_dim;
      const int32_t d = page.is_key ? c : t, l = page.is_key ? t : c;
      float x = 0.0f;
      if (packed)
        x = to_float(codes[raw_place(page, d, l)]);
      else if (begin + t < p.residual_tokens)
        x = to_float(reinterpret_cast<const T*>(p.residual[side].at(b, key_head, begin + t))[c]);
      s.page[d * stride + l] = x;
    }
  }

  // Tokens of the source that row r sees.
  __device__ int32_t limit(int32_t source, int32_t r) const {
    if (source < p.pages[0].count) return kPageTokens;
    const int32_t seen = p.causal ? p.residual_tokens - p.num_queries + (first + r) / group + 1 : p.residual_tokens;
    return min(max(seen - (source - p.pages[0].count) * kPageTokens, 0), kPageTokens);
  }

  __device__ void logits(int32_t source) const {
    const int32_t stride = kPageTokens + 1;
    for (int32_t e = threadIdx.x; e < rows * kPageTokens; e += kThreads) {
      const int32_t r = e / kPageTokens, t = e % kPageTokens;
      float sum = 0.0f;
      for (int32_t d = 0; d < p.head_dim; ++d)
        sum = fmaf(query_at(r, d, source < p.pages[0].count), s.page[d * stride + t], sum);
      s.weights[e] = t < limit(source, r) ? sum : kNoLogit;
    }
  }

  __device__ void softmax() const {
    const int32_t lane = threadIdx.x % 32;
    for (int32_t r = threadIdx.x / 32; r < rows; r += kThreads / 32) {
      float* x = s.weights + r * kPageTokens;
      float most = s.most[r], sum = 0.0f;
      for (int32_t t = lane; t < kPageTokens; t += 32) most = max(most, x[t]);
      most = warp_reduce(most, Max());
      const float shift = most == kNoLogit ? 0.0f : most;
      for (int32_t t = lane; t < kPageTokens; t += 32) {
        x[t] = ptx::exp2_approx(x[t] - shift);
        sum += x[t];
      }
      sum = warp_reduce(sum, Sum());
      __syncwarp();  // every lane has read the row's maximum
      if (lane == 0) {
        s.correct[r] = s.most[r] == most ? 1.0f : ptx::exp2_approx(s.most[r] - shift);
        s.sum[r] = s.sum[r] * s.correct[r] + sum;
        s.most[r] = most;
      }
    }
  }

  __device__ void accumulate() const {
    const int32_t stride = p.head_dim + 1;
    for (int32_t e = threadIdx.x; e < rows * p.head_dim; e += kThreads) {
      const int32_t r = e / p.head_dim, c = e % p.head_dim;
      float sum = s.out[e] * s.correct[r];
      for (int32_t t = 0; t < kPageTokens; ++t) sum = fmaf(s.weights[r * kPageTokens + t], s.page[t * stride + c], sum);
      s.out[e] = sum;
    }
  }
};

// grid: x = (b Hk + key head) row_blocks + block of rows, y = part
template <class T>
__global__ void __launch_bounds__(kThreads) packed_part_kernel(const __grid_constant__ PackedAttentionParams p) {
  VTK_DYNAMIC_SHARED(shared);
  const Work w = work_of(p);
  const int32_t head = blockIdx.x / w.row_blocks, first = blockIdx.x % w.row_blocks * kRows, part = blockIdx.y;
  const Block<T> block = {p,
                          carve(p, reinterpret_cast<float*>(shared)),
                          head / p.key_heads,
                          head % p.key_heads,
                          p.heads / p.key_heads,
                          first,
                          min(kRows, w.rows - first)};
  block.load_queries();
  const Range range = tile_range(part, kPartPages, w.sources);
  for (int32_t source = range.begin; source < range.end; ++source)
#pragma unroll 1  // NOTE: one copy of the decoders; two leave calls behind, and a stack
    for (int side = 0; side < 2; ++side) {
      __syncthreads();
      block.load_source(side, source);
      __syncthreads();
      if (side == 0) {
        block.logits(source);
        __syncthreads();
        block.softmax();
      } else {
        block.accumulate();
      }
    }
  __syncthreads();
  for (int32_t r = threadIdx.x / 32; r < block.rows; r += kThreads / 32) {
    float* to = p.workspace + partial_at(p, w, head, part, first + r);
    for (int32_t c = threadIdx.x % 32; c < p.head_dim; c += 32) to[c] = block.s.out[r * p.head_dim + c];
    if (threadIdx.x % 32 == 0) to[p.head_dim] = block.s.most[r], to[p.head_dim + 1] = block.s.sum[r];
  }
}

// grid: x = (b Hk + key head) rows + row; a warp
template <class T>
__global__ void __launch_bounds__(32) packed_merge_kernel(const __grid_constant__ PackedAttentionParams p) {
  const Work w = work_of(p);
  const int32_t head = blockIdx.x / w.rows, r = blockIdx.x % w.rows, group = p.heads / p.key_heads;
  float most = kNoLogit, total = 0.0f;
  for (int32_t part = 0; part < w.parts; ++part)
    most = max(most, p.workspace[partial_at(p, w, head, part, r) + p.head_dim]);
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

template <class T>
cudaError_t run(const PackedAttentionParams& p, cudaStream_t stream) {
  const Work w = work_of(p);
  const unsigned heads = static_cast<unsigned>(p.batch) * p.key_heads;
  LaunchShape shape;
  shape.grid = dim3(heads * w.row_blocks, w.parts);
  shape.block = dim3(kThreads);
  shape.shared_bytes = shared_floats(p) * sizeof(float);
  const cudaError_t error = launch(packed_part_kernel<T>, shape, stream, p);
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
