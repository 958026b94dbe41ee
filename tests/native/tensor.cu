// What feeds tensor cores: asynchronous copies, mbarriers, ldmatrix and mma.
#include "device/launch.h"
#include "device/ptx.cuh"
#include "native.h"

namespace vtk::native {
namespace {

template <class T>
__global__ void multiply_tile_kernel(const uint16_t* a, const uint16_t* b, bool waits, float* d) {
  __shared__ __align__(16) uint16_t sA[16][16], sB[16][16];
  const int lane = threadIdx.x, row = lane / 2, column = lane % 2 * 8;
  ptx::cp_async_16(&sA[row][column], a + lane * 8, true);
  ptx::cp_async_16(&sB[row][column], b + lane * 8, true);
  ptx::cp_async_commit();
  if (waits) ptx::cp_async_wait<0>();
  __syncwarp();
  uint32_t rA[4], rB[4];
  ptx::ldmatrix_x4(rA, &sA[lane % 16][lane / 16 * 8]);
  ptx::ldmatrix_x4_trans(rB, &sB[lane % 16][lane / 16 * 8]);
  for (int half = 0; half < 2; ++half) {
    float rD[4] = {};
    const uint32_t own[2] = {rB[2 * half], rB[2 * half + 1]};
    ptx::mma_m16n8k16<T>(rD, rA, own);
    for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 16 + 8 * half + lane % 4 * 2 + i % 2] = rD[i];
  }
}

// Thread 0 fills a ring of kStages tiles, warps 1 and 2 double what is in them.
constexpr int kStages = 2, kTile = 64;
__global__ void copy_ring_kernel(const int32_t* in, int32_t tiles, uint32_t expected, int32_t* out) {
  __shared__ __align__(16) int32_t sTiles[kStages][kTile];
  __shared__ uint64_t sFull[kStages], sEmpty[kStages];
  const int t = threadIdx.x;
  if (t == 0) {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(&sFull[s], 1);
      ptx::mbarrier_init(&sEmpty[s], kTile);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  for (int32_t tile = 0; tile < tiles; ++tile) {
    const int stage = tile % kStages, parity = tile / kStages % 2;
    if (t == 0) {
      ptx::mbarrier_wait(&sEmpty[stage], parity ^ 1);
      ptx::mbarrier_arrive_expect(&sFull[stage], expected);
      ptx::bulk_copy(sTiles[stage], in + tile * kTile, kTile * sizeof(int32_t), &sFull[stage]);
    } else if (t >= 32) {
      ptx::mbarrier_wait(&sFull[stage], parity);
      out[tile * kTile + t - 32] = 2 * sTiles[stage][t - 32];
      ptx::mbarrier_arrive(&sEmpty[stage]);
    }
  }
}

LaunchShape one_block(unsigned threads) {
  LaunchShape shape;
  shape.grid = dim3(1);
  shape.block = dim3(threads);
  return shape;
}

}  // namespace

cudaError_t multiply_tile(const uint16_t* a, const uint16_t* b, bool bfloat16, bool waits, float* d) {
  return bfloat16 ? launch(multiply_tile_kernel<__nv_bfloat16>, one_block(32), nullptr, a, b, waits, d)
                  : launch(multiply_tile_kernel<__half>, one_block(32), nullptr, a, b, waits, d);
}

cudaError_t copy_ring(const int32_t* in, int32_t tiles, uint32_t expected, int32_t* out) {
  return launch(copy_ring_kernel, one_block(32 + kTile), nullptr, in, tiles, expected, out);
}

}  // namespace vtk::native
