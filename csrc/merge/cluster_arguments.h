// The arguments and results that the clusterings have in common.
#pragma once
#include <optional>

#include "common/check.h"
#include "common/empty.h"
#include "merge/cluster_tokens.h"

namespace vtk {

inline ClusterTokens cluster_tokens(const char* op, const Tensor& tokens, const std::optional<Tensor>& valid) {
  ClusterTokens t = {};
  check_dim(op, "tokens", tokens, 3, "[B, N, D]");
  t.dtype = float_dtype(op, "tokens", tokens);
  check_contiguous_last(op, "tokens", tokens);
  t.batch = check_count(op, "batch size", tokens.size(0));
  t.count = check_count(op, "token count", tokens.size(1));
  t.channels = check_count(op, "channel count", tokens.size(2));
  VTK_CHECK(op, t.channels > 0, "expected tokens with at least one channel, got ", shape_text(tokens));
  t.data = tokens.const_data_ptr();
  t.stride_batch = tokens.stride(0);
  t.stride_token = tokens.stride(1);
  t.valid = mask_view(op, "valid", valid, "[B, N]", {t.batch, t.count}, "tokens", tokens);
  return t;
}

inline int32_t cluster_count(const char* op, int64_t clusters, const ClusterTokens& tokens) {
  VTK_CHECK(op, clusters >= 0 && clusters <= tokens.count, "expected 0 <= clusters <= N = ", tokens.count,
            ", got clusters = ", clusters);
  return static_cast<int32_t>(clusters);
}

}  // namespace vtk
