// cluster_dpc_knn on the CPU: three passes over the distances of cluster_distance_cpu.h.
//
//   density  the k smallest distances of each token in a sorted list, summed in ascending order; and its largest
//   delta    the smallest distance to a denser token
//   assign   the nearest center, after the best scores were chosen by nth_element over packed integers
//
// Extra memory: 4 k + 32 bytes a token, and the matrix of up to 1024 tokens or a panel, of an item in work.
// Bound: N^2 / 2 * D operations of two instructions each, twice N^2 of them without the matrix.
#include "merge/cluster_dpc_knn.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "common/order_key.h"
#include "merge/cluster_distance_cpu.h"

namespace vtk {
namespace VTK_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

void insert(float* ascending, int32_t count, float value) {
  int32_t i = count - 1;
  if (!(value < ascending[i])) return;
  for (; i > 0 && value < ascending[i - 1]; --i) ascending[i] = ascending[i - 1];
  ascending[i] = value;
}

// One item. Tokens are counted among the usable ones.
class DensityPeaks {
 public:
  DensityPeaks(const ClusterDpcKnnParams& params, int64_t b)
      : p(params),
        b(b),
        distances_(p.tokens, b),
        tokens_(distances_.usable()),
        count_(distances_.num_usable()),
        clusters_(std::min(p.counts != nullptr ? p.counts[b * p.counts_stride] : p.clusters, count_)),
        mean_(scratch<float>(count_)),
        delta_(scratch<float>(count_)),
        centers_(scratch<int32_t>(count_)) {}

  void run() {
    std::fill_n(p.centers + b * p.clusters, p.clusters, -1);
    std::fill_n(p.owner + b * p.tokens.count, p.tokens.count, -1);
    if (clusters_ == 0) return;
    const float largest = find_means(std::min(p.k, clusters_));
    find_deltas(largest);
    choose_centers();
    assign();
  }

 private:
  // Returns the largest distance.
  float find_means(int32_t k) {
    Scratch<float> nearest = scratch<float>(int64_t{count_} * k), largest = scratch<float>(count_);
    std::fill_n(nearest.get(), int64_t{count_} * k, kInfinity);
    std::fill_n(largest.get(), count_, 0.0f);
    distances_.visit(tokens_, count_, tokens_, count_, [&](int64_t i, int32_t, const float* squared, int32_t count) {
      for (int32_t c = 0; c < count; ++c) {
        insert(&nearest[i * k], k, squared[c]);
        largest[i] = std::max(largest[i], squared[c]);
      }
    });
    for (int64_t i = 0; i < count_; ++i) {
      float sum = 0.0f;
      for (int32_t n = 0; n < k; ++n) sum += nearest[i * k + n];
      mean_[i] = sum / (static_cast<float>(k) * static_cast<float>(p.tokens.channels));
    }
    return *std::max_element(largest.get(), largest.get() + count_);
  }

  void find_deltas(float largest) {
    std::fill_n(delta_.get(), count_, kInfinity);
    distances_.visit(tokens_, count_, tokens_, count_, [&](int64_t i, int32_t j, const float* squared, int32_t count) {
      for (int32_t c = 0; c < count; ++c) {
        const float mean = mean_[j + c];
        if (mean < mean_[i] || (mean == mean_[i] && j + c < i)) delta_[i] = std::min(delta_[i], squared[c]);
      }
    });
    for (int32_t i = 0; i < count_; ++i)
      if (delta_[i] == kInfinity) delta_[i] = largest;
  }

  // The highest scores, among equals the lower token.
  void choose_centers() {
    Scratch<uint64_t> ranks = scratch<uint64_t>(count_);
    for (int32_t i = 0; i < count_; ++i)
      ranks[i] = uint64_t{order_key(0.5f * std::log(delta_[i]) - mean_[i])} << 32 | (0xffffffffu - i);
    std::nth_element(ranks.get(), ranks.get() + clusters_ - 1, ranks.get() + count_, std::greater<uint64_t>());
    for (int32_t c = 0; c < clusters_; ++c) centers_[c] = tokens_[0xffffffffu - static_cast<uint32_t>(ranks[c])];
    std::sort(centers_.get(), centers_.get() + clusters_);
    std::copy_n(centers_.get(), clusters_, p.centers + b * p.clusters);
  }

  void assign() {
    Scratch<int32_t> owner = scratch<int32_t>(count_);
    assign_nearest(distances_, tokens_, count_, centers_.get(), clusters_, delta_.get(), owner.get());
    for (int32_t i = 0; i < count_; ++i) p.owner[b * p.tokens.count + tokens_[i]] = owner[i];
  }

  const ClusterDpcKnnParams& p;
  const int64_t b;
  const Distances distances_;
  const int32_t* const tokens_;  // the usable ones
  const int32_t count_, clusters_;
  Scratch<float> mean_, delta_;  // squared distances, the mean over D as well
  Scratch<int32_t> centers_;
};

}  // namespace

void cluster_dpc_knn_cpu(const ClusterDpcKnnParams& p) {
  parallel_items(p.tokens.batch, [&](int64_t b) { DensityPeaks(p, b).run(); });
}

}  // namespace VTK_ISA
}  // namespace vtk
