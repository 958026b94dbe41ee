// Uninitialised outputs.
#pragma once
#include <dlfcn.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/host_memory.h"

namespace vtk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using FromBlob = int32_t(void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
                         int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* result,
                         int32_t layout, const uint8_t* metadata, int64_t metadata_size, void (*deleter)(void*, void*),
                         void* context);

// Part of the stable ABI from torch 2.11 on; null on 2.10, where large outputs come from torch's allocator. Looked up
// at run time, so that the library asks for nothing that 2.10 lacks.
inline FromBlob* from_blob_with_deleter() {
  static FromBlob* const found = reinterpret_cast<FromBlob*>(dlsym(RTLD_DEFAULT, "torch_from_blob"));
  return found;
}

inline constexpr size_t kHostMemoryBytes = 256 << 10;  // from here on page faults cost more than the call

// A contiguous tensor of `like`'s device. Large CPU tensors come from common/host_memory.h.
//
// NOTE: torch::stable::new_empty goes through the boxed dispatcher, 1.5 us more a call than the C entry below.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t count = 1;
  bool any = true;
  for (size_t d = sizes.size(); d-- > 0; count *= std::max<int64_t>(sizes[d], 1)) {
    strides[d] = count;
    any = any && sizes[d] > 0;
  }
  const int64_t dims = static_cast<int64_t>(sizes.size());
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  int32_t device = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle handle = nullptr;

  [[maybe_unused]] const size_t bytes = any ? static_cast<size_t>(count) * aoti_torch_dtype_element_size(dtype) : 0;
#if !defined(VTK_BACKEND_CUDA)
  if (bytes >= kHostMemoryBytes && from_blob_with_deleter() != nullptr) {
    if (void* data = allocate_host(bytes)) {
      auto release = [](void* data, void* context) { free_host(data, reinterpret_cast<size_t>(context)); };
      STABLE_TORCH_ERROR_CODE_CHECK(from_blob_with_deleter()(
          data, dims, sizes.data(), strides.data(), 0, dtype, device, like.get_device_index(), &handle,
          aoti_torch_layout_strided(), nullptr, 0, release, reinterpret_cast<void*>(bytes)));
      return Tensor(handle);
    }
  }
#endif
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes.data(), strides.data(), dtype, device, like.get_device_index(), &handle));
  Tensor out(handle);
#if defined(VTK_BACKEND_SIMT)  // poison: NaN, -1
  if (any) std::memset(out.mutable_data_ptr(), 0xff, bytes);
#endif
  return out;
}

}  // namespace vtk
