// Vocabulary that the torch-facing ops and the torch-free kernels share.
#pragma once
#include <cstdint>

namespace vtk {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16 };
enum class Reduce : int32_t { kMean, kSum, kMax, kNone };
enum class Order : int32_t { kPosition, kRank };  // kRank: best first ("score" or "pick" in the ops' words)

// A read-only strided view; strides are in elements, a null data pointer means "not given".
struct MaskView {
  const bool* data = nullptr;  // [rows, columns]
  int64_t stride_row = 0;
  int64_t stride_col = 0;
};

}  // namespace vtk
