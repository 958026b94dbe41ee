// select_diverse: schema, checks, allocation, launch.
#include "select/select_diverse.h"

#include "common/backend.h"
#include "common/check.h"
#include "common/empty.h"

namespace vtk {
namespace {

using OptTensor = std::optional<Tensor>;
constexpr const char* kOp = "select_diverse";

DiverseMode parse_mode(const std::string& text) {
  if (text == "max_min") return DiverseMode::kMaxMin;
  if (text == "max_sum") return DiverseMode::kMaxSum;
  fail(kOp, "expected mode to be \"max_min\" or \"max_sum\", got \"", text, "\"");
}

#if defined(VTK_BACKEND_CUDA)
void run(SelectDiverseParams& p, const Tensor& like) {
  Tensor workspace = empty({select_diverse_workspace(p)}, ScalarType::Byte, like);
  p.workspace = workspace.mutable_data_ptr();
  VTK_LAUNCH(kOp, select_diverse, p, like);
}
#else
// On CUDA the same contradictions are clamped without a sync, see select_diverse.cu.
void check_values(const SelectDiverseParams& p) {
  auto dropped = [&](int64_t b, int64_t n) {
    return p.drop_mask.data != nullptr && p.drop_mask.data[b * p.drop_mask.stride_row + n * p.drop_mask.stride_col];
  };
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.seed != nullptr) {
      const int64_t seed = p.seed[b * p.seed_stride];
      VTK_CHECK(kOp, seed >= 0 && seed < p.num_tokens, "expected 0 <= seed < N = ", p.num_tokens, ", got seed[", b,
                "] = ", seed);
      VTK_CHECK(kOp, !dropped(b, seed), "seed[", b, "] = ", seed, " is set in drop_mask");
    }
    if (p.drop_mask.data == nullptr) continue;
    int64_t allowed = 0;
    for (int64_t n = 0; n < p.num_tokens; ++n) allowed += !dropped(b, n);
    VTK_CHECK(kOp, allowed >= p.keep, "drop_mask leaves ", allowed, " tokens of batch row ", b, " but keep = ", p.keep);
  }
}

void run(SelectDiverseParams& p, const Tensor&) {
  check_values(p);
  VTK_LAUNCH(kOp, select_diverse, p, like);
}
#endif

// select_diverse(features [B, N, C], keep, seed int64 [B]) -> indices int64 [B, keep]
Tensor select_diverse(const Tensor& features, int64_t keep, const OptTensor& seed, const std::string& mode,
                      const OptTensor& drop_mask, const std::string& order) {
  SelectDiverseParams p = {};
  check_dim(kOp, "features", features, 3, "[B, N, C]");
  p.dtype = float_dtype(kOp, "features", features);
  check_contiguous_last(kOp, "features", features);
  p.batch = check_count(kOp, "batch size", features.size(0));
  p.num_tokens = check_count(kOp, "token count", features.size(1));
  p.channels = check_count(kOp, "channel count", features.size(2));
  VTK_CHECK(kOp, keep >= 0 && keep <= p.num_tokens, "expected 0 <= keep <= N = ", p.num_tokens, ", got keep = ", keep);
  p.keep = static_cast<int32_t>(keep);
  p.mode = parse_mode(mode);
  p.order = parse_order(kOp, order, "pick");
  p.features = features.const_data_ptr();
  p.stride_batch = features.stride(0);
  p.stride_token = features.stride(1);
  if (seed.has_value()) {
    check_same_device(kOp, "seed", *seed, "features", features);
    check_dtype(kOp, "seed", *seed, ScalarType::Long);
    check_shape(kOp, "seed", *seed, "[B]", {p.batch});
    p.seed = static_cast<const int64_t*>(seed->const_data_ptr());
    p.seed_stride = seed->stride(0);
  }
  p.drop_mask = mask_view(kOp, "drop_mask", drop_mask, "[B, N]", {p.batch, p.num_tokens}, "features", features);

  Tensor indices = empty({p.batch, keep}, ScalarType::Long, features);
  p.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  if (p.batch > 0 && keep > 0) run(p, features);
  return indices;
}

#if defined(VTK_DEFINES_SCHEMAS)
VTK_FRAGMENT(m) {
  // Greedy diversity by cosine similarity: farthest-first ("max_min") or least summed similarity ("max_sum").
  m.def(
      "select_diverse(Tensor features, SymInt keep, Tensor? seed=None, *, str mode=\"max_min\", Tensor? "
      "drop_mask=None, "
      "str order=\"position\") -> Tensor indices");
}
#endif

VTK_IMPL(m) { m.impl("select_diverse", TORCH_BOX(&select_diverse)); }

}  // namespace
}  // namespace vtk
