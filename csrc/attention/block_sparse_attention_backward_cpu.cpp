// block_sparse_attention_backward on the CPU.
//
// P = exp(scale q k + bias - lse), dS = P (grad_out v - delta); dq = scale dS k, dk = scale dS^T q, dv = P^T grad_out
#include "attention/block_sparse_attention_backward.h"

#include <vector>

#include "attention/block_sparse_keys.h"

namespace vtk {
namespace VTK_ISA {
namespace {

template <class T>
const T* row_of(const HeadsView& x, int32_t b, int32_t h, int32_t n) {
  return static_cast<const T*>(x.data) + b * x.stride_batch + h * x.stride_head + n * x.stride_row;
}

template <class T>
float dot(const T* x, const T* y, int32_t depth) {
  float sum = 0.0f;
  for (int32_t d = 0; d < depth; ++d) sum += to_float(x[d]) * to_float(y[d]);
  return sum;
}

template <class T>
void write(const std::vector<float>& from, void* to) {
  for (size_t i = 0; i < from.size(); ++i) store_partial(static_cast<T*>(to) + i, splat(from[i]), 1);
}

template <class T>
void differentiate(const BlockSparseAttentionBackwardParams& params) {
  const BlockSparseAttentionParams& p = params.forward;
  const int32_t depth = p.head_dim;
  const int64_t rows = int64_t{p.batch} * p.num_heads * p.num_queries,
                keys = int64_t{p.batch} * p.key_heads * p.num_keys;
  std::vector<float> dq(rows * depth), dk(keys * depth), dv(keys * depth);
  KeyTile tile;
  for (int32_t b = 0; b < p.batch; ++b)
    for (int32_t h = 0; h < p.num_heads; ++h)
      for (int32_t i = 0; i < p.num_queries; ++i) {
        const int64_t row = (int64_t{b} * p.num_heads + h) * p.num_queries + i;
        const int32_t block = i / p.block_q, key_head = h / (p.num_heads / p.key_heads);
        if (p.lse[row] == -kInfinity) continue;
        const T *q = row_of<T>(p.query, b, h, i), *grad_out = row_of<T>(params.grad_out, b, h, i);
        const float delta = dot(static_cast<const T*>(p.out) + row * depth, grad_out, depth) -
                            (params.grad_lse == nullptr ? 0.0f : params.grad_lse[row]);
        KeyStream stream(p, b, h, block, i, 0, KeyStream::num_entries(p, b, h, block));
        while (stream.next(tile))
          for (int32_t j = 0; j < tile.count; ++j) {
            const int32_t n = tile.index[j];
            const T *k = row_of<T>(p.key, b, key_head, n), *v = row_of<T>(p.value, b, key_head, n);
            const float probability = std::exp2((dot(q, k, depth) * p.scale - p.lse[row]) * kLog2E + tile.bias[j]);
            const float slope = probability * (dot(grad_out, v, depth) - delta);
            const int64_t key = (int64_t{b} * p.key_heads + key_head) * p.num_keys + n;
            for (int32_t d = 0; d < depth; ++d) {
              dq[row * depth + d] += p.scale * slope * to_float(k[d]);
              dk[key * depth + d] += p.scale * slope * to_float(q[d]);
              dv[key * depth + d] += probability * to_float(grad_out[d]);
            }
          }
      }
  write<T>(dq, params.grad_query);
  write<T>(dk, params.grad_key);
  write<T>(dv, params.grad_value);
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
