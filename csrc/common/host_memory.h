// Host memory for large CPU outputs, without paying the operating system for fresh pages on every call.
#pragma once
#include <cstddef>

namespace vtk {

// Page aligned, uninitialised; null when memory is short.
void* allocate_host(size_t bytes);
void free_host(void* data, size_t bytes);

}  // namespace vtk
