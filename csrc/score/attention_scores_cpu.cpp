// attention_scores on the CPU.
//
// score(n) = reduce over heads of reduce over rows i of exp(scale q_i k_n - lse_i), logits in powers of two
//
// One unit of work is a head's rows of one part; units run in parallel, each writes its own row of partial scores
// [B, H, parts, N], and a second pass reduces those in a fixed order. Within a unit a tile of a few query rows (L2)
// holds logits, then probabilities:
//   few rows   attention_scores_few_rows.h: dot products, bound by reading K once
//   many rows  attention_scores_many_rows.h: register tiles, bound by FMA: a vector of logits costs D of them, and
//              about 25 other operations
// Up to kMaxWholeKeys every logit is computed once. Longer spans are streamed in blocks, twice: first the rows'
// maximum and sum (online softmax), then the scores. Nothing grows with Q * N.
//
// A NaN logit reaches its row's sum and so all probabilities of the row. A key that is excluded, by mask or causally,
// never enters, so NaN in padding cannot leak.
#include "score/attention_scores.h"

#include "common/parallel.h"
#include "score/attention_scores_few_rows.h"
#include "score/attention_scores_many_rows.h"

namespace vtk {
namespace VTK_ISA {
namespace {

constexpr int64_t kMinThreadWork = 1 << 18;  // multiplications that pay for a fork
constexpr int64_t kOtherWork = 25;           // per probability
constexpr int32_t kReduceKeys = 512;

int64_t grain(int64_t work_each) { return std::max<int64_t>(1, kMinThreadWork / std::max<int64_t>(1, work_each)); }

template <class T>
void score_units(const AttentionScoresParams& p, const Plan& plan, float* partial) {
  const int64_t units = int64_t{p.batch} * p.num_heads * plan.parts;
  auto run = [&](auto&& worker, int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) worker.run(unit, partial + unit * plan.padded_keys);
  };
  if (plan.few_rows) {
    Scratch<float> logits = scratch<float>(int64_t{p.batch} * p.num_heads * p.num_queries * plan.padded_keys);
    const int64_t blocks = p.batch * FewRows<T>::num_blocks(p);
    const int64_t rows = int64_t{p.num_heads} * p.num_queries;
    parallel_for(blocks, grain(rows * kBlockKeys * p.head_dim), [&](int64_t begin, int64_t end) {
      FewRows<T> worker(p, plan, logits.get());
      for (int64_t block = begin; block < end; ++block) worker.compute_logits(block);
    });
    parallel_for(units, grain(kOtherWork * p.num_queries * p.num_keys),
                 [&](int64_t begin, int64_t end) { run(FewRows<T>(p, plan, logits.get()), begin, end); });
  } else {
    parallel_for(units, grain(int64_t{plan.part_rows} * p.num_keys * p.head_dim),
                 [&](int64_t begin, int64_t end) { run(ManyRows<T>(p, plan), begin, end); });
  }
}

int32_t count_voters(const AttentionScoresParams& p, int32_t batch) {
  const MaskView& mask = p.query_mask;
  if (mask.data == nullptr) return p.num_queries;
  int32_t voters = 0;
  for (int32_t q = 0; q < p.num_queries; ++q) voters += mask.data[batch * mask.stride_row + q * mask.stride_col];
  return voters;
}

// Reduces parts, then heads, of keys [begin, end) of one output row.
void reduce_partial(const AttentionScoresParams& p, const Plan& plan, const float* partial, int32_t heads,
                    float by_rows, float* out, int64_t begin, int64_t end) {
  const bool max_rows = p.query_reduce == Reduce::kMax, max_heads = p.head_reduce == Reduce::kMax;
  for (int64_t n = begin; n < end; n += kLanes) {
    f32v total = {};
    for (int32_t h = 0; h < heads; ++h) {
      f32v head = {};
      for (int32_t part = 0; part < plan.parts; ++part) {
        f32v x = load(partial + (int64_t{h} * plan.parts + part) * plan.padded_keys + n);
        head = max_rows ? combine<true>(head, x) : combine<false>(head, x);
      }
      head *= by_rows;
      total = max_heads ? combine<true>(total, head) : combine<false>(total, head);
    }
    if (p.head_reduce == Reduce::kMean) total /= static_cast<float>(heads);
    for (int64_t lane = 0; lane < std::min<int64_t>(kLanes, end - n); ++lane) out[n + lane] = total[lane];
  }
}

void finish(const AttentionScoresParams& p, const Plan& plan, const float* partial) {
  const bool keep_heads = p.head_reduce == Reduce::kNone;
  const int32_t out_heads = keep_heads ? p.num_heads : 1, heads = p.num_heads / out_heads;
  const int64_t rows = int64_t{p.batch} * out_heads, blocks = (p.num_keys + kReduceKeys - 1) / kReduceKeys;
  const int64_t work = int64_t{kReduceKeys} * heads * plan.parts;
  parallel_for(rows * blocks, grain(work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / blocks, first = i % blocks * kReduceKeys;
      const int32_t voters = count_voters(p, static_cast<int32_t>(row / out_heads));
      const float by_rows = p.query_reduce == Reduce::kMean && voters > 0 ? 1.0f / voters : 1.0f;
      reduce_partial(p, plan, partial + row * heads * plan.parts * plan.padded_keys, heads, by_rows,
                     p.out + row * p.num_keys, first, std::min<int64_t>(first + kReduceKeys, p.num_keys));
    }
  });
}

}  // namespace

void attention_scores_cpu(const AttentionScoresParams& p) {
  const Plan plan(p);
  Scratch<float> partial = scratch<float>(int64_t{p.batch} * p.num_heads * plan.parts * plan.padded_keys);
  switch (p.dtype) {
    case DType::kFloat32: score_units<float>(p, plan, partial.get()); break;
    case DType::kFloat16: score_units<f16>(p, plan, partial.get()); break;
    case DType::kBFloat16: score_units<bf16>(p, plan, partial.get()); break;
  }
  finish(p, plan, partial.get());
}

}  // namespace VTK_ISA
}  // namespace vtk
