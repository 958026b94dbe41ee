// The device and stream of an op through torch's stable interface.
#pragma once
#include <cuda_runtime.h>
#if !defined(VTK_BACKEND_SIMT)
#include <torch/csrc/stable/accelerator.h>
#endif

#include <cstdint>

#include "common/check.h"

#if defined(VTK_BACKEND_SIMT)

namespace vtk {

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
inline cudaStream_t current_stream(int32_t) { return nullptr; }

}  // namespace vtk

#else

// NOTE: weak on purpose. A strong reference makes the library fail to load on a torch without CUDA; and the
// symbol resolves only when the library is linked with `--no-as-needed -ltorch` (see cmake/torch_stubs.cmake),
// against libtorch_cpu alone it would stay null even on a CUDA torch.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace vtk {

using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(int32_t device_index) {
  VTK_CHECK("current_stream", aoti_torch_get_current_cuda_stream != nullptr,
            "libvtk_cuda.so is loaded in a torch without CUDA streams");
  void* stream = nullptr;
  VTK_CHECK("current_stream", aoti_torch_get_current_cuda_stream(device_index, &stream) == 0,
            "torch gave no current CUDA stream for device ", device_index);
  return static_cast<cudaStream_t>(stream);
}

}  // namespace vtk

#endif
