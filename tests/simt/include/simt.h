// What the emulated CUDA vocabulary (cuda_runtime.h next to this file) asks of the emulator (../*.cpp).
//
// One CUDA thread is one fiber, and every fiber of a launch runs on one operating-system thread, so a switch is a
// few nanoseconds, a schedule repeats from its seed, and an atomic needs no lock prefix. A thread runs until it
// reaches a rendezvous (barrier, warp operation) or a yield point (atomic, volatile access, fence, nanosleep).
#pragma once
#include <driver_types.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>

namespace simt {

// The line of kernel source that called; filled by default arguments of the emulated intrinsics.
struct Site {
  const char* file = "";
  int line = 0;
};

enum class BlockOp { kSync, kAnd, kOr, kCount };
enum class WarpOp {
  kSync,
  kShuffle,
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kBallot,
  kAny,
  kAll,
  kMatchAny,
  kMatchAll,
  kAdd,
  kMinSigned,
  kMinUnsigned,
  kMaxSigned,
  kMaxUnsigned,
  kAnd,
  kOr,
  kXor,
  kCall
};

// Rendezvous of the block, of the lanes in mask, and of all blocks that run together (the cluster or the grid of a
// cooperative launch). The result is that of the CUDA intrinsic; `operand` is the lane's value, zero-extended.
int block_barrier(BlockOp op, int predicate, Site site);
uint64_t warp_rendezvous(WarpOp op, unsigned mask, uint64_t operand, int argument, int width, Site site);
void resident_barrier(const char* what, Site site);

// PTX bar.sync (wait = true) and bar.arrive on barrier `id` of the block, for `threads` threads.
void named_barrier(int id, int threads, bool wait, Site site);

// PTX mbarrier: mbarrier.init, mbarrier.arrive (expecting `bytes` of bulk copies) and a loop over try_wait.parity; and
// cp.async.bulk to shared memory. The caller notes the access to the barrier's word.
void mbarrier_start(uint64_t* barrier, int arrivals, Site site);
void mbarrier_count(uint64_t* barrier, unsigned bytes, Site site);
void mbarrier_pass(uint64_t* barrier, int parity, Site site);
void async_bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* barrier, Site site);

// All 32 lanes bring a pointer to their own operands; the last one to come runs body(lanes) for everybody.
void warp_call(const char* what, void* mine, void (*body)(void* const* lanes), Site site);

// PTX cp.async: the bytes arrive at the matching wait, and not before; bytes past source_bytes become zero.
void async_copy(void* shared, const void* global, size_t bytes, size_t source_bytes);
void async_commit();
void async_wait(int groups_in_flight);

void yield(Site site);                                  // let others run: every spin must reach one
void fence();                                           // memory accesses before and after count as ordered
void atomic_access(const void* address, size_t bytes);  // a yield point, and exempt from races with its kind
void shared_access(const void* address, size_t bytes, bool write);  // for host versions of PTX wrappers

int lane();
unsigned char* dynamic_shared();
size_t dynamic_shared_bytes();
void* map_shared_rank(void* address, unsigned rank);  // the same object in another block of the cluster
unsigned cluster_size();
unsigned block_rank();  // in the cluster

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*invoke)(void*), void* context);
cudaError_t allow_shared(const void* kernel, cudaFuncAttribute attribute, int value);
int blocks_per_multiprocessor(int threads, size_t shared_bytes);

// Ends the launch: it returns cudaErrorLaunchFailure and cudaGetErrorString gives this text. Never returns.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace simt
