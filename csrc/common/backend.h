// Which library this translation unit is compiled into. An op's .cpp is compiled once per backend: the
// checks and allocations are the same everywhere, only the registration key and the launch differ.
//
//   cpu   libvtk_cpu.so   defines the schemas, registers the CPU key, calls <op>_cpu(params)
//   cuda  libvtk_cuda.so  registers the CUDA key, calls <op>_cuda(params, stream)
//   simt  libvtk_simt.so  the tests' emulation: defines the schemas in namespace vtk_simt, registers the CPU key,
//                         calls <op>_cuda(params, stream). VTK_BACKEND_CUDA is defined too: the ops behave as on CUDA.
#pragma once
#include <torch/csrc/stable/library.h>

#if defined(VTK_BACKEND_CUDA)
#include <cuda_runtime.h>

#include "common/check.h"
#include "common/stream.h"
#define VTK_LAUNCH(op, kernel, params, like) ::vtk::launch_cuda(op, kernel##_cuda, params, like)
#else
#define VTK_LAUNCH(op, kernel, params, like) kernel##_cpu(params)
#endif

#if defined(VTK_BACKEND_SIMT)
#define VTK_NAMESPACE vtk_simt
#define VTK_DISPATCH_KEY CPU
#define VTK_DEFINES_SCHEMAS
#elif defined(VTK_BACKEND_CUDA)
#define VTK_NAMESPACE vtk
#define VTK_DISPATCH_KEY CUDA
#else
#define VTK_NAMESPACE vtk
#define VTK_DISPATCH_KEY CPU
#define VTK_DEFINES_SCHEMAS
#endif

#define VTK_TEXT_(token) #token
#define VTK_TEXT(token) VTK_TEXT_(token)
// "vtk::attention_scores" for the dispatcher: one op calls another of the same backend.
#define VTK_OP_NAME(op) VTK_TEXT(VTK_NAMESPACE) "::" op

// NOTE: torch's macros paste their arguments, so the namespace must be expanded one step before.
#define VTK_FRAGMENT_(name, m) STABLE_TORCH_LIBRARY_FRAGMENT(name, m)
#define VTK_IMPL_(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)
// Defines schemas (inside #if defined(VTK_DEFINES_SCHEMAS)); registers the implementations of this backend's key.
#define VTK_FRAGMENT(m) VTK_FRAGMENT_(VTK_NAMESPACE, m)
#define VTK_IMPL(m) VTK_IMPL_(VTK_NAMESPACE, VTK_DISPATCH_KEY, m)

#if defined(VTK_BACKEND_CUDA)
namespace vtk {

template <class Params>
inline void launch_cuda(const char* op, cudaError_t (*launcher)(const Params&, cudaStream_t), const Params& params,
                        const Tensor& like) {
  DeviceGuard guard(like.get_device_index());
  cudaError_t error = launcher(params, current_stream(like.get_device_index()));
  VTK_CHECK(op, error == cudaSuccess, "CUDA launch failed: ", cudaGetErrorString(error));
}

}  // namespace vtk
#endif
