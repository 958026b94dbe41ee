// unmerge on the CPU: one copied row a token. Bound: N rows written over the memory bandwidth.
#include "merge/unmerge.h"

#include <algorithm>
#include <cstring>

#include "common/parallel.h"
#include "common/simd.h"

namespace vtk {
namespace VTK_ISA {
namespace {

void copy_row(const UnmergeParams& p, int64_t b, int64_t n, bool stream) {
  const int64_t row = p.owner[b * p.owner_stride_batch + n * p.owner_stride_token];
  char* to = p.out + (b * p.num_tokens + n) * p.row_bytes;
  const char* from = p.merged + b * p.stride_batch + row * p.stride_row;
  if (row < 0 || row >= p.num_rows)
    std::memset(to, 0, p.row_bytes);
  else if (stream)
    stream_copy(to, from, p.row_bytes);
  else
    std::memcpy(to, from, p.row_bytes);
}

}  // namespace

void unmerge_cpu(const UnmergeParams& p) {
  const int64_t rows = int64_t{p.batch} * p.num_tokens;
  const bool stream = rows * p.row_bytes > kStreamBytes;
  parallel_for(rows, std::max<int64_t>(1, kCopyGrainBytes / std::max<int64_t>(p.row_bytes, 1)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) copy_row(p, i / p.num_tokens, i % p.num_tokens, stream);
                 if (stream) stream_fence();
               });
}

}  // namespace VTK_ISA
}  // namespace vtk
