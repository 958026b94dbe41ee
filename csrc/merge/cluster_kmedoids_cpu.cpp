// cluster_kmedoids on the CPU: the distances of cluster_distance_cpu.h, read as the algorithm says.
//
// Sums of distances are float32 in ascending order of the tokens. Extra memory: about 40 bytes a token, and the matrix
// of up to 1024 tokens or a panel, of an item in work. Bound: the matrix, N^2 / 2 * D operations of two instructions
// each; beyond it in every iteration K * N + the squares of the cluster sizes.
#include "merge/cluster_kmedoids.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "merge/cluster_distance_cpu.h"

namespace vtk {
namespace VTK_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One item. Tokens are counted among the usable ones, only medoids_ and members_ hold tokens of the item.
class Medoids {
 public:
  Medoids(const ClusterKmedoidsParams& params, int64_t b)
      : p(params),
        b(b),
        distances_(p.tokens, b),
        tokens_(distances_.usable()),
        count_(distances_.num_usable()),
        clusters_(std::min(p.clusters, count_)),
        medoids_(scratch<int32_t>(clusters_)),
        nearest_(scratch<float>(count_)),
        owner_(scratch<int32_t>(count_)),
        members_(scratch<int32_t>(count_)),
        cost_(scratch<float>(count_)),
        first_(scratch<int32_t>(clusters_ + 1)) {}

  void run() {
    std::fill_n(p.medoids + b * p.clusters, p.clusters, -1);
    std::fill_n(p.owner + b * p.tokens.count, p.tokens.count, -1);
    if (clusters_ == 0) return;
    seed();
    for (int64_t i = 0; i < p.iterations; ++i) {
      assign();
      if (move_medoids() < p.tolerance) break;
    }
    std::sort(medoids_.get(), medoids_.get() + clusters_);
    assign();
    std::copy_n(medoids_.get(), clusters_, p.medoids + b * p.clusters);
    for (int32_t i = 0; i < count_; ++i) p.owner[b * p.tokens.count + tokens_[i]] = owner_[i];
  }

 private:
  void seed() {
    std::fill_n(nearest_.get(), count_, kInfinity);
    int32_t pick = 0;
    for (int32_t i = 1; i < count_; ++i)
      if (distances_.squared_norm(tokens_[i]) > distances_.squared_norm(tokens_[pick])) pick = i;
    for (int32_t k = 0;; ++k) {
      medoids_[k] = tokens_[pick];
      if (k + 1 == clusters_) return;
      distances_.visit(tokens_, count_, &medoids_[k], 1, [&](int64_t i, int32_t, const float* squared, int32_t) {
        nearest_[i] = std::min(nearest_[i], squared[0]);
      });
      nearest_[pick] = -1.0f;
      pick = static_cast<int32_t>(std::max_element(nearest_.get(), nearest_.get() + count_) - nearest_.get());
    }
  }

  void assign() {
    assign_nearest(distances_, tokens_, count_, medoids_.get(), clusters_, nearest_.get(), owner_.get());
  }

  // Returns how far the medoids moved in total.
  float move_medoids() {
    list_members();
    float moved = 0.0f;
    for (int32_t k = 0; k < clusters_; ++k) {
      const int32_t next = center_of(&members_[first_[k]], first_[k + 1] - first_[k]);
      moved += std::sqrt(distances_.distance(next, medoids_[k]));
      medoids_[k] = next;
    }
    return moved;
  }

  // A counting sort by cluster: members_[first_[k] ... first_[k + 1]) in ascending order.
  void list_members() {
    std::fill_n(first_.get(), clusters_ + 1, 0);
    for (int32_t i = 0; i < count_; ++i) ++first_[owner_[i] + 1];
    for (int32_t k = 0; k < clusters_; ++k) first_[k + 1] += first_[k];
    for (int32_t i = 0; i < count_; ++i) members_[first_[owner_[i]]++] = tokens_[i];
    std::copy_backward(first_.get(), first_.get() + clusters_, first_.get() + clusters_ + 1);
    first_[0] = 0;
  }

  // The member with the smallest sum of distances, the first of equals.
  int32_t center_of(const int32_t* members, int32_t count) {
    std::fill_n(cost_.get(), count, 0.0f);
    distances_.visit(members, count, members, count, [&](int64_t i, int32_t, const float* squared, int32_t columns) {
      for (int32_t c = 0; c < columns; ++c) cost_[i] += std::sqrt(squared[c]);
    });
    return members[std::min_element(cost_.get(), cost_.get() + count) - cost_.get()];
  }

  const ClusterKmedoidsParams& p;
  const int64_t b;
  const Distances distances_;
  const int32_t* const tokens_;  // the usable ones
  const int32_t count_, clusters_;
  Scratch<int32_t> medoids_;
  Scratch<float> nearest_;  // squared distance to the nearest medoid
  Scratch<int32_t> owner_, members_;
  Scratch<float> cost_;
  Scratch<int32_t> first_;
};

}  // namespace

void cluster_kmedoids_cpu(const ClusterKmedoidsParams& p) {
  parallel_items(p.tokens.batch, [&](int64_t b) { Medoids(p, b).run(); });
}

}  // namespace VTK_ISA
}  // namespace vtk
