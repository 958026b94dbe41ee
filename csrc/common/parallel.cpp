// The one place where CPU kernels meet torch's thread pool.
#include "common/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace vtk {

void parallel_ranges(int64_t count, int64_t grain, RangeFn fn, void* context) {
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { fn(context, begin, end); });
}

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

}  // namespace vtk
