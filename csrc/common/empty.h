// Uninitialised outputs.
#pragma once
#include <dlfcn.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdlib>
#include <vector>

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

inline constexpr size_t kMallocBytes = 256 << 10;  // from here on page faults cost more than the call

// A contiguous tensor of `like`'s device.
//
// NOTE: two detours, both measured. torch::stable::new_empty goes through the boxed dispatcher, 1.5 us more a call
// than the C entry below. And torch allocates CPU memory with posix_memalign, whose freed blocks glibc before 2.38
// never hands out again for the same size: a 4 MB output is 1024 page faults a call, many times the copy itself.
// Plain malloc reuses them, so large CPU outputs are malloc blocks that torch frees through a deleter.
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

  const size_t bytes = any ? static_cast<size_t>(count) * aoti_torch_dtype_element_size(dtype) : 0;
  if (device == aoti_torch_device_type_cpu() && bytes >= kMallocBytes && from_blob_with_deleter() != nullptr) {
    constexpr size_t kAlign = 64;  // as torch aligns
    void* block = std::malloc(bytes + kAlign);
    if (block != nullptr) {
      void* data = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(block) + kAlign) & ~(kAlign - 1));
      auto release = [](void*, void* context) { std::free(context); };
      STABLE_TORCH_ERROR_CODE_CHECK(from_blob_with_deleter()(data, dims, sizes.data(), strides.data(), 0, dtype, device,
                                                             like.get_device_index(), &handle,
                                                             aoti_torch_layout_strided(), nullptr, 0, release, block));
      return Tensor(handle);
    }
  }
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes.data(), strides.data(), dtype, device, like.get_device_index(), &handle));
  return Tensor(handle);
}

}  // namespace vtk
