// Who runs next: the context switch, the order among the threads that can run, and the way in and out of a thread.
#include <algorithm>
#include <cstdlib>

#include "runtime.h"

#if defined(__x86_64__)
asm(R"(
.text
.hidden simt_switch
.globl simt_switch
.type simt_switch, @function
simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size simt_switch, .-simt_switch
)");
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

Machine machine;

uint64_t random_number() {  // splitmix64
  uint64_t z = machine.random += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// Three schedules. Seed 0: in order, everybody one step. Odd seeds: a random thread each time. Other seeds: whoever
// just got past a rendezvous keeps running ahead of everybody else.
Policy policy() {
  return machine.seed == 0 ? Policy::kInOrder : machine.seed % 2 ? Policy::kRandom : Policy::kRunAhead;
}

void make_ready(std::vector<Fiber*>& fibers) {
  if (policy() != Policy::kInOrder)
    for (size_t i = fibers.size(); i > 1; --i) std::swap(fibers[i - 1], fibers[random_number() % i]);
  for (Fiber* f : fibers) {
    f->state = State::kReady;
    f->block->ready.push_back(f);
  }
  machine.spins = 0;
}

static Fiber* take_ready(Block& block) {
  std::deque<Fiber*>& ready = block.ready;
  if (ready.empty()) return nullptr;
  if (policy() == Policy::kRandom) std::swap(ready[random_number() % ready.size()], ready.back());
  bool front = policy() == Policy::kInOrder;
  Fiber* f = front ? ready.front() : ready.back();
  front ? ready.pop_front() : ready.pop_back();
  return f;
}

// Static shared memory has one address for all blocks of this library: the running block's is swapped in.
void put_in_place(Block& block) {
  if (machine.block == &block) return;
  std::copy_n(machine.static_base, machine.static_bytes, machine.block->static_copy.data());
  std::copy_n(block.static_copy.data(), machine.static_bytes, machine.static_base);
  machine.block = &block;
}

// The built-in variables are constant for the thread that reads them and set here at every switch.
void enter(Context& from, Fiber& f) {
  if (machine.block != f.block) {
    guard_static(false);
    put_in_place(*f.block);
    guard_static(true);
  }
  machine.running = &f;
  threadIdx = f.index;
  blockIdx = f.block->index;
  switch_to(from, f.context);
}

void leave_to_main(Fiber& f) {
  machine.running = nullptr;
  switch_to(f.context, machine.main);
}

Fiber* pick(bool leave_block) {
  const size_t blocks = machine.resident.size();
  const size_t first =
      machine.block - machine.resident.data() + (leave_block && blocks > 1 ? 1 + random_number() % (blocks - 1) : 0);
  for (size_t i = 0; i < blocks; ++i)
    if (Fiber* f = take_ready(machine.resident[(first + i) % blocks])) return f;
  return nullptr;
}

// Runs somebody else; returns when this thread is picked again.
void reschedule(bool leave_block) {
  Fiber* from = machine.running;
  Fiber* next = pick(leave_block);
  if (next == from) return;
  next == nullptr ? leave_to_main(*from) : enter(from->context, *next);
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  machine.invoke(machine.context);
  Fiber* f = machine.running;
  for (const auto& group : f->async)
    if (!group.empty()) fail("it exits with cp.async copies that it never waited for");
  f->state = State::kExited;
  ++f->block->exited;
  machine.spins = 0;
  reschedule();
  std::abort();  // an exited thread is never picked
}

void yield(Site site) {
  Fiber* f = machine.running;
  if (f == nullptr) return;
  if (site.line != 0) f->site = site;
  if (++machine.spins > machine.spin_budget)
    fail("no progress: %llu yields (atomics, volatile accesses, fences) and no thread got past a rendezvous; %s",
         static_cast<unsigned long long>(machine.spins),
         machine.resident.size() > 1 ? "all blocks of the launch were running"
                                     : "blocks run one after the other unless the launch is cooperative");
  std::deque<Fiber*>& ready = f->block->ready;
  policy() == Policy::kRunAhead ? ready.push_front(f) : ready.push_back(f);
  reschedule(machine.resident.size() > 1 && random_number() % 16 == 0);
}

}  // namespace simt
