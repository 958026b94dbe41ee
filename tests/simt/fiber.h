// A fiber: its own stack and a context switch that makes no system call.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  char* stack = nullptr;  // lowest usable byte; null for the operating-system thread's own stack
  size_t stack_bytes = 0;
};

#if defined(__SANITIZE_ADDRESS__)
inline constexpr size_t kStackBytes = 512 << 10;
#else
inline constexpr size_t kStackBytes = 128 << 10;  // committed by the kernel only as far as it is used
#endif

#if defined(__x86_64__)
// Saves the callee-saved registers of the System V ABI on this stack and takes the other stack's.
extern "C" void simt_switch(void** save, void* load);
#endif

// A stack with an unmapped page below it: overflow is a crash at once, not a corrupted neighbour.
inline void make_stack(Context& c) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory =
      mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
    std::perror("simt: no memory for fiber stacks");
    std::abort();
  }
  c.stack = static_cast<char*>(memory) + page;
  c.stack_bytes = kStackBytes;
}

// The next switch to c calls entry(), which must never return.
inline void prepare(Context& c, void (*entry)()) {
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(c.stack + c.stack_bytes);
  *--top = nullptr;                              // entry sees the alignment of a called function
  *--top = reinterpret_cast<void*>(entry);       // popped by ret
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // rbp rbx r12 r13 r14 r15
  c.stack_pointer = top;
#else
  getcontext(&c.context);
  c.context.uc_stack.ss_sp = c.stack;
  c.context.uc_stack.ss_size = c.stack_bytes;
  c.context.uc_link = nullptr;
  makecontext(&c.context, entry, 0);
#endif
}

inline void switch_to(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(__x86_64__)
  simt_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

}  // namespace simt
