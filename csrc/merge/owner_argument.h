// The checks that ops on an owner map share: the map, and the width of its rows.
#pragma once
#include "common/check.h"

namespace vtk {

inline constexpr int64_t kMaxChannels = 1 << 26;  // kernels count the elements of 16 rows in 32 bits

inline void check_width(const char* op, const char* name, const Tensor& rows) {
  VTK_CHECK(op, rows.size(rows.dim() - 1) <= kMaxChannels, "expected ", name, " with at most ", kMaxChannels,
            " channels, got ", shape_text(rows));
}

// The CPU reads the map; on CUDA the kernels take an entry outside [0, rows) as dropped.
inline void check_owner(const char* op, const Tensor& owner, int64_t batch, int64_t tokens,
                        [[maybe_unused]] int64_t rows, [[maybe_unused]] const char* rows_name, const char* device_of,
                        const Tensor& like) {
  check_same_device(op, "owner", owner, device_of, like);
  check_dtype(op, "owner", owner, ScalarType::Long);
  check_shape(op, "owner", owner, "[B, N]", {batch, tokens});
#if !defined(VTK_BACKEND_CUDA)
  const int64_t* data = static_cast<const int64_t*>(owner.const_data_ptr());
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t n = 0; n < tokens; ++n) {
      const int64_t row = data[b * owner.stride(0) + n * owner.stride(1)];
      VTK_CHECK(op, row >= -1 && row < rows, "expected -1 <= owner < ", rows_name, " = ", rows, ", got owner[", b, ", ",
                n, "] = ", row);
    }
#endif
}

}  // namespace vtk
