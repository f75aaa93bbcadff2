// Threads of a grid as fibers: who runs, and when those that wait have met.
#include "emulation.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <random>

#include "../../../csrc/types.h"
#include "state.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

State now;

namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr int kMostThreads = kMostBlocks * 1024;
constexpr int kSharedWithoutAsking = 48 << 10;
constexpr int kSharedAtMost = (__CUDA_ARCH__ >= 900 ? 227 : 163) << 10;

struct Fiber {
  ucontext_t start;
  jmp_buf paused;
  char* stack = nullptr;
  bool fresh = true;
};
std::vector<Fiber> fibers;
std::vector<bool> ready;         // [warps]: can go on
std::vector<int> running_warps;  // [blocks]: have not come to a barrier
std::vector<int> warps, lanes;   // in the order they run in
int running_blocks, threads;     // of the cluster, of a block
jmp_buf scheduler;
void (*kernel_body)(const void*);
const void* kernel_arguments;
int order = 0, ignored_line = 0;
std::map<const void*, int> shared_asked_for;
cudaError_t last_error = cudaSuccess;

// A fiber serves one thread after another: to create it costs more than most kernels.
void serve() {
  for (;;) {
    kernel_body(kernel_arguments);
    meet(Meeting::exit, ~0u, 0, 0, Site::current());
  }
}

// Runs a thread until it waits; a failure there is thrown here, on the stack of the launch.
void resume(int i) {
  Fiber& fiber = fibers[i];
  Thread& thread = now.threads[i];
  if (fiber.stack == nullptr) {
    fiber.stack = (char*)mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fiber.stack == MAP_FAILED) throw std::runtime_error("no memory for stacks of threads");
  }
  threadIdx = thread.index;
  blockIdx = now.blocks[thread.block].index;
  now.stack = {fiber.stack, fiber.stack + kStackBytes};
  now.thread = &thread;
  if (_setjmp(scheduler) == 0) {
    if (!fiber.fresh) _longjmp(fiber.paused, 1);
    fiber.fresh = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack;
    fiber.start.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.start, serve, 0);
    setcontext(&fiber.start);
  }
  now.thread = nullptr;
  if (!now.failure.empty()) throw std::runtime_error(now.failure);
}

// All threads of [begin, end) wait for the same; otherwise some would wait for ever.
void agree(int begin, int end) {
  const Thread& one = now.threads[begin];
  for (int i = begin + 1; i < end; ++i) {
    const Thread& other = now.threads[i];
    if (other.meeting != one.meeting || other.site.line() != one.site.line()) {
      throw std::runtime_error("these never meet: " + describe(one) + ", and " + describe(other));
    }
  }
}

// What the 32 lanes of a warp get from each other.
void exchange(Thread* lane) {
  uint32_t sent[32], ballot = 0;
  for (int i = 0; i < 32; ++i) {
    sent[i] = lane[i].value;
    ballot |= (sent[i] & 1) << i;
    if (lane[i].mask != ~0u) throw std::runtime_error("not a full mask: " + describe(lane[i]));
  }
  for (int i = 0; i < 32; ++i) {
    int from = lane[i].from;
    if (lane[i].meeting == Meeting::shuffle_xor) from ^= i;
    if (from < 0 || from > 31) throw std::runtime_error("no such lane: " + describe(lane[i]));
    lane[i].value = lane[i].meeting == Meeting::ballot ? ballot : sent[from];
  }
}

void release(int begin, int end) {
  for (int warp = begin / 32; warp < end / 32; ++warp) ready[warp] = true;
  for (int block = begin / threads; block < end / threads; ++block) {
    running_warps[block] = threads / 32;
    ++now.blocks[block].epoch;
  }
}

// All lanes of a warp have stopped: whoever has now met goes on.
void gather(int warp) {
  const Thread& first = now.threads[32 * warp];
  agree(32 * warp, 32 * warp + 32);
  if (first.meeting < Meeting::block) return exchange(&now.threads[32 * warp]);
  ready[warp] = false;
  const int block = first.block, begin = block * threads;
  if (--running_warps[block] > 0) return;
  agree(begin, begin + threads);
  if (first.meeting == Meeting::block) return release(begin, begin + threads);
  if (first.meeting == Meeting::exit) leave(block);
  if (--running_blocks > 0) return;
  const int all = (int)now.threads.size();
  agree(0, all);
  if (first.meeting == Meeting::exit) return;
  ++now.epoch;
  running_blocks = (int)now.blocks.size();
  release(0, all);
}

// Runs a cluster to its end: always the first warp, in the chosen order, that can go on. So the
// first runs ahead of all others as far as barriers let it, and what it needs of them is missing.
void run_cluster(dim3 first_block) {
  running_blocks = (int)now.blocks.size();
  now.epoch = 0;
  for (int b = 0; b < running_blocks; ++b) {
    now.blocks[b] = Block{dim3(first_block.x + b, first_block.y, first_block.z)};
    for (int t = 0; t < threads; ++t) {
      now.threads[b * threads + t] = Thread{b, dim3(t, 0, 0)};
    }
  }
  release(0, (int)now.threads.size());
  clear_shared();
  for (;;) {
    const auto warp = std::find_if(warps.begin(), warps.end(), [](int w) { return ready[w]; });
    if (warp == warps.end()) return;
    for (int lane : lanes) resume(*warp * 32 + lane);
    gather(*warp);
  }
}

std::vector<int> in_order(int count) {
  std::vector<int> numbers(count);
  for (int i = 0; i < count; ++i) numbers[i] = order == 1 ? count - 1 - i : i;
  if (order > 1) std::shuffle(numbers.begin(), numbers.end(), std::mt19937(order));
  return numbers;
}

void run_grid(dim3 grid, int blocks) {
  for (int cluster : in_order((int)(grid.x / blocks * grid.y * grid.z))) {
    const unsigned x = grid.x / blocks, y = cluster / x;
    run_cluster(dim3(cluster % x * blocks, y % grid.y, y / grid.y));
  }
}

}  // namespace

uint32_t meet(Meeting meeting, unsigned mask, uint32_t value, int from, const Site& site) {
  Thread& thread = *now.thread;
  const bool barrier = meeting == Meeting::block || meeting == Meeting::cluster;
  if (barrier && (int)site.line() == ignored_line) return 0;
  thread.meeting = meeting;
  thread.site = site;
  thread.mask = mask;
  thread.value = value;
  thread.from = from;
  pause();
  return now.thread->value;
}

void pause() {
  const int i = (int)(now.thread - now.threads.data());
  if (_setjmp(fibers[i].paused) == 0) _longjmp(scheduler, 1);
}

int cluster_rank() { return now.thread->block; }

cudaError_t allow_shared(const void* kernel, int bytes) {
  if (bytes > kSharedAtMost) return last_error = cudaErrorInvalidValue;
  shared_asked_for[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(const void*),
                const void* arguments, size_t bytes) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  int blocks = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) blocks = (int)config.attrs[i].val.clusterDim.x;
  const int asked = shared_asked_for[kernel];
  const bool shared = (int)config.dynamicSmemBytes <= std::max(asked, kSharedWithoutAsking);
  const bool cluster = blocks == 1 || (blocks > 1 && blocks <= kMostBlocks && __CUDA_ARCH__ >= 900);
  const bool whole = block.x % 32 == 0 && block.y * block.z * grid.z == 1;  // all that is used here
  const bool sizes = block.x - 1 < 1024 && grid.y - 1 < 65535 && grid.x > 0;
  if (!(shared && cluster && whole && sizes && grid.x % blocks == 0)) {
    return last_error = cudaErrorInvalidConfiguration;
  }
  gridDim = grid;
  blockDim = block;
  threads = (int)block.x;
  now.shared_bytes = config.dynamicSmemBytes;
  now.shared_at_most = asked > 0 ? kSharedAtMost : kSharedWithoutAsking;
  now.blocks.assign(blocks, {});
  now.threads.assign(blocks * threads, {});
  if (fibers.empty()) fibers.resize(kMostThreads);
  ready.assign(blocks * threads / 32, false);
  running_warps.assign(blocks, 0);
  warps = in_order(blocks * threads / 32);
  lanes = in_order(32);
  kernel_body = body;
  kernel_arguments = arguments;
  know(arguments, bytes, false);
  try {
    run_grid(grid, blocks);
  } catch (...) {
    now.thread = nullptr;
    now.failure.clear();
    for (Fiber& fiber : fibers) fiber.fresh = true;
    throw;
  }
  return cudaSuccess;
}

}  // namespace emulation

// The CPU kernels' conversions, which have tests of their own.
float __half2float(__half v) { return fastsae::to_float(fastsae::f16{v.bits}); }
float __bfloat162float(__nv_bfloat16 v) { return fastsae::to_float(fastsae::bf16{v.bits}); }
__half __float2half_rn(float v) {
  fastsae::f16 rounded;
  fastsae::from_float(v, &rounded);
  return {rounded.bits};
}
__nv_bfloat16 __float2bfloat16_rn(float v) {
  fastsae::bf16 rounded;
  fastsae::from_float(v, &rounded);
  return {rounded.bits};
}

cudaError_t cudaGetLastError() { return std::exchange(emulation::last_error, cudaSuccess); }

// The order of threads: 0 forward, 1 backward, others a random one. Barriers at the line (not 0) of
// a source are passed by, as if they were not there.
extern "C" void emulate(int order, int ignored_line) {
  emulation::order = order;
  emulation::ignored_line = ignored_line;
}
