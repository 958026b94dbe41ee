// kv_compact on the CPU: a copied row a token, side and head. Bound: the rows read and written over the bandwidth.
#include "kv/kv_compact.h"

#include <algorithm>
#include <cstring>

#include "common/parallel.h"
#include "common/simd.h"

namespace vtk {
namespace VTK_ISA {

void kv_compact_cpu(const KvCompactParams& p) {
  const int64_t rows = int64_t{p.batch} * p.heads * p.kept;
  const bool stream = 2 * rows * p.row_bytes > kStreamBytes;
  const int64_t grain = std::max<int64_t>(1, kCopyGrainBytes / (2 * p.row_bytes));
  parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
    for (int side = 0; side < 2; ++side) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t head = row / p.kept, b = head / p.heads, h = head % p.heads;
        char* to = p.to[side] + row * p.row_bytes;
        const char* from = p.from[side].at(b, h, p.index(b, h, row % p.kept));
        if (stream)
          stream_copy(to, from, p.row_bytes);
        else
          std::memcpy(to, from, p.row_bytes);
      }
    }
    if (stream) stream_fence();
  });
}

}  // namespace VTK_ISA
}  // namespace vtk
