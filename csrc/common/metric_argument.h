// The argument of ops that compare tokens by a metric.
#pragma once
#include "common/check.h"

namespace vtk {

// Sets metric, dtype, batch, num_tokens, channels and the strides of metric [B, N, C], or packed [T, C], one batch row.
template <class Params>
inline void set_metric(const char* op, Params& p, const Tensor& metric, bool packed = false) {
  check_dim(op, "metric", metric, packed ? 2 : 3, packed ? "[T, C]" : "[B, N, C]");
  p.dtype = float_dtype(op, "metric", metric);
  check_contiguous_last(op, "metric", metric);
  const int64_t token_dim = packed ? 0 : 1;
  p.batch = packed ? 1 : check_count(op, "batch size", metric.size(0));
  p.num_tokens = check_count(op, "token count", metric.size(token_dim));
  p.channels = check_count(op, "metric channel count", metric.size(token_dim + 1));
  VTK_CHECK(op, p.channels > 0, "expected metric with at least one channel, got ", shape_text(metric));
  p.metric = metric.const_data_ptr();
  p.stride_batch = packed ? 0 : metric.stride(0);
  p.stride_token = metric.stride(token_dim);
}

}  // namespace vtk
