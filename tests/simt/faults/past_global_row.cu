// Reads one element past the end of a global row: only the ASan build sees the sizes of global memory.
#include <vector>

#include "fault.h"

__global__ void past_global_row_kernel(const float* row, float* out, int columns, int broken) {
  for (int i = threadIdx.x; i < columns + broken; i += blockDim.x) out[i] = row[i];
}

FAULT(past_global_row) {
  const int columns = 100;
  std::vector<float> row(columns), out(columns + 1);
  return run_fault(past_global_row_kernel, 32, 0, static_cast<const float*>(row.data()), out.data(), columns, broken);
}
