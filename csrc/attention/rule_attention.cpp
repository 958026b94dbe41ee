// rule_attention: schema, checks, launch. The kernels are block_sparse_attention's.
#include "attention/attention_rule.h"
#include "attention/block_sparse_arguments.h"
#include "attention/block_sparse_launch.h"

namespace vtk {
namespace {

constexpr const char* kOp = "rule_attention";
constexpr int64_t kBlockQ = 128;

// On CUDA kernels clamp the numbers of a rule.
void set_rule(BlockSparseAttentionParams& p, const Tensor& rule, const Tensor& query) {
  check_same_device(kOp, "rule", rule, "query", query);
  check_dtype(kOp, "rule", rule, ScalarType::Int);
  VTK_CHECK(kOp, rule.dim() == 2 && (rule.size(0) == 1 || rule.size(0) == p.num_heads) && rule.size(1) == kRuleNumbers,
            "expected rule of shape [H | 1, 5] with H = ", p.num_heads, ", got ", shape_text(rule));
  check_contiguous_last(kOp, "rule", rule);
  p.rule = static_cast<const int32_t*>(rule.const_data_ptr());
  p.rule_stride_head = rule.size(0) == 1 ? 0 : rule.stride(0);
#if !defined(VTK_BACKEND_CUDA)
  const std::pair<const char*, int32_t> least[kRuleNumbers] = {
      {"sink", 0}, {"window", 1}, {"unit", 1}, {"stride", 0}, {"phase", 0}};
  for (int64_t h = 0; h < rule.size(0); ++h)
    for (int32_t i = 0; i < kRuleNumbers; ++i) {
      const int32_t number = p.rule[h * p.rule_stride_head + i];
      VTK_CHECK(kOp, number >= least[i].second, "expected rule with ", least[i].first, " >= ", least[i].second,
                ", got rule[", h, ", ", i, "] = ", number);
    }
#endif
}

// rule_attention(query [B, H, Q, D], key and value [B, Hk, N, D], rule) -> (out [B, H, Q, D], lse [B, H, Q])
std::tuple<Tensor, Tensor> rule_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                          const Tensor& rule, std::optional<double> scale, const OptTensor& key_bias,
                                          const OptTensor& starts_k, const OptTensor& seqlens_k) {
  BlockSparseAttentionParams p = {};
  set_query(kOp, p, query);
  set_key_value(kOp, p, key, value, query);
  set_options(kOp, p, kBlockQ, kRuleBlock, /*causal=*/true, scale);
  set_rule(p, rule, query);
  set_key_bias(kOp, p, key_bias, query);
  set_starts(kOp, p, starts_k, query);
  set_seqlens(kOp, p, seqlens_k, query);
  return launch_forward(kOp, p, query);
}

#if defined(VTK_DEFINES_SCHEMAS)
VTK_FRAGMENT(m) {
  // Causal attention over sinks, a window and strided blocks, which five numbers a head describe.
  m.def(
      "rule_attention(Tensor query, Tensor key, Tensor value, Tensor rule, *, float? scale=None, "
      "Tensor? key_bias=None, Tensor? starts_k=None, Tensor? seqlens_k=None) -> (Tensor out, Tensor lse)");
}
#endif

VTK_IMPL(m) { m.impl("rule_attention", TORCH_BOX(&rule_attention)); }

}  // namespace
}  // namespace vtk
