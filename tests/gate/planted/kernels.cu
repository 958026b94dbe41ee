// Kernels for the gate's own tests: with VTK_PLANTED two of them break its rules, without it the same names are clean.

// Live values: 192 floats a thread, and 64 registers to hold them in.
__global__ void __launch_bounds__(1024) planted_spill(const float* x, float* out) {
#if defined(VTK_PLANTED)
  constexpr int kValues = 192;
#else
  constexpr int kValues = 8;
#endif
  float values[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kValues; ++i) out[i * 1024 + threadIdx.x] = values[kValues - 1 - i] * values[i];
}

// An array that is indexed by a value that only the run knows cannot live in registers.
__global__ void planted_stack(const int* index, float* out) {
#if defined(VTK_PLANTED)
  float values[32];
  for (int i = 0; i < 32; ++i) values[index[i]] = out[i];
  out[threadIdx.x] = values[index[threadIdx.x]];
#else
  out[threadIdx.x] = static_cast<float>(index[threadIdx.x]);
#endif
}
