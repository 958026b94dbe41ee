// block_sparse_attention_backward on the CPU.
//
// P_in = times listed exp(scale q_i k_n + bias_n - lse_i), dS = P (grad_out v^T - delta), delta = out . grad_out -
// grad_lse dq = scale dS k, dk = scale dS^T q, dv = P^T grad_out
//
// Two passes, each with its own P and dS: over blocks of queries for dq (block_sparse_query_gradient.h), over chunks of
// keys for dk and dv (block_sparse_key_gradient.h). So every sum has one owner and one order.
// Bound: 7 products of D multiply-adds a listed pair.
#include "attention/block_sparse_attention_backward.h"

#include "attention/block_sparse_key_gradient.h"
#include "attention/block_sparse_query_gradient.h"
#include "attention/block_sparse_tasks.h"
#include "common/dot_panel.h"

namespace vtk {
namespace VTK_ISA {
namespace {

template <class T>
void make_delta(const BlockSparseAttentionBackwardParams& params) {
  const BlockSparseAttentionParams& p = params.forward;
  const int64_t rows = int64_t{p.batch} * p.num_heads * p.num_queries;
  parallel_for(rows, std::max<int64_t>(kMinThreadWork / p.head_dim, 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int32_t query = row % p.num_queries, h = row / p.num_queries % p.num_heads,
                    b = row / p.num_queries / p.num_heads;
      const T* out = static_cast<const T*>(p.out) + row * p.head_dim;
      params.delta[row] = dot_pair(out, row_of<T>(params.grad_out, b, h, query), p.head_dim) -
                          (params.grad_lse == nullptr ? 0.0f : params.grad_lse[row]);
    }
  });
}

struct KeyChunk {
  int32_t b, key_head, chunk;
  int64_t queries;  // that list a key of it, at most
};

int64_t queries_listing(const BlockSparseAttentionParams& p, const TransposedLists& lists, const KeyChunk& at) {
  const int32_t group = p.num_heads / p.key_heads, length = length_of(p, at.b);
  int64_t queries = 0;
  for (int32_t h = at.key_head * group; h < (at.key_head + 1) * group; ++h)
    for (const Touch *touch = lists.begin(at.b, h, at.chunk), *end = lists.end(at.b, h, at.chunk); touch != end;
         ++touch) {
      const int32_t first = p.causal ? at.chunk * chunk_keys(p.head_dim) - (length - p.num_queries) : 0;
      const int32_t last = std::min((touch->row + 1) * p.block_q, p.num_queries);
      queries += std::max(0, last - std::max(first, touch->row * p.block_q));
    }
  return queries;
}

template <class T>
void differentiate_keys(const BlockSparseAttentionBackwardParams& params) {
  const BlockSparseAttentionParams& p = params.forward;
  const int32_t size = chunk_keys(p.head_dim);
  const TransposedLists lists(p, size);
  std::vector<KeyChunk> chunks;
  int64_t queries = 0;
  for (int32_t b = 0; b < p.batch; ++b)
    for (int32_t key_head = 0; key_head < p.key_heads; ++key_head)
      for (int32_t chunk = 0; chunk < lists.num_chunks(); ++chunk) {
        chunks.push_back({b, key_head, chunk, 0});
        chunks.back().queries = queries_listing(p, lists, chunks.back());
        queries += chunks.back().queries;
      }
  std::stable_sort(chunks.begin(), chunks.end(),
                   [](const KeyChunk& x, const KeyChunk& y) { return x.queries > y.queries; });
  run_tasks(
      static_cast<int64_t>(chunks.size()), queries * size * p.head_dim, [&] { return KeyGradient<T>(params, lists); },
      [&](KeyGradient<T>& worker, int64_t i) { worker.run(chunks[i].b, chunks[i].key_head, chunks[i].chunk); });
}

template <class T>
void differentiate(const BlockSparseAttentionBackwardParams& p) {
  make_delta<T>(p);
  run_query_blocks(p.forward, [&] { return QueryGradient<T>(p); });
  differentiate_keys<T>(p);
}

}  // namespace

void block_sparse_attention_backward_cpu(const BlockSparseAttentionBackwardParams& p) {
  switch (p.forward.dtype) {
    case DType::kFloat32: return differentiate<float>(p);
    case DType::kFloat16: return differentiate<f16>(p);
    case DType::kBFloat16: return differentiate<bf16>(p);
  }
}

}  // namespace VTK_ISA
}  // namespace vtk
