// temporal_segments on the CPU: a thread an item.
//
//   run(p)  pairs in a row, up to this one, over which position p is similar; so count(L), how many positions are
//           static over the last L pairs, is the number of runs of at least L: a histogram, summed from the long end
//   best(e) of the first e frames = the largest of best(e - 1) and best(e - 1 - L) + count(L) * L
//
// Bound: F * (S + min(F, window)) steps of integers. The plain dynamic programme compares S positions a window.
#include "merge/temporal_segments.h"

#include <algorithm>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"

namespace vtk {
namespace VTK_ISA {
namespace {

template <class T>
class Cut {
 public:
  Cut(const TemporalSegmentsParams& params, int64_t b)
      : p(params),
        b(b),
        runs_(scratch<int32_t>(p.positions)),
        best_(scratch<int64_t>(p.frames + 1)),
        length_(scratch<int32_t>(p.frames + 1)),
        histogram_(scratch<int32_t>(p.frames)) {}

  void run() {
    std::fill_n(runs_.get(), p.positions, 0);
    best_[0] = best_[1] = 0;
    length_[1] = 1;
    for (int32_t frame = 1; frame < p.frames; ++frame) {
      extend_runs(frame);
      close_frame(frame);
    }
    p.gain[b] = best_[p.frames];
    write();
  }

 private:
  bool similar(int32_t pair, int32_t position) const {
    const T* row = static_cast<const T*>(p.similarity) + b * p.stride_batch + pair * p.stride_pair;
    return to_float(row[position]) > p.threshold;
  }

  // The runs over the pair that ends in `frame`, and how many of each length there are.
  void extend_runs(int32_t frame) {
    std::fill_n(histogram_.get(), frame + 1, 0);
    for (int32_t position = 0; position < p.positions; ++position) {
      runs_[position] = similar(frame - 1, position) ? runs_[position] + 1 : 0;
      ++histogram_[runs_[position]];
    }
  }

  // The best last segment of frames [0, frame], from the longest to the shortest, which wins among equals.
  void close_frame(int32_t frame) {
    int64_t best = 0;
    int32_t length = 1, count = 0;
    for (int32_t pairs = frame; pairs >= 1; --pairs) {
      count += histogram_[pairs];
      const int64_t total = best_[frame - pairs] + int64_t{count} * pairs;
      if (pairs > p.max_pairs || total < best) continue;
      best = total;
      length = pairs + 1;
    }
    if (best_[frame] >= best) {
      best = best_[frame];
      length = 1;
    }
    best_[frame + 1] = best;
    length_[frame + 1] = length;
  }

  void write() const {
    int64_t id = 0;
    for (int32_t end = p.frames; end > 0; end -= length_[end]) ++id;
    for (int32_t end = p.frames; end > 0; end -= length_[end]) write_segment(end - length_[end], end, --id);
  }

  void write_segment(int32_t begin, int32_t end, int64_t id) const {
    std::fill_n(p.segment + b * p.frames + begin, end - begin, id);
    bool* first = p.is_static + (b * p.frames + begin) * p.positions;
    std::fill_n(first, p.positions, end - begin > 1);
    for (int32_t pair = begin; pair + 1 < end; ++pair)
      for (int32_t position = 0; position < p.positions; ++position) first[position] &= similar(pair, position);
    for (int32_t frame = 1; frame < end - begin; ++frame)
      std::copy_n(first, p.positions, first + int64_t{frame} * p.positions);
  }

  const TemporalSegmentsParams& p;
  const int64_t b;
  Scratch<int32_t> runs_;       // [S]
  Scratch<int64_t> best_;       // [F + 1], of the first frames
  Scratch<int32_t> length_;     // [F + 1], frames of their last segment
  Scratch<int32_t> histogram_;  // [F], of the runs
};

}  // namespace

void temporal_segments_cpu(const TemporalSegmentsParams& p) {
  parallel_for(p.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) switch (p.dtype) {
        case DType::kFloat32: Cut<float>(p, b).run(); break;
        case DType::kFloat16: Cut<f16>(p, b).run(); break;
        case DType::kBFloat16: Cut<bf16>(p, b).run(); break;
      }
  });
}

}  // namespace VTK_ISA
}  // namespace vtk
