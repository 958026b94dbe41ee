// cluster_kmedoids: tokens that stand for their clusters, by Lloyd's iteration from seeds far apart.
//
//   seed    the token of the largest norm, then again and again the one farthest from its nearest medoid
//   iterate each token to its nearest medoid; the new medoid of a cluster is its token with the smallest sum of
//           distances within the cluster; until the medoids moved by less than the tolerance in total
//   finish  medoids in ascending order, and each token to its nearest once more
//
// A medoid is nearest to itself, whatever lies on the same place: so medoids are distinct and no cluster is empty.
#pragma once
#include "common/cpu_isa.h"
#include "merge/cluster_tokens.h"

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
#include <cuda_runtime.h>
#endif

namespace vtk {

struct ClusterKmedoidsParams {
  ClusterTokens tokens;
  int32_t clusters;    // K
  int64_t iterations;  // at most
  float tolerance;

  int64_t* medoids;  // [B, K] ascending, then -1
  int64_t* owner;    // [B, N], -1 where not usable
  void* workspace;   // CUDA only: cluster_kmedoids_workspace(params) bytes, not initialised
};

VTK_CPU_KERNEL(void, cluster_kmedoids_cpu, ClusterKmedoidsParams)

#if defined(__CUDACC__) || defined(VTK_BACKEND_CUDA)
int64_t cluster_kmedoids_workspace(const ClusterKmedoidsParams& params);
cudaError_t cluster_kmedoids_cuda(const ClusterKmedoidsParams& params, cudaStream_t stream);
#endif

}  // namespace vtk
