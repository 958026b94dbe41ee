// Fresh pages cost more than a gather: on a 2-core virtual machine a 4 MB output was 1024 page faults and 5 ms, the
// copy itself 0.2 ms. Two measures, by size:
//
//   below 32 MiB  malloc. torch allocates with posix_memalign, whose freed blocks glibc before 2.38 never hands out
//                 again for the same size; plain malloc reuses them.
//   above         glibc maps and unmaps every block. Freed blocks are kept here instead, at most 256 MiB, and offered
//                 to the kernel with MADV_FREE: under memory pressure it takes the pages, otherwise the next output
//                 of that size finds them mapped.
#include "common/host_memory.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <list>
#include <mutex>

namespace vtk {
namespace {

constexpr size_t kAlign = 64;
constexpr size_t kMapBytes = 32 << 20;  // glibc's largest mmap threshold on 64-bit systems
constexpr size_t kCacheBytes = 256 << 20;

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
    madvise(data, bytes, MADV_FREE);
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

// Equal sizes share blocks; rounding to 1 MiB makes nearly equal ones equal.
size_t rounded(size_t bytes) { return (bytes + (1 << 20) - 1) & ~size_t{(1 << 20) - 1}; }

}  // namespace

void* allocate_host(size_t bytes) {
  if (bytes >= kMapBytes) {
    if (void* reused = cache().take(rounded(bytes))) return reused;
    void* data = mmap(nullptr, rounded(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return data == MAP_FAILED ? nullptr : data;
  }
  // The block's own address lies just below the aligned data.
  void* block = std::malloc(bytes + kAlign + sizeof(void*));
  if (block == nullptr) return nullptr;
  uintptr_t data = (reinterpret_cast<uintptr_t>(block) + sizeof(void*) + kAlign - 1) & ~(kAlign - 1);
  reinterpret_cast<void**>(data)[-1] = block;
  return reinterpret_cast<void*>(data);
}

void free_host(void* data, size_t bytes) {
  if (bytes >= kMapBytes)
    cache().put(data, rounded(bytes));
  else
    std::free(static_cast<void**>(data)[-1]);
}

}  // namespace vtk
