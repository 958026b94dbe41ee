// cluster_dpc_knn: density peaks as cluster centers, the others to their nearest center.
//
//   mean(i)   of the squared distances |x_i - x_j|^2 / D to the k nearest, i included; density(i) = exp(-mean(i))
//   delta(i)  distance to the nearest denser token, or the largest distance of all where none is denser; of equal
//             densities the lower token counts as the denser
//   score(i)  density(i) * delta(i)
//
// Kernels compare means and log(delta) - mean: the same order, and nothing underflows.
#pragma once
#include "common/cpu_isa.h"
#include "merge/cluster_tokens.h"

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
#include <cuda_runtime.h>
#endif

namespace vtk {

inline constexpr int32_t kMaxNearest = 32;  // k of the CUDA kernel's lists in shared memory

struct ClusterDpcKnnParams {
  ClusterTokens tokens;
  const int32_t* counts;  // [B] centers of each item, null: clusters
  int64_t counts_stride;
  int32_t clusters;  // C
  int32_t k;         // at most kMaxNearest

  int64_t* centers;  // [B, C] ascending, then -1
  int64_t* owner;    // [B, N], -1 where not usable
  void* workspace;   // CUDA only: cluster_dpc_knn_workspace(params) bytes, not initialised
};

VTK_CPU_KERNEL(void, cluster_dpc_knn_cpu, ClusterDpcKnnParams)

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
int64_t cluster_dpc_knn_workspace(const ClusterDpcKnnParams& params);
cudaError_t cluster_dpc_knn_cuda(const ClusterDpcKnnParams& params, cudaStream_t stream);
#endif

}  // namespace vtk
