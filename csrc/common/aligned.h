// Uninitialised scratch that starts on a cache line: vector loads from it never straddle two.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace vtk {

struct FreeAligned {
  void operator()(void* data) const { std::free(static_cast<void**>(data)[-1]); }
};

template <class T>
using AlignedArray = std::unique_ptr<T[], FreeAligned>;

// NOTE: malloc and not aligned_alloc, whose freed blocks glibc before 2.38 never hands out again for the same size.
template <class T>
inline AlignedArray<T> aligned_array(int64_t count) {
  constexpr uintptr_t kLine = 64;
  void* block = std::malloc(static_cast<size_t>(count) * sizeof(T) + 2 * kLine);
  if (block == nullptr) throw std::bad_alloc();
  void* data = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(block) + 2 * kLine - 1) & ~(kLine - 1));
  static_cast<void**>(data)[-1] = block;
  return AlignedArray<T>(static_cast<T*>(data));
}

}  // namespace vtk
