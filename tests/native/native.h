// One launcher for each piece of the device vocabulary, over plain arrays. module.cpp binds them to numpy; nvcc
// compiles them too, as a check that the vocabulary is CUDA.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace vtk::native {

// select.cu
cudaError_t order_keys(const float* scores, int32_t count, uint32_t* keys);
// best [1]: the place of the highest score, -1 when there is none.
cudaError_t arg_max(const float* scores, int32_t count, int32_t threads, int32_t* best);
// threshold [1], ties [1]
cudaError_t radix_select(const uint32_t* keys, int32_t count, int32_t k, int32_t threads, uint32_t* threshold,
                         int32_t* ties);
// scores [batch, tokens], indices [batch, keep]; workspace of greedy_workspace bytes, zeroed.
int64_t greedy_workspace(int32_t batch, int32_t tokens, int32_t blocks);
cudaError_t greedy_pick(const float* scores, int32_t batch, int32_t tokens, int32_t keep, bool by_rank, int32_t blocks,
                        void* workspace, int64_t* indices);
// counters [groups, 32] start at `first`; posted and sums [rounds, groups, blocks].
cudaError_t grid_barrier(unsigned* counters, unsigned first, int32_t groups, int32_t blocks, int32_t rounds,
                         int32_t* posted, int32_t* sums);

// reduce.cu: x [threads] and results of the same shape; `op` 0 sum, 1 max, 2 min.
template <class T>
cudaError_t warp_reduce(const T* x, int32_t op, int32_t lanes, int32_t stride, T* out);  // 32 threads
template <class T>
cudaError_t block_reduce(const T* x, int32_t threads, int32_t op, T* out);
template <class T>
cudaError_t block_prefix(const T* x, int32_t threads, T* before, T* total);

// codes.cu: 16-bit floats are their bits. pairs [words, 16]: what each word's pairs decode to.
cudaError_t load_floats(const void* values, int32_t dtype, int32_t count, float* out);
cudaError_t pack_codes(const uint8_t* codes, int32_t bits, int32_t words, uint32_t* packed, uint8_t* unpacked);
cudaError_t pack_ternary(const int8_t* values, int32_t words, uint32_t* planes, int8_t* unpacked);
cudaError_t pack_trits(const uint8_t* trits, int32_t bytes, uint8_t* packed, uint8_t* unpacked);
cudaError_t code_pairs(const uint32_t* packed, int32_t bits, int32_t zero, bool bfloat16, int32_t words, uint32_t* out);
cudaError_t sign_pairs(const uint32_t* packed, bool bfloat16, int32_t words, uint32_t* out);
cudaError_t ternary_pairs(const uint32_t* planes, bool bfloat16, int32_t words, uint32_t* out);
cudaError_t trit_pairs(const uint32_t* packed, bool bfloat16, int32_t words, uint32_t* out);

// tensor.cu: d [16, 16] = a [16, 16] b [16, 16] of 16-bit floats; waits: for its copies.
cudaError_t multiply_tile(const uint16_t* a, const uint16_t* b, bool bfloat16, bool waits, float* d);
// out [tiles, 64] = 2 in, through a ring of bulk copies that announce `expected` bytes a tile.
cudaError_t copy_ring(const int32_t* in, int32_t tiles, uint32_t expected, int32_t* out);

// random.cu: counters [count, 4], keys [count, 2], out [count, 4].
cudaError_t philox(const uint32_t* counters, const uint32_t* keys, int32_t count, uint32_t* out);
cudaError_t random_stream(uint64_t seed, uint32_t position, uint32_t node, uint32_t purpose, int32_t blocks,
                          uint32_t* out);
cudaError_t uniforms(const uint32_t* words, int32_t count, float* below_one, float* above_zero);

}  // namespace vtk::native
