// nearest_match on the CPU: a matrix product whose results are reduced to a running arg-max, row by row.
//
//   pack    the centers once, as the float columns of dot_panel.h
//   match   a block of tokens that stays in the second cache level meets the panel in passes of up to 32 centers that
//           do too; a token keeps its best score and its row
//
// Metrics are wide here and centers few, so tokens are read where they lie: transposing them, as bipartite_match does,
// would cost as much as multiplying. Every dot product has the summation order of dot_panel.h, so neither threads nor
// blocks can change a result.
// Extra memory of an item in work: the centers, 4 K C bytes, and about 4 N. Bound: N * K * C multiply-adds.
#include "merge/nearest_match.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/dot_panel.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace vtk {
namespace VTK_ISA {
namespace {

constexpr int kMaxPassGroups = 8;           // of panel columns
constexpr int64_t kPassFloats = 64 << 10;   // of a pass of the panel
constexpr int64_t kBlockBytes = 128 << 10;  // of the tokens of a block
constexpr int64_t kWorkGrain = 1 << 17;     // multiply-adds that pay for a fork
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// 1 / norm; 0 for a zero vector, NaN for a token without a cosine.
float inverse_norm(float squared_norm) {
  if (!(squared_norm < kInfinity)) return NAN;
  return squared_norm >= kMinSquaredNorm ? 1.0f / std::sqrt(squared_norm) : 0.0f;
}

template <class T>
class Matcher {
 public:
  Matcher(const NearestMatchParams& params, int64_t b)
      : p(params),
        base_(static_cast<const T*>(p.metric) + b * p.stride_batch),
        owner_(p.owner + b * p.num_tokens),
        similarity_(p.similarity + b * p.num_tokens),
        tokens_(scratch<int32_t>(p.num_tokens)),
        rows_(scratch<int32_t>(p.num_centers)) {
    split(b);
    num_groups_ = (num_centers_ + kPanelWidth - 1) / kPanelWidth;
    panel_ = scratch<float>(num_groups_ * group_size_);
    terms_ = scratch<float>(int64_t{num_centers_});
  }

  void run() {
    if (num_centers_ == 0) return;
    parallel_for(num_groups_, grain(group_size_), [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) pack(static_cast<int32_t>(g));
    });
    const int64_t block = std::max<int64_t>(kMaxPanelRows, kBlockBytes / (int64_t{p.channels} * sizeof(T)));
    parallel_for((num_tokens_ + block - 1) / block, grain(block * num_centers_ * p.channels),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i)
                     match(i * block, std::min<int64_t>((i + 1) * block, num_tokens_));
                 });
  }

 private:
  static int64_t grain(int64_t work) { return std::max<int64_t>(1, kWorkGrain / work); }

  // Settles the centers and the tokens that take no part, and lists the others.
  void split(int64_t b) {
    std::fill_n(owner_, p.num_tokens, -1);
    std::fill_n(similarity_, p.num_tokens, -kInfinity);
    for (int32_t k = 0; k < p.num_centers; ++k) {
      const int64_t n = p.centers[b * p.centers_stride_batch + k * p.centers_stride_row];
      if (n < 0) continue;
      owner_[n] = k;
      similarity_[n] = own_similarity(p.distance);
      rows_[num_centers_++] = k;
    }
    centers_ = p.centers + b * p.centers_stride_batch;
    for (int32_t n = 0; n < p.num_tokens; ++n) {
      const bool valid = p.valid.data == nullptr || p.valid.data[b * p.valid.stride_row + n * p.valid.stride_col];
      if (valid && owner_[n] < 0) tokens_[num_tokens_++] = n;
    }
  }

  const T* token(int64_t n) const { return base_ + n * p.stride_token; }

  float term(const T* x) const {
    const float squared = dot_pair(x, x, p.channels);
    return p.distance == Distance::kCosine ? inverse_norm(squared) : distance_term(squared);
  }

  void pack(int32_t g) {
    float* group = panel_.get() + g * group_size_;
    const int32_t first = g * kPanelWidth, count = std::min(kPanelWidth, num_centers_ - first);
    if (count < kPanelWidth) std::fill_n(group, group_size_, 0.0f);
    for (int32_t c = 0; c < count; ++c) {
      const T* center = token(centers_[rows_[first + c] * p.centers_stride_row]);
      pack_column(center, p.channels, c, group);
      terms_[first + c] = term(center);
    }
  }

  // The best centers of the listed tokens [begin, end). A NaN is never better; the first of equals stays.
  void match(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) owner_[tokens_[i]] = rows_[0];
    const int32_t pass = static_cast<int32_t>(std::clamp<int64_t>(kPassFloats / group_size_, 1, kMaxPassGroups));
    Scratch<float> own = scratch<float>(end - begin);
    for (int64_t i = begin; i < end; ++i) own[i - begin] = term(token(tokens_[i]));
    for (int32_t g = 0; g < num_groups_; g += pass) {
      const int32_t first = g * kPanelWidth;
      const int32_t groups = std::min(pass, num_groups_ - g),
                    count = std::min(groups * kPanelWidth, num_centers_ - first);
      dot_rows<kMaxPassGroups>(
          [&](int64_t i) { return token(tokens_[i]); }, begin, end, panel_.get() + g * group_size_, groups, p.channels,
          [&](int64_t i, const float* dots) { improve(tokens_[i], own[i - begin], dots, first, count); });
    }
    // Only NaN leaves -inf.
    for (int64_t i = begin; i < end; ++i) {
      float& best = similarity_[tokens_[i]];
      best = best == -kInfinity ? NAN : similarity_of(p.distance, best);
    }
  }

  void improve(int32_t n, float own, const float* dots, int32_t first, int32_t count) {
    float best = similarity_[n];
    int32_t where = -1;
    for (int32_t c = 0; c < count; ++c) {
      const float score = score_of(p.distance, dots[c], own, terms_[first + c]);
      where = score > best ? first + c : where;
      best = score > best ? score : best;
    }
    if (where < 0) return;
    similarity_[n] = best;
    owner_[n] = rows_[where];
  }

  const NearestMatchParams& p;
  const T* const base_;
  const int64_t* centers_;
  int64_t* const owner_;     // [N]
  float* const similarity_;  // [N], scores while they are compared
  Scratch<int32_t> tokens_;  // that look for a center
  Scratch<int32_t> rows_;    // of the centers there are
  int32_t num_tokens_ = 0, num_centers_ = 0, num_groups_;
  const int64_t group_size_ = panel_group_size(p.channels);
  Scratch<float> panel_, terms_;
};

template <class T>
void run(const NearestMatchParams& p) {
  auto match = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) Matcher<T>(p, b).run();
  };
  if (p.batch >= num_threads())
    parallel_for(p.batch, 1, match);
  else
    match(0, p.batch);
}

}  // namespace

void nearest_match_cpu(const NearestMatchParams& p) {
  switch (p.dtype) {
    case DType::kFloat32: run<float>(p); break;
    case DType::kFloat16: run<f16>(p); break;
    case DType::kBFloat16: run<bf16>(p); break;
  }
}

}  // namespace VTK_ISA
}  // namespace vtk
