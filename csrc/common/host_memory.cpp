// Fresh pages cost more than a gather: on a 2-core virtual machine a 4 MB output was 1024 page faults and 5 ms, the
// copy itself 0.2 ms. torch allocates with posix_memalign, whose freed blocks glibc before 2.38 never hands out again
// for the same size; plain malloc gives memory back whenever enough of it is free at the end of the heap. So freed
// blocks are kept here, at most 256 MiB in all, and the next output of that size finds its pages mapped.
// Tried and lost: MADV_FREE on freed blocks, a quarter of the time of a 38 MB gather.
#include "common/host_memory.h"

#include <sys/mman.h>

#include <list>
#include <mutex>

namespace vtk {
namespace {

constexpr size_t kCacheBytes = 256 << 20;
constexpr size_t kGranule = 256 << 10;  // nearly equal sizes share blocks

struct Block {
  void* data;
  size_t bytes;
};

class BlockCache {
 public:
  void* take(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
      if (block->bytes != bytes) continue;
      void* data = block->data;
      held_ -= bytes;
      blocks_.erase(block);
      return data;
    }
    return nullptr;
  }

  void put(void* data, size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    blocks_.push_front({data, bytes});
    held_ += bytes;
    while (held_ > kCacheBytes) {  // the least recently freed goes first
      munmap(blocks_.back().data, blocks_.back().bytes);
      held_ -= blocks_.back().bytes;
      blocks_.pop_back();
    }
  }

 private:
  std::mutex mutex_;
  std::list<Block> blocks_;
  size_t held_ = 0;
};

// Never destroyed: tensors may be freed after static destructors ran.
BlockCache& cache() {
  static BlockCache* const instance = new BlockCache;
  return *instance;
}

size_t rounded(size_t bytes) { return (bytes + kGranule - 1) / kGranule * kGranule; }

}  // namespace

void* allocate_host(size_t bytes) {
  if (void* reused = cache().take(rounded(bytes))) return reused;
  void* data = mmap(nullptr, rounded(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return data == MAP_FAILED ? nullptr : data;
}

void free_host(void* data, size_t bytes) { cache().put(data, rounded(bytes)); }

}  // namespace vtk
