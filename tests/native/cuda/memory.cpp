// Every read and write of a kernel, checked: within what the kernel was given, aligned, to shared
// memory only what was written before, and never two threads without a barrier between them.
//
// The kernels are compiled with -fsanitize=thread,alignment, which calls a function before every
// access; no sanitizer is linked: those functions are here, and so are the few of torch's C
// interface by which a CPU's tensors pass for a GPU's and say which memory they are.
#include <torch/csrc/stable/c/shim.h>  // first: it must not see __CUDA_ARCH__

#include "state.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

namespace emulation {

namespace {

constexpr size_t kSlot = 256 << 10;    // address space of a block's shared memory
constexpr size_t kStatic = 248 << 10;  // its one variable; what is asked for at launch is at 0

struct Region {
  const char *begin, *end;
  bool writable;
};
std::vector<Region> regions;

// Who touched a word last, and after which barriers.
struct Stamp {
  int block = -1;  // none
  int thread = 0;  // -1: several
  int epoch = 0, cluster_epoch = 0;
  Site site;  // where that thread last met others
};
struct Word {
  Stamp write, read, read_from_afar;
};
std::vector<Word> words;  // [blocks, kSlot / 4]
char* shared = nullptr;   // [blocks, kSlot]
size_t static_bytes = 0;

std::string place(const Site& site) {
  if (site.line() == 0) return "the start";
  const char* name = std::strrchr(site.file_name(), '/');
  return std::string(name ? name + 1 : site.file_name()) + ":" + std::to_string(site.line());
}

std::string name(int block, int thread) {
  const std::string one = thread < 0 ? "threads" : "thread " + std::to_string(thread);
  return one + " of block " + std::to_string(block);
}

// In a kernel's thread; the scheduler throws.
void fail(const std::string& what) {
  const Thread& thread = *now.thread;
  now.failure = name(thread.block, (int)thread.index.x) + ", after " + place(thread.site) + ", " +
                what;
  pause();
}

// Whether all that the stamp stands for came before what the running thread does now.
bool before(const Stamp& stamp) {
  const int block = now.thread->block;
  return stamp.block < 0 || stamp.cluster_epoch < now.epoch ||
         (stamp.block == block &&
          (stamp.epoch < now.blocks[block].epoch || stamp.thread == (int)now.thread->index.x));
}

std::string byte(size_t at) {
  const bool variable = at >= kStatic;
  return " byte " + std::to_string(variable ? at - kStatic : at) + " of " +
         (variable ? "the shared variable" : "dynamic shared memory");
}

void race(const Stamp& other, const char* does, const char* did, size_t at) {
  fail(does + byte(at) + ", which " + name(other.block, other.thread) + " " + did + " after " +
       place(other.site) + ": no barrier between");
}

void touch_word(Word& word, int owner, size_t at, bool write) {
  const Thread& thread = *now.thread;
  const Stamp mine{thread.block, (int)thread.index.x, now.blocks[thread.block].epoch, now.epoch,
                   thread.site};
  if (!before(word.write)) race(word.write, write ? "overwrites" : "reads", "wrote", at);
  if (write) {
    if (!before(word.read)) race(word.read, "overwrites", "read", at);
    if (!before(word.read_from_afar)) race(word.read_from_afar, "overwrites", "read", at);
    word.write = mine;
    return;
  }
  if (word.write.block < 0) fail("reads" + byte(at) + ", which nobody wrote");
  Stamp& last = thread.block == owner ? word.read : word.read_from_afar;
  const bool others = !before(last);
  last = mine;
  if (others) last.thread = -1;
}

void touch_shared(size_t offset, size_t bytes, bool write) {
  const int owner = (int)(offset / kSlot);
  const size_t at = offset % kSlot;
  const bool inside = at >= kStatic ? at + bytes <= kStatic + static_bytes
                                    : at + bytes <= now.shared_bytes;
  if (owner >= (int)now.blocks.size() || !inside) fail("is outside of its block's shared memory");
  Block& block = now.blocks[owner];
  if (block.left) fail("uses the shared memory of block " + std::to_string(owner) + ", which left");
  if (owner != now.thread->block) block.read_from_afar = now.epoch;
  for (size_t i = at / 4; i <= (at + bytes - 1) / 4; ++i) {
    touch_word(words[owner * kSlot / 4 + i], owner, 4 * i, write);
  }
}

void touch(const void* address, size_t bytes, bool write) {
  if (now.thread == nullptr) return;  // host code
  const char *begin = (const char*)address, *end = begin + bytes;
  if (begin >= now.stack.first && end <= now.stack.second) return;
  if (begin >= shared && begin < shared + kMostBlocks * kSlot) {
    return touch_shared(begin - shared, bytes, write);
  }
  for (Region& region : regions) {
    if (begin >= region.begin && end <= region.end && region.writable >= write) {
      std::swap(region, regions.front());  // found at once the next time
      return;
    }
  }
  for (dim3* known : {&threadIdx, &blockIdx, &blockDim, &gridDim}) {
    if (begin >= (char*)known && end <= (char*)(known + 1)) return;
  }
  fail((write ? "writes " : "reads ") + std::to_string(bytes) + " bytes that are not its own");
}

}  // namespace

std::string describe(const Thread& thread) {
  static constexpr const char* kNames[] = {"shuffle",    "shuffle",       "ballot",
                                           "__syncwarp", "__syncthreads", "cluster's sync"};
  const std::string who = name(thread.block, (int)thread.index.x);
  if (thread.meeting == Meeting::exit) return who + " has left";
  return who + " waits at " + place(thread.site) + " (" + kNames[(int)thread.meeting] + ")";
}

void know(const void* begin, size_t bytes, bool writable) {
  regions.push_back({(const char*)begin, (const char*)begin + bytes, writable});
}

void forget() { regions.clear(); }

void clear_shared() {
  if (shared == nullptr) {
    shared = (char*)mmap(nullptr, kMostBlocks * kSlot, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    words.resize(kMostBlocks * kSlot / 4);
  }
  for (size_t block = 0; block < now.blocks.size(); ++block) {
    Word* first = &words[block * kSlot / 4];
    std::fill(first, first + (now.shared_bytes + 3) / 4, Word{});
    std::fill(first + kStatic / 4, first + kSlot / 4, Word{});
  }
}

void* static_shared(size_t bytes) {
  const bool fits = bytes <= kSlot - kStatic && bytes + now.shared_bytes <= now.shared_at_most;
  if (!fits) fail("has no room for its shared variable");
  static_bytes = bytes;
  return shared + now.thread->block * kSlot + kStatic;
}

void* dynamic_shared() { return shared + now.thread->block * kSlot; }

void* shared_of(const void* mine, int rank) {
  const size_t at = (const char*)mine - (const char*)dynamic_shared();
  if (at >= kSlot || rank < 0 || rank >= (int)now.blocks.size()) fail("asks for no block's memory");
  return shared + rank * kSlot + at;
}

void leave(int block) {
  if (now.blocks[block].read_from_afar == now.epoch) {
    throw std::runtime_error("block " + std::to_string(block) +
                             " leaves after others read its shared memory: no barrier between");
  }
  now.blocks[block].left = true;
}

}  // namespace emulation

// --- what compilers call -------------------------------------------------------------------------

using emulation::touch;

#define ACCESS(bytes)                                                                 \
  extern "C" void __tsan_read##bytes(void* at) { touch(at, bytes, false); }           \
  extern "C" void __tsan_write##bytes(void* at) { touch(at, bytes, true); }           \
  extern "C" void __tsan_unaligned_read##bytes(void* at) { touch(at, bytes, false); } \
  extern "C" void __tsan_unaligned_write##bytes(void* at) { touch(at, bytes, true); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
extern "C" void __tsan_read_range(void* at, size_t bytes) { touch(at, bytes, false); }
extern "C" void __tsan_write_range(void* at, size_t bytes) { touch(at, bytes, true); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" int __tsan_atomic32_fetch_add(int* at, int value, int) {  // of the bindings
  return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);
}

struct Mismatch {
  const char* file;
  uint32_t line, column;
};
extern "C" void __ubsan_handle_type_mismatch_v1(const Mismatch* at, const void*) {
  if (emulation::now.thread == nullptr) return;
  emulation::fail("uses an address that is not aligned, at line " + std::to_string(at->line));
}

// --- what torch's stable ABI calls, of this library alone ----------------------------------------

extern "C" {

int32_t aoti_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

// The guard lives as long as an op's call: then the tensors that were known are not any more.
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = (DeviceGuardHandle)&emulation::regions;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  emulation::forget();
  return AOTI_TORCH_SUCCESS;
}

static AOTITorchError known(AtenTensorHandle tensor, void** data, bool writable) {
  int64_t count = 0;
  int32_t type = 0;
  aoti_torch_get_data_ptr(tensor, data);
  aoti_torch_get_numel(tensor, &count);
  aoti_torch_get_dtype(tensor, &type);
  const size_t bytes = count * aoti_torch_dtype_element_size(type);
  if (writable) std::memset(*data, 0xff, bytes);  // NaN where the kernel writes nothing
  emulation::know(*data, bytes, writable);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data) {
  return known(tensor, (void**)data, false);
}
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data) {
  return known(tensor, data, true);
}

AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool,
                                        char** message) {
  if (error) cudaGetLastError();  // as torch's: the next call does not see it
  *message = error ? strdup(("CUDA error " + std::to_string(error)).c_str()) : nullptr;
  return AOTI_TORCH_SUCCESS;
}
void torch_c10_cuda_free_error_msg(char* message) { free(message); }
}
