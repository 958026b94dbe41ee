// Scratch arrays of the CPU kernels, aligned for vector loads and kept by the thread for its next call.
// Include only from *_cpu.cpp files: everything lives in vtk::VTK_ISA (see cpu_isa.h).
//
// NOTE: the C library hands blocks of this size back to the kernel when they are freed, and every page of the next
// call's block then costs a fault: 0.16 ms of a 0.45 ms call with 370 KiB of scratch.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace vtk {
namespace VTK_ISA {

class ScratchPool {
 public:
  static ScratchPool& of_this_thread() {
    static thread_local ScratchPool pool;
    return pool;
  }
  ~ScratchPool() {
    for (Block* block : kept_)
      if (block != nullptr) std::free(block->memory);
  }

  void* take(size_t bytes) {
    bytes = (bytes + kAlign - 1) / kAlign * kAlign;
    for (Block*& block : kept_) {
      if (block == nullptr || block->bytes < bytes || block->bytes > 2 * bytes + kSmall) continue;
      Block* found = block;
      block = nullptr;
      kept_bytes_ -= found->bytes;
      return found + 1;
    }
    // NOTE: not aligned_alloc, whose freed blocks glibc before 2.38 never hands out again for the same size.
    void* memory = std::malloc(bytes + sizeof(Block) + kAlign);
    if (memory == nullptr) throw std::bad_alloc();
    const uintptr_t line = (reinterpret_cast<uintptr_t>(memory) + kAlign - 1) / kAlign * kAlign;
    return new (reinterpret_cast<void*>(line)) Block{memory, bytes} + 1;
  }

  void give(void* data) {
    Block* block = static_cast<Block*>(data) - 1;
    for (Block*& slot : kept_) {
      if (slot != nullptr || kept_bytes_ + block->bytes > kMostKept) continue;
      kept_bytes_ += block->bytes;
      slot = block;
      return;
    }
    std::free(block->memory);
  }

 private:
  static constexpr size_t kAlign = 64;  // a cache line: a vector load across two costs two
  static constexpr size_t kSmall = 4096;
  static constexpr size_t kMostKept = 4 << 20;  // a thread
  struct alignas(kAlign) Block {
    void* memory;  // what malloc gave
    size_t bytes;
  };
  Block* kept_[16] = {};
  size_t kept_bytes_ = 0;
};

struct ScratchDelete {
  void operator()(void* data) const { ScratchPool::of_this_thread().give(data); }
};
template <class T>
using Scratch = std::unique_ptr<T[], ScratchDelete>;

// Uninitialised.
template <class T>
inline Scratch<T> scratch(int64_t count) {
  return Scratch<T>(static_cast<T*>(ScratchPool::of_this_thread().take(std::max<int64_t>(count, 1) * sizeof(T))));
}

}  // namespace VTK_ISA
}  // namespace vtk
