// Threads for CPU kernels, without torch in the kernel: the op library forwards to torch's own pool, a
// native test may supply a serial one.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <type_traits>

namespace vtk {

using RangeFn = void (*)(void* context, int64_t begin, int64_t end);

// Calls fn over disjoint ranges that cover [0, count); ranges hold at least `grain` items.
void parallel_ranges(int64_t count, int64_t grain, RangeFn fn, void* context);

int num_threads();

// An exception must not cross torch's C interface: the first one waits here for the calling thread.
template <class Body>
struct GuardedBody {
  Body& body;
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr failure = nullptr;

  static void run(void* context, int64_t begin, int64_t end) {
    GuardedBody& self = *static_cast<GuardedBody*>(context);
    try {
      self.body(begin, end);
    } catch (...) {
      if (!self.failed.test_and_set()) self.failure = std::current_exception();
    }
  }
};

// Calls body(begin, end) over [0, count). What a body throws, std::bad_alloc above all, reaches the caller.
template <class Body>
inline void parallel_for(int64_t count, int64_t grain, Body&& body) {
  if (count <= grain) {  // no fork for small work: a fork costs as much as selecting from 2000 tokens
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  GuardedBody<std::remove_reference_t<Body>> guarded{body};
  parallel_ranges(count, grain, guarded.run, &guarded);
  if (guarded.failure) std::rethrow_exception(guarded.failure);
}

// Calls body(b) for every item b of a batch. Enough items: a thread each. Few: one after the other, and the threads
// share every item, whose body forks by itself.
template <class Body>
inline void parallel_items(int64_t batch, const Body& body) {
  auto each = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) body(b);
  };
  if (batch >= num_threads())
    parallel_for(batch, 1, each);
  else
    each(0, batch);
}

constexpr int64_t kMinThreadWork = 1 << 16;  // multiply-adds that pay for a fork

// Runs body(worker, task) for every task: threads take them from a counter, in order, as many threads as `work`
// multiply-adds pay for, each with a worker of its own. For tasks of different lengths.
template <class MakeWorker, class Body>
inline void run_tasks(int64_t tasks, int64_t work, const MakeWorker& make_worker, const Body& body) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(std::min<int64_t>(num_threads(), tasks), work / kMinThreadWork + 1);
  parallel_for(threads, 1, [&](int64_t, int64_t) {
    auto worker = make_worker();
    for (int64_t task = next++; task < tasks; task = next++) body(worker, task);
  });
}

}  // namespace vtk
