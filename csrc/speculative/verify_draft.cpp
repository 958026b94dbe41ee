// verify_draft: schema, checks, allocation, launch.
#include "speculative/verify_draft.h"

#include <cmath>
#include <tuple>

#include "common/backend.h"
#include "common/check.h"
#include "common/empty.h"

namespace vtk {
namespace {

using OptTensor = std::optional<Tensor>;
constexpr const char* kOp = "verify_draft";

VerifyMode parse_mode(const std::string& text) {
  if (text == "greedy") return VerifyMode::kGreedy;
  if (text == "sample") return VerifyMode::kSample;
  if (text == "block") return VerifyMode::kBlock;
  if (text == "typical") return VerifyMode::kTypical;
  if (text == "relaxed") return VerifyMode::kRelaxed;
  fail(kOp, "expected mode to be \"greedy\", \"sample\", \"block\", \"typical\" or \"relaxed\", got \"", text, "\"");
}

LogitRows logit_rows(const char* argument, const Tensor& logits) {
  check_contiguous_last(kOp, argument, logits);
  return {logits.const_data_ptr(), float_dtype(kOp, argument, logits), logits.stride(0), logits.stride(1)};
}

void set_target(VerifyDraftParams& p, const Tensor& logits) {
  check_dim(kOp, "target_logits", logits, 3, "[B, n, V]");
  p.target = logit_rows("target_logits", logits);
  p.batch = check_count(kOp, "batch size", logits.size(0));
  VTK_CHECK(kOp, logits.size(1) >= 1, "expected target_logits of at least one node, the root, got ",
            shape_text(logits));
  VTK_CHECK(kOp, logits.size(1) <= kMaxDraftNodes, "expected at most ", kMaxDraftNodes,
            " nodes a tree, got n = ", logits.size(1));
  VTK_CHECK(kOp, logits.size(2) >= 1, "expected target_logits of at least one token, got ", shape_text(logits));
  VTK_CHECK(kOp, logits.size(2) <= kMaxVocabulary, "expected a vocabulary of at most ", kMaxVocabulary,
            " tokens, got V = ", logits.size(2));
  p.nodes = static_cast<int32_t>(logits.size(1));
  p.vocab = static_cast<int32_t>(logits.size(2));
}

void set_draft(VerifyDraftParams& p, const OptTensor& logits, const Tensor& target, bool without_replacement) {
  VTK_CHECK(kOp, logits.has_value() || !without_replacement,
            "expected draft_logits with without_replacement: the distribution that the drafts were drawn from");
  p.without_replacement = without_replacement;
  if (!logits.has_value()) return;
  VTK_CHECK(kOp, p.mode == VerifyMode::kSample || p.mode == VerifyMode::kBlock,
            "draft_logits is for the modes \"sample\" and \"block\"; the others take the drafts as given");
  check_same_device(kOp, "draft_logits", *logits, "target_logits", target);
  check_dim(kOp, "draft_logits", *logits, 3, "[B, n, V] or [B, n - 1, V]");
  const int64_t rows = logits->size(1);
  VTK_CHECK(kOp, logits->size(0) == p.batch && (rows == p.nodes || rows == p.nodes - 1) && logits->size(2) == p.vocab,
            "expected draft_logits.shape = [B, n, V] = [", p.batch, ", ", p.nodes, ", ", p.vocab,
            "], or [B, n - 1, V] without the last node, got ", shape_text(*logits));
  p.draft = logit_rows("draft_logits", *logits);
}

// A view of [B, n] whose rows are dense.
template <class T>
const T* rows_of(const char* argument, const Tensor& tensor, ScalarType type, const VerifyDraftParams& p,
                 const Tensor& target, int64_t& stride) {
  check_same_device(kOp, argument, tensor, "target_logits", target);
  check_dtype(kOp, argument, tensor, type);
  check_shape(kOp, argument, tensor, "[B, n]", {p.batch, p.nodes});
  check_contiguous_last(kOp, argument, tensor);
  stride = tensor.stride(0);
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
PerRequest<T> per_request(const char* argument, const OptTensor& tensor, ScalarType type, const VerifyDraftParams& p,
                          const Tensor& target) {
  if (!tensor.has_value()) return {};
  check_same_device(kOp, argument, *tensor, "target_logits", target);
  check_dtype(kOp, argument, *tensor, type);
  check_shape(kOp, argument, *tensor, "[B]", {p.batch});
  return {static_cast<const T*>(tensor->const_data_ptr()), tensor->stride(0)};
}

void set_neighbors(VerifyDraftParams& p, const OptTensor& neighbors, double delta, const Tensor& target) {
  const bool relaxed = p.mode == VerifyMode::kRelaxed;
  VTK_CHECK(kOp, relaxed == neighbors.has_value(),
            relaxed ? "expected neighbors [rows, K] in mode \"relaxed\"" : "neighbors is for mode \"relaxed\"");
  VTK_CHECK(kOp, std::isfinite(delta) && delta >= 0.0, "expected a finite delta >= 0, got ", delta);
  p.delta = delta;
  if (!relaxed) return;
  check_same_device(kOp, "neighbors", *neighbors, "target_logits", target);
  check_dtype(kOp, "neighbors", *neighbors, ScalarType::Int);
  check_dim(kOp, "neighbors", *neighbors, 2, "[rows, K]");
  VTK_CHECK(kOp, neighbors->is_contiguous(), "expected contiguous neighbors; call neighbors.contiguous() first");
  p.neighbors = static_cast<const int32_t*>(neighbors->const_data_ptr());
  p.neighbor_rows = check_count(kOp, "neighbors row count", neighbors->size(0));
  p.neighbor_count = check_count(kOp, "neighbors per token", neighbors->size(1));
}

void set_typical(VerifyDraftParams& p, double epsilon, double delta) {
  VTK_CHECK(kOp, std::isfinite(epsilon) && epsilon >= 0.0, "expected a finite typical_epsilon >= 0, got ", epsilon);
  VTK_CHECK(kOp, std::isfinite(delta) && delta >= 0.0, "expected a finite typical_delta >= 0, got ", delta);
  p.typical_epsilon = epsilon;
  p.typical_delta = delta;
}

#if defined(VTK_BACKEND_CUDA)
void check_values(const VerifyDraftParams&) {}
#else
// On CUDA reading them needs a synchronisation: there a node whose parent does not come before it is not reached, a
// token outside the vocabulary is none, and counts are clamped.
void check_tree(const VerifyDraftParams& p, int64_t b) {
  const int64_t* tokens = p.draft_tokens + b * p.stride_tokens;
  const int32_t* parents = p.parents + b * p.stride_parents;
  const int32_t count = p.num_nodes.at(b, p.nodes);
  VTK_CHECK(kOp, count >= 0 && count <= p.nodes, "expected 0 <= num_nodes[", b, "] <= n = ", p.nodes, ", got ", count);
  VTK_CHECK(kOp, count == 0 || parents[0] == -1, "expected parents[", b, ", 0] = -1, the root, got ", parents[0]);
  for (int32_t i = 1; i < count; ++i) {
    VTK_CHECK(kOp, parents[i] >= 0 && parents[i] < i, "expected parents[", b, ", ", i, "] before its child, in [0, ", i,
              "), got ", parents[i]);
    VTK_CHECK(kOp, p.mode != VerifyMode::kBlock || parents[i] == i - 1,
              "mode \"block\" verifies chains: expected parents[", b, ", ", i, "] = ", i - 1, ", got ", parents[i]);
    VTK_CHECK(kOp, tokens[i] >= -1 && tokens[i] < p.vocab, "expected draft_tokens[", b, ", ", i,
              "] in the vocabulary [0, ", p.vocab, "), or -1 for none, got ", tokens[i]);
  }
}

void check_values(const VerifyDraftParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    check_tree(p, b);
    const float temperature = p.temperature.at(b, 1.0f), top_p = p.top_p.at(b, 1.0f), min_p = p.min_p.at(b, 0.0f);
    VTK_CHECK(kOp, std::isfinite(temperature) && temperature >= 0.0f, "expected a finite temperature[", b,
              "] >= 0, got ", temperature);
    VTK_CHECK(kOp, top_p > 0.0f && top_p <= 1.0f, "expected 0 < top_p[", b, "] <= 1, got ", top_p);
    VTK_CHECK(kOp, min_p >= 0.0f && min_p <= 1.0f, "expected 0 <= min_p[", b, "] <= 1, got ", min_p);
  }
}
#endif

// verify_draft(target_logits [B, n, V], draft_tokens [B, n], parents [B, n])
//   -> (tokens [B, depth + 1], accepted [B, depth + 1], num_accepted int32 [B])
std::tuple<Tensor, Tensor, Tensor> verify_draft(const Tensor& target_logits, const Tensor& draft_tokens,
                                                const Tensor& parents, const OptTensor& draft_logits,
                                                const std::string& mode, const OptTensor& temperature,
                                                const OptTensor& top_k, const OptTensor& top_p, const OptTensor& min_p,
                                                const OptTensor& seeds, const OptTensor& positions,
                                                const OptTensor& num_nodes, const OptTensor& neighbors, double delta,
                                                double typical_epsilon, double typical_delta, bool without_replacement,
                                                std::optional<int64_t> depth) {
  const Tensor& target = target_logits;
  VerifyDraftParams p = {};
  p.mode = parse_mode(mode);
  set_target(p, target);
  set_draft(p, draft_logits, target, without_replacement);
  p.draft_tokens = rows_of<int64_t>("draft_tokens", draft_tokens, ScalarType::Long, p, target, p.stride_tokens);
  p.parents = rows_of<int32_t>("parents", parents, ScalarType::Int, p, target, p.stride_parents);
  p.num_nodes = per_request<int32_t>("num_nodes", num_nodes, ScalarType::Int, p, target);
  p.temperature = per_request<float>("temperature", temperature, ScalarType::Float, p, target);
  p.top_k = per_request<int32_t>("top_k", top_k, ScalarType::Int, p, target);
  p.top_p = per_request<float>("top_p", top_p, ScalarType::Float, p, target);
  p.min_p = per_request<float>("min_p", min_p, ScalarType::Float, p, target);
  p.seeds = per_request<int64_t>("seeds", seeds, ScalarType::Long, p, target);
  p.positions = per_request<int64_t>("positions", positions, ScalarType::Long, p, target);
  VTK_CHECK(kOp, seeds.has_value() || p.mode == VerifyMode::kGreedy, "expected seeds [B] in mode \"", mode,
            "\", which draws random numbers");
  set_neighbors(p, neighbors, delta, target);
  set_typical(p, typical_epsilon, typical_delta);
  const int64_t width = depth.value_or(p.nodes - 1);
  VTK_CHECK(kOp, width >= 0 && width < p.nodes, "expected 0 <= depth <= n - 1 = ", p.nodes - 1, ", got ", width);
  p.depth = static_cast<int32_t>(width);
  check_values(p);

  Tensor tokens = empty({p.batch, width + 1}, ScalarType::Long, target);
  Tensor accepted = empty({p.batch, width + 1}, ScalarType::Long, target);
  Tensor num_accepted = empty({p.batch}, ScalarType::Int, target);
  if (p.batch == 0) return {tokens, accepted, num_accepted};
  p.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  p.accepted = static_cast<int64_t*>(accepted.mutable_data_ptr());
  p.num_accepted = static_cast<int32_t*>(num_accepted.mutable_data_ptr());
#if defined(VTK_BACKEND_CUDA)
  Tensor workspace = empty({verify_draft_workspace(p)}, ScalarType::Byte, target);
  p.workspace = workspace.mutable_data_ptr();
#endif
  VTK_LAUNCH(kOp, verify_draft, p, target);
  return {tokens, accepted, num_accepted};
}

#if defined(VTK_DEFINES_SCHEMAS)
VTK_FRAGMENT(m) {
  // Which drafted tokens a target model accepts, and the token after them.
  m.def(
      "verify_draft(Tensor target_logits, Tensor draft_tokens, Tensor parents, *, Tensor? draft_logits=None, "
      "str mode=\"greedy\", Tensor? temperature=None, Tensor? top_k=None, Tensor? top_p=None, Tensor? min_p=None, "
      "Tensor? seeds=None, Tensor? positions=None, Tensor? num_nodes=None, Tensor? neighbors=None, float delta=0.1, "
      "float typical_epsilon=0.09, float typical_delta=0.3, bool without_replacement=False, int? depth=None) -> "
      "(Tensor tokens, Tensor accepted, Tensor num_accepted)");
}
#endif

VTK_IMPL(m) { m.impl("verify_draft", TORCH_BOX(&verify_draft)); }

}  // namespace
}  // namespace vtk
