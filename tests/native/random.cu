// Counter-based random numbers.
#include "device/launch.h"
#include "device/philox.cuh"
#include "native.h"

namespace vtk::native {
namespace {

constexpr int kThreads = 64;

__device__ int32_t thread_index() { return static_cast<int32_t>(blockIdx.x * kThreads + threadIdx.x); }

__device__ void put(const RandomWords& words, uint32_t* out) {
  for (int w = 0; w < 4; ++w) out[w] = words.word[w];
}

__global__ void philox_kernel(const uint32_t* counters, const uint32_t* keys, int32_t count, uint32_t* out) {
  const int32_t i = thread_index();
  if (i >= count) return;
  const uint32_t* c = counters + 4 * i;
  put(philox4x32({{c[0], c[1], c[2], c[3]}}, keys[2 * i], keys[2 * i + 1]), out + 4 * i);
}

__global__ void random_stream_kernel(RandomStream stream, int32_t blocks, uint32_t* out) {
  const int32_t i = thread_index();
  if (i < blocks) put(stream.words(static_cast<uint32_t>(i)), out + 4 * i);
}

__global__ void uniforms_kernel(const uint32_t* words, int32_t count, float* below_one, float* above_zero) {
  const int32_t i = thread_index();
  if (i >= count) return;
  below_one[i] = uniform_below_one(words[i]);
  above_zero[i] = uniform_above_zero(words[i]);
}

template <class... Expected, class... Actual>
cudaError_t run(void (*kernel)(Expected...), int32_t threads, Actual... args) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((threads + kThreads - 1) / kThreads));
  shape.block = dim3(kThreads);
  return launch(kernel, shape, nullptr, args...);
}

}  // namespace

cudaError_t philox(const uint32_t* counters, const uint32_t* keys, int32_t count, uint32_t* out) {
  return run(philox_kernel, count, counters, keys, count, out);
}

cudaError_t random_stream(uint64_t seed, uint32_t position, uint32_t node, uint32_t purpose, int32_t blocks,
                          uint32_t* out) {
  return run(random_stream_kernel, blocks, RandomStream{seed, position, node, purpose}, blocks, out);
}

cudaError_t uniforms(const uint32_t* words, int32_t count, float* below_one, float* above_zero) {
  return run(uniforms_kernel, count, words, count, below_one, above_zero);
}

}  // namespace vtk::native
