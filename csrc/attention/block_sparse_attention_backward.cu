// block_sparse_attention_backward on CUDA.
#include "attention/block_sparse_attention_backward.h"

namespace vtk {

int64_t block_sparse_attention_backward_workspace(const BlockSparseAttentionBackwardParams&) { return 0; }

cudaError_t block_sparse_attention_backward_cuda(const BlockSparseAttentionBackwardParams&, cudaStream_t) {
  return cudaErrorNotSupported;
}

}  // namespace vtk
