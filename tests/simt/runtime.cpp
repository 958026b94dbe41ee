// Schedule, rendezvous and launch.
#include "runtime.h"

#include <pthread.h>

#include <algorithm>
#include <cstdarg>
#include <map>
#include <mutex>
#include <numeric>
#include <thread>

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

namespace {

std::mutex launch_mutex;
std::vector<Fiber*> fiber_pool;
std::vector<Fiber*> released;  // by the rendezvous being completed
std::map<const void*, size_t> allowed_dynamic;

// ---- Text ----

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text_of(const char* format, va_list arguments) {
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
    case State::kAtWarpOp: break;
  }
  return std::string("waits at ") + (f.warp_op == WarpOp::kCall ? f.what : name(f.warp_op)) +
         text(" of lanes 0x%08x ", f.mask) + name(f.site);
}

std::string kernel_name() {
  std::string full = function_name(machine.kernel);
  full = full.substr(0, full.find('('));  // without the argument types; an anonymous namespace has its own parenthesis
  return full;
}

std::string place(const Block& block) { return "kernel " + kernel_name() + ", block " + name(block.index); }

// ---- Schedule ----

uint64_t random_number() {  // splitmix64
  uint64_t z = machine.random += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// Three schedules. Seed 0: in order, everybody one step. Odd seeds: a random thread each time. Other seeds: whoever
// just got past a rendezvous keeps running ahead of everybody else.
enum class Policy { kInOrder, kRandom, kRunAhead };
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

Fiber* take_ready(Block& block) {
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
void reschedule(bool leave_block = false) {
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

// ---- Reports ----

// Nobody can run and somebody has not exited.
std::string deadlock_report() {
  const Fiber* waiting = nullptr;
  for (Block& block : machine.resident)
    for (Fiber* f : block.fibers)
      if (f->state != State::kExited && (waiting == nullptr || f->state == State::kAtWarpOp)) {
        if (waiting == nullptr || waiting->state != State::kAtWarpOp) waiting = f;
      }
  // Who should come to the rendezvous that `waiting` is at, and does not?
  const Block& block = *waiting->block;
  int alike = 0, others = 0;
  const Fiber* missing = nullptr;
  auto count = [&](const Fiber* f, bool needed) {
    if (f->state == waiting->state && f->site.line == waiting->site.line) {
      ++alike;
      return;
    }
    if (!needed) return;
    ++others;
    if (missing == nullptr) missing = f;
  };
  if (waiting->state == State::kAtResidentBarrier) {
    for (Block& b : machine.resident)
      for (Fiber* f : b.fibers) count(f, true);
  } else {
    for (Fiber* f : block.fibers) {
      bool same_warp = f->thread / 32 == waiting->thread / 32;
      count(f, waiting->state == State::kAtBlockBarrier || (same_warp && (waiting->mask >> f->lane & 1)));
    }
  }
  std::string out = place(block) + text(": deadlock: %d threads wait, the first ", alike) + name(*waiting) + " " +
                    whereabouts(*waiting);
  if (missing != nullptr)
    out += text("; %d never come, the first ", others) + name(*missing) +
           (missing->block != &block ? " of block " + name(missing->block->index) : "") + " " + whereabouts(*missing);
  return out;
}

// ---- Rendezvous ----

void complete_block_barrier(Block& block) {
  Fiber& first = *block.fibers[0];
  int set = 0;
  for (Fiber* f : block.fibers) {
    Fiber& lane0 = *block.fibers[f->thread / 32 * 32];
    if (f->block_op != first.block_op || f->site.line != lane0.site.line)
      fail("divergent barrier: %s is at %s %s, but %s is at %s %s", name(lane0).c_str(), name(lane0.block_op),
           name(lane0.site).c_str(), name(*f).c_str(), name(f->block_op), name(f->site).c_str());
    set += f->predicate != 0;
  }
  const int threads = static_cast<int>(block.fibers.size());
  int result = 0;
  switch (first.block_op) {
    case BlockOp::kSync: break;
    case BlockOp::kAnd: result = set == threads; break;
    case BlockOp::kOr: result = set > 0; break;
    case BlockOp::kCount: result = set; break;
  }
  for (Fiber* f : block.fibers) f->result = static_cast<uint64_t>(result);
  block.at_barrier = 0;
  next_epoch(block);
  released = block.fibers;
  make_ready(released);
}

bool is_shuffle(WarpOp op) { return op >= WarpOp::kShuffle && op <= WarpOp::kShuffleXor; }

int source_lane(const Fiber& f) {
  const int lane = f.lane, first = lane & ~(f.width - 1), last = first + f.width - 1;
  switch (f.warp_op) {
    case WarpOp::kShuffle: return first + (f.argument & (f.width - 1));
    case WarpOp::kShuffleUp: return lane - f.argument < first ? lane : lane - f.argument;
    case WarpOp::kShuffleDown: return lane + f.argument > last ? lane : lane + f.argument;
    default: return (lane ^ f.argument) > last ? lane : lane ^ f.argument;
  }
}

// The result of one lane from the operands of all lanes in its mask; lanes[i] is null outside the mask.
uint64_t warp_result(const Fiber& f, Fiber* const* lanes) {
  uint32_t votes = 0, equal = 0;
  int64_t sum = 0, low_s = INT32_MAX, high_s = INT32_MIN;
  uint32_t low_u = UINT32_MAX, high_u = 0, all = UINT32_MAX, any = 0, odd = 0;
  for (int l = 0; l < 32; ++l) {
    if (lanes[l] == nullptr) continue;
    const uint64_t x = lanes[l]->operand;
    const uint32_t u = static_cast<uint32_t>(x);
    const int32_t s = static_cast<int32_t>(u);
    votes |= uint32_t{x != 0} << l;
    equal |= uint32_t{x == f.operand} << l;
    sum += u;
    low_s = std::min<int64_t>(low_s, s), high_s = std::max<int64_t>(high_s, s);
    low_u = std::min(low_u, u), high_u = std::max(high_u, u);
    all &= u, any |= u, odd ^= u;
  }
  const uint32_t members = f.mask & f.block->warps[f.thread / 32].lanes;
  switch (f.warp_op) {
    case WarpOp::kBallot: return votes;
    case WarpOp::kAny: return votes != 0;
    case WarpOp::kAll: return votes == members;
    case WarpOp::kMatchAny: return equal;
    case WarpOp::kMatchAll: return equal == members ? f.mask : 0;
    case WarpOp::kAdd: return static_cast<uint32_t>(sum);
    case WarpOp::kMinSigned: return static_cast<uint32_t>(low_s);
    case WarpOp::kMaxSigned: return static_cast<uint32_t>(high_s);
    case WarpOp::kMinUnsigned: return low_u;
    case WarpOp::kMaxUnsigned: return high_u;
    case WarpOp::kAnd: return all;
    case WarpOp::kOr: return any;
    case WarpOp::kXor: return odd;
    default: return 0;
  }
}

void complete_warp_op(Block& block, int warp, uint32_t members, WarpOp op) {
  Fiber* lanes[32] = {};
  released.clear();
  for (int l = 0; l < 32; ++l)
    if (members >> l & 1) released.push_back(lanes[l] = block.fibers[warp * 32 + l]);
  if (op == WarpOp::kCall) {
    void* operands[32];
    for (int l = 0; l < 32; ++l) operands[l] = reinterpret_cast<void*>(lanes[l]->operand);
    machine.running->body(operands);
  }
  for (Fiber* f : released) {
    if (!is_shuffle(op)) {
      // The same for every lane of the mask, except for match_any.
      f->result = op == WarpOp::kSync || op == WarpOp::kCall    ? 0
                  : f == released[0] || op == WarpOp::kMatchAny ? warp_result(*f, lanes)
                                                                : released[0]->result;
      continue;
    }
    f->result = lanes[source_lane(*f)]->operand;
  }
  block.warps[warp].waiting &= ~members;
  block.warps[warp].alike = 0;
  if (op == WarpOp::kSync) ++block.warps[warp].epoch;
  make_ready(released);
}

}  // namespace

int block_barrier(BlockOp op, int predicate, Site site) {
  Fiber& f = *machine.running;
  Block& block = *f.block;
  f.block_op = op, f.predicate = predicate, f.site = site;
  f.state = State::kAtBlockBarrier;
  if (++block.at_barrier == static_cast<int>(block.fibers.size())) complete_block_barrier(block);
  reschedule();
  return static_cast<int>(f.result);
}

uint64_t warp_rendezvous(WarpOp op, unsigned mask, uint64_t operand, int argument, int width, Site site) {
  Fiber& f = *machine.running;
  Block& block = *f.block;
  Warp& warp = block.warps[f.thread / 32];
  f.warp_op = op, f.mask = mask, f.operand = operand, f.argument = argument, f.width = width, f.site = site;
  if (!(mask >> f.lane & 1))
    fail("%s of lanes 0x%08x %s is called by lane %d, which is not in the mask", name(op), mask, name(site).c_str(),
         f.lane);
  if (width <= 0 || width > 32 || (width & (width - 1)) != 0)
    fail("%s %s: width %d", name(op), name(site).c_str(), width);
  const uint32_t members = mask & warp.lanes;
  if (op == WarpOp::kCall && members != mask)
    fail("%s %s in a warp of %d lanes", f.what, name(site).c_str(), __builtin_popcount(members));
  if (is_shuffle(op) && !(members >> source_lane(f) & 1))
    fail("%s %s reads lane %d, which does not take part (lanes 0x%08x)", name(op), name(site).c_str(), source_lane(f),
         members);
  // Whoever waits for this lane must wait at this operation; lanes still busy with others of theirs may yet come.
  // __syncwarp may be reached on different lines.
  const uint32_t own = 1u << f.lane;
  auto same = [&](const Fiber& other) {
    return other.mask == mask && other.warp_op == op && (op == WarpOp::kSync || other.site.line == site.line);
  };
  auto lane = [&](uint32_t lanes) -> const Fiber& { return *block.fibers[f.thread / 32 * 32 + __builtin_ctz(lanes)]; };
  uint32_t here = own;
  if (warp.waiting != 0 && warp.waiting == warp.alike && same(lane(warp.alike))) {
    here |= warp.alike;
  } else {
    for (uint32_t others = mask & warp.waiting; others != 0; others &= others - 1) {
      const Fiber& other = lane(others);
      if (same(other)) here |= 1u << other.lane;
      if (!same(other) && (other.mask & own) != 0)
        fail("divergent warp: it calls %s of lanes 0x%08x %s while %s %s", name(op), mask, name(site).c_str(),
             name(other).c_str(), whereabouts(other).c_str());
    }
  }
  warp.alike = here == (warp.waiting | own) ? here : 0;
  f.state = State::kAtWarpOp;
  warp.waiting |= own;
  if (here == members) complete_warp_op(block, f.thread / 32, members, op);
  reschedule();
  return f.result;
}

void named_barrier(int id, int threads, bool wait, Site site) {
  Fiber& f = *machine.running;
  Block& block = *f.block;
  if (id < 0 || id > 15 || threads <= 0 || threads % 32 != 0)
    fail("named barrier %d for %d threads %s: 0 to 15, and a multiple of 32 threads", id, threads, name(site).c_str());
  f.named = id, f.site = site;
  if (wait) f.state = State::kAtNamedBarrier;
  if (++block.named_arrived[id] == threads) {
    released.clear();
    for (Fiber* other : block.fibers)
      if (other->state == State::kAtNamedBarrier && other->named == id) released.push_back(other);
    block.named_arrived[id] = 0;
    next_epoch(block);
    make_ready(released);
  }
  if (wait) reschedule();
}

void warp_call(const char* what, void* mine, void (*body)(void* const*), Site site) {
  machine.running->what = what;
  machine.running->body = body;
  warp_rendezvous(WarpOp::kCall, 0xffffffffu, reinterpret_cast<uint64_t>(mine), 0, 32, site);
}

void resident_barrier(const char* what, Site site) {
  Fiber& f = *machine.running;
  f.what = what, f.site = site;
  f.state = State::kAtResidentBarrier;
  std::vector<Fiber*> everybody;
  for (Block& block : machine.resident) {
    for (Fiber* other : block.fibers) {
      if (other->state != State::kAtResidentBarrier) {
        reschedule(true);
        return;
      }
      everybody.push_back(other);
    }
  }
  for (Block& block : machine.resident) next_epoch(block);
  make_ready(everybody);
  reschedule();
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

// ---- Launch ----

namespace {

void place_blocks(std::vector<uint3> indices) {
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  while (fiber_pool.size() < indices.size() * threads) {
    fiber_pool.push_back(new Fiber{});
    make_stack(fiber_pool.back()->context);
  }
  machine.resident.resize(indices.size());
  size_t next_fiber = 0;
  for (size_t b = 0; b < indices.size(); ++b) {
    Block& block = machine.resident[b];
    block.index = indices[b];
    block.rank = static_cast<int>(b);
    block.at_barrier = block.exited = 0;
    std::fill_n(block.named_arrived, 16, 0);
    block.fibers.clear();
    block.ready.clear();
    block.warps.assign((threads + 31) / 32, Warp{});
    for (unsigned t = 0; t < threads; ++t) {
      Fiber* f = fiber_pool[next_fiber++];
      f->index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
      f->lane = static_cast<int>(t % 32);
      f->block = &block;
      f->thread = static_cast<int>(t);
      f->site = {};
      f->async.assign(1, {});
      block.warps[t / 32].lanes |= 1u << (t % 32);
      block.fibers.push_back(f);
      prepare(f->context, fiber_main);
    }
    machine.block = &block;
    begin_block(block);
    block.static_copy.assign(machine.static_base, machine.static_base + machine.static_bytes);
    std::vector<Fiber*> all = block.fibers;
    make_ready(all);
  }
}

// Runs the blocks that are together on the machine to their end.
void run_resident(std::vector<uint3> indices) {
  place_blocks(std::move(indices));
  guard_static(true);
  enter(machine.main, *pick(false));
  guard_static(false);
  if (!machine.error.empty()) return;
  for (Block& block : machine.resident) {
    if (block.exited != static_cast<int>(block.fibers.size())) {
      machine.error = deadlock_report();
      return;
    }
  }
  for (Block& block : machine.resident) {
    if (machine.block != &block) put_in_place(block);
    end_block(block);
  }
}

void run_grid(unsigned together) {
  pthread_attr_t attributes;
  pthread_getattr_np(pthread_self(), &attributes);
  void* stack = nullptr;
  pthread_attr_getstack(&attributes, &stack, &machine.main.stack_bytes);
  pthread_attr_destroy(&attributes);
  machine.main.stack = static_cast<char*>(stack);
  find_static_shared();

  // Blocks in an order that visits each once: the stride shares no factor with their number.
  const dim3 grid = gridDim;
  const uint64_t groups = uint64_t{grid.x} * grid.y * grid.z / together;
  machine.random = machine.seed;
  uint64_t start = 0, stride = 1;
  if (policy() != Policy::kInOrder) {
    start = random_number() % groups;
    do stride = 1 + random_number() % groups;
    while (std::gcd(stride, groups) != 1);
  }
  for (uint64_t i = 0; i < groups && machine.error.empty(); ++i) {
    const uint64_t group = (start + i % groups * stride) % groups;
    std::vector<uint3> indices;
    for (uint64_t b = group * together; b < (group + 1) * together; ++b)
      indices.push_back({static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                         static_cast<unsigned>(b / grid.x / grid.y)});
    run_resident(std::move(indices));
  }
}

std::string check_launch(const cudaLaunchConfig_t& c, unsigned cluster, bool cooperative) {
  const dim3 g = c.gridDim, b = c.blockDim;
  const uint64_t threads = uint64_t{b.x} * b.y * b.z, blocks = uint64_t{g.x} * g.y * g.z;
  if (threads == 0 || threads > 1024 || b.z > 64)
    return text("block of %u x %u x %u threads, at most 1024", b.x, b.y, b.z);
  if (blocks == 0 || g.x > INT32_MAX || g.y > 65535 || g.z > 65535)
    return text("grid of %u x %u x %u blocks", g.x, g.y, g.z);
  if (c.dynamicSmemBytes > kMaxShared)
    return text("%zu bytes of dynamic shared memory, at most %zu", c.dynamicSmemBytes, kMaxShared);
  auto allowed = allowed_dynamic.find(machine.kernel);
  size_t limit = allowed == allowed_dynamic.end() ? kDefaultShared : std::max(kDefaultShared, allowed->second);
  if (c.dynamicSmemBytes > limit)
    return text("%zu bytes of dynamic shared memory, but only %zu without cudaFuncAttributeMaxDynamicSharedMemorySize",
                c.dynamicSmemBytes, limit);
  if (cluster > 1 && machine.compute_capability < 90) return "a cluster needs compute capability 9.0";
  if (cluster > 8 || g.x % cluster != 0) return text("cluster of %u blocks in a grid of %u", cluster, g.x);
  int fit = machine.multiprocessors * blocks_per_multiprocessor(static_cast<int>(threads), c.dynamicSmemBytes);
  if (cooperative && blocks > static_cast<uint64_t>(fit))
    return text("cooperative launch of %llu blocks, but only %d fit on the device",
                static_cast<unsigned long long>(blocks), fit);
  return "";
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*invoke)(void*), void* context) {
  std::lock_guard<std::mutex> lock(launch_mutex);
  unsigned cluster = 1;
  bool cooperative = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config.attrs[i].val.clusterDim.x;
    if (config.attrs[i].id == cudaLaunchAttributeCooperative) cooperative = config.attrs[i].val.cooperative != 0;
  }
  machine.kernel = kernel, machine.invoke = invoke, machine.context = context;
  gridDim = config.gridDim, blockDim = config.blockDim;
  machine.dynamic_bytes = config.dynamicSmemBytes;
  machine.error = check_launch(config, cluster, cooperative);
  if (!machine.error.empty()) {
    machine.error = "kernel " + kernel_name() + ": invalid launch: " + machine.error;
    return cudaErrorInvalidConfiguration;
  }
  const unsigned blocks = config.gridDim.x * config.gridDim.y * config.gridDim.z;
  // NOTE: a thread of its own, because static shared memory is thread-local storage and gets poisoned as a whole.
  std::thread(run_grid, cooperative ? blocks : cluster).join();
  machine.running = nullptr;
  return machine.error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

cudaError_t allow_shared(const void* kernel, cudaFuncAttribute attribute, int value) {
  std::lock_guard<std::mutex> lock(launch_mutex);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > kMaxShared) return cudaErrorInvalidValue;
  allowed_dynamic[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

int blocks_per_multiprocessor(int threads, size_t shared_bytes) {
  return static_cast<int>(std::min<size_t>(2048 / std::max(threads, 1), kMaxShared / (shared_bytes + 1024)));
}

int lane() { return machine.running->lane; }
unsigned char* dynamic_shared() { return machine.running->block->dynamic.data() + kRedzone; }
size_t dynamic_shared_bytes() { return machine.dynamic_bytes; }
unsigned block_rank() { return static_cast<unsigned>(machine.running->block->rank); }
unsigned cluster_size() { return static_cast<unsigned>(machine.resident.size()); }

}  // namespace simt

// ---- The parts of the runtime API that launchers call ----

extern "C" {
// seed: the schedule (0: in order). Zero leaves the other settings as they are.
__attribute__((visibility("default"))) void simt_configure(uint64_t seed, int multiprocessors, int compute_capability,
                                                           uint64_t spin_budget) {
  simt::machine.seed = seed;
  if (multiprocessors > 0) simt::machine.multiprocessors = multiprocessors;
  if (compute_capability > 0) simt::machine.compute_capability = compute_capability;
  if (spin_budget > 0) simt::machine.spin_budget = spin_budget;
}

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = simt::machine.multiprocessors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = simt::machine.compute_capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = simt::machine.compute_capability % 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(simt::kMaxShared); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 228 << 10; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::copy_n(static_cast<const char*>(from), bytes, static_cast<char*>(to));
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::fill_n(static_cast<char*>(to), bytes, static_cast<char>(value));
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  return simt::machine.error.empty() ? "an error of the emulated runtime" : simt::machine.error.c_str();
}
}
