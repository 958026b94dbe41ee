// Checks and unpacks the arguments that the ops over block lists share. Include only from an op's .cpp.
#pragma once
#include <cmath>
#include <string>
#include <utility>

#include "attention/block_sparse_attention.h"
#include "common/check.h"
#include "device/tile.h"

namespace vtk {
namespace {

using OptTensor = std::optional<Tensor>;
constexpr int64_t kMaxHeadDim = 256;

// Kernels round a row count up to whole blocks, in 32 bits.
inline int32_t check_rows(const char* op, const char* name, int64_t rows) {
  constexpr int64_t kMostRows = INT32_MAX - 127;
  VTK_CHECK(op, rows <= kMostRows, "expected ", name, " with at most ", kMostRows, " rows, got ", rows);
  return static_cast<int32_t>(rows);
}

inline HeadsView heads_view(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

inline void set_query(const char* op, BlockSparseAttentionParams& p, const Tensor& query) {
  check_dim(op, "query", query, 4, "[B, H, Q, D]");
  p.dtype = float_dtype(op, "query", query);
  check_contiguous_last(op, "query", query);
  p.batch = check_count(op, "batch size", query.size(0));
  p.num_heads = check_count(op, "query head count", query.size(1));
  p.num_queries = check_rows(op, "query", query.size(2));
  VTK_CHECK(op, query.size(3) >= 1 && query.size(3) <= kMaxHeadDim, "expected query with D from 1 to ", kMaxHeadDim,
            ", got ", shape_text(query));
  p.head_dim = static_cast<int32_t>(query.size(3));
  p.query = heads_view(query);
}

// key or value
inline void check_heads(const char* op, const char* name, const Tensor& x, const Tensor& query) {
  check_dim(op, name, x, 4, "[B, Hk, N, D]");
  check_same_device(op, name, x, "query", query);
  check_dtype(op, name, x, query.scalar_type());
  check_contiguous_last(op, name, x);
}

inline void set_key_value(const char* op, BlockSparseAttentionParams& p, const Tensor& key, const Tensor& value,
                          const Tensor& query) {
  check_heads(op, "key", key, query);
  check_heads(op, "value", value, query);
  VTK_CHECK(op, key.size(0) == query.size(0) && key.size(3) == query.size(3),
            "expected key of shape [B, Hk, N, D] with B = ", query.size(0), " and D = ", query.size(3),
            " as in query, got ", shape_text(key));
  VTK_CHECK(op, key.size(1) > 0 ? query.size(1) % key.size(1) == 0 : query.size(1) == 0,
            "expected key with a head count that divides the ", query.size(1), " heads of query, got ",
            shape_text(key));
  check_shape(op, "value", value, "key.shape = [B, Hk, N, D]", {key.size(0), key.size(1), key.size(2), key.size(3)});
  p.key_heads = static_cast<int32_t>(key.size(1));
  p.num_keys = check_rows(op, "key", key.size(2));
  p.key = heads_view(key);
  p.value = heads_view(value);
}

// The CPU reads the lists. On CUDA, where a report needs a synchronisation, kernels clamp counts to the capacity and
// pass over entries outside [0, limit).
inline void check_entries([[maybe_unused]] const char* op, [[maybe_unused]] const BlockSparseAttentionParams& p,
                          [[maybe_unused]] const std::string& name, [[maybe_unused]] const BlockLists& lists,
                          [[maybe_unused]] int32_t rows, [[maybe_unused]] int32_t limit) {
#if !defined(VTK_BACKEND_CUDA)
  const int32_t batches = lists.count_stride_batch != 0 || lists.entry_stride_batch != 0 ? p.batch : 1;
  const int32_t heads = lists.count_stride_head != 0 || lists.entry_stride_head != 0 ? p.num_heads : 1;
  for (int32_t b = 0; b < batches; ++b)
    for (int32_t h = 0; h < heads; ++h)
      for (int32_t row = 0; row < rows; ++row) {
        const int32_t count =
            lists.counts[b * lists.count_stride_batch + h * lists.count_stride_head + row * lists.count_stride_row];
        VTK_CHECK(op, count >= 0 && count <= lists.capacity, "expected 0 <= ", name, "_counts <= ", lists.capacity,
                  " (the capacity of ", name, "_indices), got ", count, " for query block ", row, " of head ", h,
                  " of batch item ", b);
        const int32_t* entries =
            lists.entries + b * lists.entry_stride_batch + h * lists.entry_stride_head + row * lists.entry_stride_row;
        for (int32_t i = 0; i < count; ++i)
          VTK_CHECK(op, entries[i] >= 0 && entries[i] < limit, "expected 0 <= ", name, "_indices < ", limit, ", got ",
                    entries[i], " for query block ", row, " of head ", h, " of batch item ", b);
      }
#endif
}

// name: "block", "full" or "column", as in block_counts and block_indices.
inline BlockLists lists_view(const char* op, const BlockSparseAttentionParams& p, const std::string& name,
                             const OptTensor& counts, const OptTensor& indices, int32_t limit, const Tensor& query) {
  VTK_CHECK(op, counts.has_value() == indices.has_value(), "expected ", name, "_counts and ", name,
            "_indices together");
  if (!counts.has_value()) return {};
  const std::string counts_name = name + "_counts", indices_name = name + "_indices";
  const int32_t rows = ceil_div(p.num_queries, p.block_q);
  check_same_device(op, counts_name.c_str(), *counts, "query", query);
  check_same_device(op, indices_name.c_str(), *indices, "query", query);
  check_dtype(op, counts_name.c_str(), *counts, ScalarType::Int);
  check_dtype(op, indices_name.c_str(), *indices, ScalarType::Int);
  auto fits = [&](const Tensor& t, int64_t dim) {
    return t.dim() == dim && (t.size(0) == 1 || t.size(0) == p.batch) && (t.size(1) == 1 || t.size(1) == p.num_heads) &&
           t.size(2) == rows;
  };
  VTK_CHECK(op, fits(*counts, 3), "expected ", counts_name, " of shape [B | 1, H | 1, Mq] with B = ", p.batch,
            ", H = ", p.num_heads, ", Mq = ceil(Q / block_q) = ", rows, ", got ", shape_text(*counts));
  VTK_CHECK(op, fits(*indices, 4), "expected ", indices_name,
            " of shape [B | 1, H | 1, Mq, capacity] with B = ", p.batch, ", H = ", p.num_heads,
            ", Mq = ceil(Q / block_q) = ", rows, ", got ", shape_text(*indices));
  check_contiguous_last(op, indices_name.c_str(), *indices);
  auto stride = [](const Tensor& t, int64_t dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); };
  BlockLists lists;
  lists.counts = static_cast<const int32_t*>(counts->const_data_ptr());
  lists.entries = static_cast<const int32_t*>(indices->const_data_ptr());
  lists.count_stride_batch = stride(*counts, 0);
  lists.count_stride_head = stride(*counts, 1);
  lists.count_stride_row = stride(*counts, 2);
  lists.entry_stride_batch = stride(*indices, 0);
  lists.entry_stride_head = stride(*indices, 1);
  lists.entry_stride_row = stride(*indices, 2);
  lists.capacity = check_count(op, "list capacity", indices->size(3));
#if defined(VTK_BACKEND_CUDA)
  VTK_CHECK(op, lists.capacity < 1 << 24, "expected ", indices_name,
            " with fewer than 2^24 entries a list on CUDA, got ", shape_text(*indices));
#endif
  if (p.batch > 0 && p.num_heads > 0) check_entries(op, p, name, lists, rows, limit);
  return lists;
}

inline void set_key_bias(const char* op, BlockSparseAttentionParams& p, const OptTensor& bias, const Tensor& query) {
  if (!bias.has_value()) return;
  check_same_device(op, "key_bias", *bias, "query", query);
  check_dtype(op, "key_bias", *bias, ScalarType::Float);
  check_shape(op, "key_bias", *bias, "[B, N]", {p.batch, p.num_keys});
  p.key_bias = static_cast<const float*>(bias->const_data_ptr());
  p.bias_stride_batch = bias->stride(0);
  p.bias_stride_key = bias->stride(1);
}

// One place among the keys for each batch item. On CUDA kernels clamp it to [0, N].
inline void set_places(const char* op, const BlockSparseAttentionParams& p, const char* name, const OptTensor& places,
                       const Tensor& query, const int32_t*& data, int64_t& stride) {
  if (!places.has_value()) return;
  check_same_device(op, name, *places, "query", query);
  check_dtype(op, name, *places, ScalarType::Int);
  check_shape(op, name, *places, "[B]", {p.batch});
  data = static_cast<const int32_t*>(places->const_data_ptr());
  stride = places->stride(0);
#if !defined(VTK_BACKEND_CUDA)
  for (int32_t b = 0; b < p.batch; ++b)
    VTK_CHECK(op, data[b * stride] >= 0 && data[b * stride] <= p.num_keys, "expected 0 <= ", name,
              " <= N = ", p.num_keys, ", got ", name, "[", b, "] = ", data[b * stride]);
#endif
}

inline void set_seqlens(const char* op, BlockSparseAttentionParams& p, const OptTensor& seqlens, const Tensor& query) {
  set_places(op, p, "seqlens_k", seqlens, query, p.seqlens_k, p.seqlens_stride);
}

inline void set_starts(const char* op, BlockSparseAttentionParams& p, const OptTensor& starts, const Tensor& query) {
  set_places(op, p, "starts_k", starts, query, p.starts_k, p.starts_stride);
}

inline void set_options(const char* op, BlockSparseAttentionParams& p, int64_t block_q, int64_t block_k, bool causal,
                        std::optional<double> scale) {
  for (auto [name, size] : {std::pair{"block_q", block_q}, std::pair{"block_k", block_k}})
    VTK_CHECK(op, size == 64 || size == 128, "expected ", name, " to be 64 or 128, got ", size);
  p.block_q = static_cast<int32_t>(block_q);
  p.block_k = static_cast<int32_t>(block_k);
  p.causal = causal;
  p.scale = static_cast<float>(scale.has_value() ? *scale : 1.0 / std::sqrt(static_cast<double>(p.head_dim)));
}

inline void set_lists(const char* op, BlockSparseAttentionParams& p, const Tensor& block_counts,
                      const Tensor& block_indices, const OptTensor& full_counts, const OptTensor& full_indices,
                      const OptTensor& column_counts, const OptTensor& column_indices, bool token_offsets,
                      const Tensor& query) {
  p.token_offsets = token_offsets;
  const int32_t limit = token_offsets ? p.num_keys : ceil_div(p.num_keys, p.block_k);
  p.partial = lists_view(op, p, "block", block_counts, block_indices, limit, query);
  p.full = lists_view(op, p, "full", full_counts, full_indices, limit, query);
  p.columns = lists_view(op, p, "column", column_counts, column_indices, p.num_keys, query);
}

}  // namespace
}  // namespace vtk
