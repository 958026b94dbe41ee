// Threads for CPU kernels, without torch in the kernel: the op library forwards to torch's own pool, a
// native test may supply a serial one.
#pragma once
#include <cstdint>

namespace vtk {

using RangeFn = void (*)(void* context, int64_t begin, int64_t end);

// Calls fn over disjoint ranges that cover [0, count); ranges hold at least `grain` items.
void parallel_ranges(int64_t count, int64_t grain, RangeFn fn, void* context);

int num_threads();

// body(begin, end) must not throw: an exception cannot cross torch's C interface.
template <class Body>
inline void parallel_for(int64_t count, int64_t grain, Body&& body) {
  if (count <= grain) {  // no fork for small work: a fork costs as much as selecting from 2000 tokens
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  parallel_ranges(
      count, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); },
      &body);
}

}  // namespace vtk
