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

// The CPU reads the weights; on CUDA the formula is applied to whatever they are.
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
  if (p.batch == 0 || p.num_tokens == 0) return;
  const WeightConflict conflict = check_weight_cpu(p);
  const std::string row = packed ? "" : std::to_string(conflict.batch) + ", ";
  VTK_CHECK(op, conflict.batch < 0, "expected ", name, " > 0 and finite, got ", name, "[", row, conflict.token,
            "] = ", conflict.value);
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
