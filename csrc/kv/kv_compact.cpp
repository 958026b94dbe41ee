// kv_compact: schema, checks, allocation, launch.
#include "kv/kv_compact.h"

#include <tuple>

#include "common/backend.h"
#include "common/check.h"
#include "common/empty.h"

namespace vtk {
namespace {

constexpr const char* kOp = "kv_compact";

// indices [B, K], of all heads, or [B, Hk, K]. The CPU reads them.
void set_indices(KvCompactParams& p, const Tensor& indices, const Tensor& k) {
  check_same_device(kOp, "indices", indices, "k", k);
  check_dtype(kOp, "indices", indices, ScalarType::Long);
  const bool per_head = indices.dim() == 3;
  VTK_CHECK(kOp,
            (per_head || indices.dim() == 2) && indices.size(0) == p.batch && (!per_head || indices.size(1) == p.heads),
            "expected indices.shape = [B, K] or [B, Hk, K] = [", p.batch, ", K] or [", p.batch, ", ", p.heads,
            ", K], got ", shape_text(indices));
  const int64_t last = indices.dim() - 1;
  p.kept = check_count(kOp, "index count", indices.size(last));
  VTK_CHECK(kOp, p.num_tokens > 0 || p.kept == 0, "expected indices without entries for k with N = 0 tokens, got ",
            shape_text(indices));
  p.indices = static_cast<const int64_t*>(indices.const_data_ptr());
  p.indices_stride_batch = indices.stride(0);
  p.indices_stride_head = per_head ? indices.stride(1) : 0;
  p.indices_stride_entry = indices.stride(last);
#if !defined(VTK_BACKEND_CUDA)
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t h = 0; h < (per_head ? p.heads : 1); ++h)
      for (int64_t i = 0; i < p.kept; ++i)
        VTK_CHECK(kOp, p.index(b, h, i) >= 0 && p.index(b, h, i) < p.num_tokens,
                  "expected 0 <= indices < N = ", p.num_tokens, ", got ", p.index(b, h, i), " at [", b, ", ",
                  per_head ? std::to_string(h) + ", " : "", i, "]");
#endif
}

// kv_compact(k, v [B, Hk, N, D], indices int64 [B, K] or [B, Hk, K]) -> k, v [B, Hk, K, D]
std::tuple<Tensor, Tensor> kv_compact(const Tensor& k, const Tensor& v, const Tensor& indices) {
  check_dim(kOp, "k", k, 4, "[B, Hk, N, D]");
  float_dtype(kOp, "k", k);
  check_same_device(kOp, "v", v, "k", k);
  check_dtype(kOp, "v", v, k.scalar_type());
  check_shape(kOp, "v", v, "[B, Hk, N, D]", {k.size(0), k.size(1), k.size(2), k.size(3)});
  KvCompactParams p = {};
  p.batch = check_count(kOp, "batch size", k.size(0));
  p.heads = check_count(kOp, "head count", k.size(1));
  p.num_tokens = check_count(kOp, "token count", k.size(2));
  set_indices(p, indices, k);
  const int64_t element = static_cast<int64_t>(k.element_size());
  p.row_bytes = k.size(3) * element;

  Tensor out[2];
  for (int side = 0; side < 2; ++side) {
    const Tensor& x = side == 0 ? k : v;
    check_contiguous_last(kOp, side == 0 ? "k" : "v", x);
    p.from[side] = {static_cast<const char*>(x.const_data_ptr()), x.stride(0) * element, x.stride(1) * element,
                    x.stride(2) * element};
    out[side] = empty({p.batch, p.heads, p.kept, k.size(3)}, k.scalar_type(), k);
    p.to[side] = static_cast<char*>(out[side].mutable_data_ptr());
  }
  if (int64_t{p.batch} * p.heads * p.kept * p.row_bytes > 0) VTK_LAUNCH(kOp, kv_compact, p, k);
  return {out[0], out[1]};
}

#if defined(VTK_DEFINES_SCHEMAS)
VTK_FRAGMENT(m) {
  // Keys and values of the chosen tokens, one choice for all heads or one a head.
  m.def("kv_compact(Tensor k, Tensor v, Tensor indices) -> (Tensor k, Tensor v)");
}
#endif

VTK_IMPL(m) { m.impl("kv_compact", TORCH_BOX(&kv_compact)); }

}  // namespace
}  // namespace vtk
