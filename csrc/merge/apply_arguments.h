// What the ops that merge rows have in common: the arguments of values and weight.
#pragma once
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/backend.h"
#include "common/check.h"
#include "common/empty.h"
#include "merge/merge_apply.h"
#include "merge/owner_argument.h"

namespace vtk {

// values [B, N, D], or packed [T, D], which is one batch row.
inline void set_values(const char* op, const char* name, MergeApplyParams& p, const Tensor& values,
                       bool packed = false) {
  check_dim(op, name, values, packed ? 2 : 3, packed ? "[T, D]" : "[B, N, D]");
  p.dtype = float_dtype(op, name, values);
  check_contiguous_last(op, name, values);
  check_width(op, name, values);
  const int64_t token_dim = packed ? 0 : 1;
  p.batch = packed ? 1 : check_count(op, "batch size", values.size(0));
  p.num_tokens = check_count(op, "token count", values.size(token_dim));
  p.channels = check_count(op, "channel count", values.size(token_dim + 1));
  p.values = values.const_data_ptr();
  p.stride_batch = packed ? 0 : values.stride(0);
  p.stride_token = values.stride(token_dim);
}

// After reduce. The CPU reads the weights that must be sizes; else the formula is applied to whatever they are.
inline void set_weight(const char* op, const char* name, MergeApplyParams& p, const std::optional<Tensor>& weight,
                       const char* values_name, const Tensor& values, bool packed = false) {
  if (!weight.has_value()) return;
  check_same_device(op, name, *weight, values_name, values);
  std::vector<int64_t> shape = {p.batch, p.num_tokens};
  if (packed) shape = {p.num_tokens};
  check_shape(op, name, *weight, packed ? "[T]" : "[B, N]", shape);
  p.weight_dtype = float_dtype(op, name, *weight);
  p.weight = weight->const_data_ptr();
  p.weight_stride_batch = packed ? 0 : weight->stride(0);
  p.weight_stride_token = weight->stride(packed ? 0 : 1);
#if !defined(VTK_BACKEND_CUDA)
  if (p.batch == 0 || p.num_tokens == 0 || p.reduce == MergeReduce::kSimilarityWeighted) return;
  const WeightConflict conflict = check_weight_cpu(p);
  const std::string row = packed ? "" : std::to_string(conflict.batch) + ", ";
  VTK_CHECK(op, conflict.batch < 0, "expected ", name, " > 0 and finite, got ", name, "[", row, conflict.token,
            "] = ", conflict.value);
#endif
}

// After owner. The CPU reads the centers.
inline void set_center(const char* op, MergeApplyParams& p, const Tensor& center, const Tensor& values) {
  check_same_device(op, "center", center, "values", values);
  check_dtype(op, "center", center, ScalarType::Long);
  check_shape(op, "center", center, "[B, out_len]", {p.batch, p.out_len});
  p.center = static_cast<const int64_t*>(center.const_data_ptr());
  p.center_stride_batch = center.stride(0);
  p.center_stride_row = center.stride(1);
#if !defined(VTK_BACKEND_CUDA)
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t* owner = p.owner + b * p.owner_stride_batch;
    std::vector<bool> has_token(p.out_len);
    for (int64_t n = 0; n < p.num_tokens; ++n)
      if (owner[n * p.owner_stride_token] >= 0) has_token[owner[n * p.owner_stride_token]] = true;
    for (int64_t m = 0; m < p.out_len; ++m) {
      const int64_t n = p.center[b * p.center_stride_batch + m * p.center_stride_row];
      const bool fits = n >= 0 && n < p.num_tokens ? owner[n * p.owner_stride_token] == m : n == -1 && !has_token[m];
      VTK_CHECK(op, fits, "expected center to be a token of its row, -1 for a row of none, got center[", b, ", ", m,
                "] = ", n);
    }
  }
#endif
}

// Allocates and computes (merged [B, M, D], weight float32 [B, M]); packed: [M, D] and [M].
inline std::tuple<Tensor, Tensor> run_apply([[maybe_unused]] const char* op, MergeApplyParams& p, const Tensor& values,
                                            bool packed = false) {
  std::vector<int64_t> rows = {p.batch, p.out_len}, shape = {p.batch, p.out_len, p.channels};
  if (packed) rows.erase(rows.begin()), shape.erase(shape.begin());
  Tensor merged = empty(shape, values.scalar_type(), values);
  Tensor weight = empty(rows, ScalarType::Float, values);
  p.merged = merged.mutable_data_ptr();
  p.weight_out = static_cast<float*>(weight.mutable_data_ptr());
  if (p.batch > 0 && p.out_len > 0) VTK_LAUNCH(op, merge_apply, p, values);
  return {merged, weight};
}

}  // namespace vtk
