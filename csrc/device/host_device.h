// For functions that CPU kernels and CUDA kernels share.
#pragma once

#if defined(__CUDACC__)
#define VTK_HOST_DEVICE __host__ __device__
#else
#define VTK_HOST_DEVICE
#endif
