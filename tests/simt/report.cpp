// The text of reports: names of threads and operations, what a thread waits for, who never comes.
#include <cstdarg>
#include <cstdlib>

#include "runtime.h"

namespace simt {

static std::string text_of(const char* format, va_list arguments) {
  char buffer[2048];
  vsnprintf(buffer, sizeof buffer, format, arguments);
  return buffer;
}
std::string text(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string out = text_of(format, arguments);
  va_end(arguments);
  return out;
}

std::string name(uint3 i) { return text("(%u,%u,%u)", i.x, i.y, i.z); }
std::string name(Site site) {
  std::string file = site.file;
  return "(" + file.substr(file.rfind('/') + 1) + text(":%d)", site.line);
}

const char* name(BlockOp op) {
  static const char* names[] = {"__syncthreads", "__syncthreads_and", "__syncthreads_or", "__syncthreads_count"};
  return names[static_cast<int>(op)];
}

const char* name(WarpOp op) {
  static const char* names[] = {"__syncwarp",        "__shfl_sync",       "__shfl_up_sync",    "__shfl_down_sync",
                                "__shfl_xor_sync",   "__ballot_sync",     "__any_sync",        "__all_sync",
                                "__match_any_sync",  "__match_all_sync",  "__reduce_add_sync", "__reduce_min_sync",
                                "__reduce_min_sync", "__reduce_max_sync", "__reduce_max_sync", "__reduce_and_sync",
                                "__reduce_or_sync",  "__reduce_xor_sync", "warp_call"};
  return names[static_cast<int>(op)];
}

std::string name(const Fiber& f) { return "thread " + name(f.index); }

std::string whereabouts(const Fiber& f) {
  switch (f.state) {
    case State::kReady: return "is running";
    case State::kExited: return "has exited";
    case State::kAtBlockBarrier: return std::string("waits at ") + name(f.block_op) + " " + name(f.site);
    case State::kAtResidentBarrier: return std::string("waits at ") + f.what + " " + name(f.site);
    case State::kAtNamedBarrier: return text("waits at named barrier %d ", f.named) + name(f.site);
    case State::kAtMbarrier: {
      const Mbarrier b = *f.mbarrier;
      return text("waits for parity %d of mbarrier ", int(b.phase)) + place_name(f.mbarrier) + " " + name(f.site) +
             text(", %d of %d arrivals and %d bytes missing", int(b.missing), int(b.arrivals), int(b.bytes));
    }
    case State::kAtWarpOp: break;
  }
  return std::string("waits at ") + (f.warp_op == WarpOp::kCall ? f.what : name(f.warp_op)) +
         text(" of lanes 0x%08x ", f.mask) + name(f.site);
}

std::string kernel_name() {
  const std::string full = function_name(machine.kernel);
  return full.substr(0, full.find('('));  // without the argument types
}

std::string place(const Block& block) { return "kernel " + kernel_name() + ", block " + name(block.index); }

// Nobody can run and somebody has not exited. Named first: who waits at a warp operation, else anybody who waits.
std::string deadlock_report() {
  const Fiber* waiting = nullptr;
  for (Block& block : machine.resident)
    for (Fiber* f : block.fibers)
      if (f->state != State::kExited &&
          (waiting == nullptr || (f->state == State::kAtWarpOp && waiting->state != State::kAtWarpOp)))
        waiting = f;
  // Who should come to the rendezvous that `waiting` is at, and does not?
  int alike = 0, others = 0;
  const Fiber* missing = nullptr;
  auto needed = [&](const Fiber& f) {
    if (waiting->state == State::kAtResidentBarrier) return true;
    if (f.block != waiting->block) return false;
    if (waiting->state == State::kAtBlockBarrier) return true;
    const bool same_warp = f.thread / 32 == waiting->thread / 32;
    return waiting->state == State::kAtWarpOp && same_warp && (waiting->mask >> f.lane & 1) != 0;
  };
  for (Block& block : machine.resident)
    for (Fiber* f : block.fibers) {
      if (f->state == waiting->state && f->site.line == waiting->site.line) {
        if (&block == waiting->block || needed(*f)) ++alike;
      } else if (needed(*f)) {
        if (others++ == 0) missing = f;
      }
    }
  put_in_place(*waiting->block);  // an mbarrier is described from its own bytes
  std::string out = place(*waiting->block) + text(": deadlock: %d threads wait, the first ", alike) + name(*waiting) +
                    " " + whereabouts(*waiting);
  if (missing != nullptr)
    out += text("; %d never come, the first ", others) + name(*missing) +
           (missing->block != waiting->block ? " of block " + name(missing->block->index) : "") + " " +
           whereabouts(*missing);
  return out;
}

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string what = text_of(format, arguments);
  va_end(arguments);
  Fiber* f = machine.running;
  machine.error = place(*f->block) + ", " + name(*f) + ": " + what;
  leave_to_main(*f);
  std::abort();
}

}  // namespace simt
