// Which library this translation unit is compiled into. An op's .cpp is compiled once per backend: the
// checks and allocations are the same everywhere, only the registration key and the launch differ.
//
//   cpu   libvtk_cpu.so   defines the schemas, registers the CPU key, calls <op>_cpu(params)
//   cuda  libvtk_cuda.so  registers the CUDA key, calls <op>_cuda(params, stream)
#pragma once
#include <torch/csrc/stable/library.h>

#if defined(VTK_BACKEND_CUDA)
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "common/check.h"
#include "common/stream.h"
#define VTK_DISPATCH_KEY CUDA
#define VTK_LAUNCH(op, kernel, params, like) ::vtk::launch_cuda(op, kernel##_cuda, params, like)
#else
#define VTK_DISPATCH_KEY CPU
#define VTK_DEFINES_SCHEMAS
#define VTK_LAUNCH(op, kernel, params, like) kernel##_cpu(params)
#endif

// Registers the implementation of this backend's key.
#define VTK_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(vtk, VTK_DISPATCH_KEY, m)

#if defined(VTK_BACKEND_CUDA)
namespace vtk {

template <class Params>
inline void launch_cuda(const char* op, cudaError_t (*launcher)(const Params&, cudaStream_t), const Params& params,
                        const Tensor& like) {
  torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  cudaError_t error = launcher(params, current_stream(like.get_device_index()));
  VTK_CHECK(op, error == cudaSuccess, "CUDA launch failed: ", cudaGetErrorString(error));
}

}  // namespace vtk
#endif
