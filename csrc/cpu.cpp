#include "cpu.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <new>
#include <string>

#include "kernels.h"

namespace fastsae {
namespace {

#if defined(__x86_64__) && defined(__linux__)
// Linux enlarges a process's register state only when it asks (arch_prctl ARCH_REQ_XCOMP_PERM).
bool allow_tiles() {
  constexpr long kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#else
bool allow_tiles() { return false; }
#endif

const Kernels* find_kernels(const std::string& name) {
  const CpuFeatures cpu = cpu_features();
#if defined(__x86_64__)
  if (cpu.tiles && (name == "amx" || name == "auto") && allow_tiles()) return &kernels_amx;
  if (cpu.avx512 && (name == "avx512" || name == "auto")) return &kernels_avx512;
  if (cpu.avx2 && (name == "avx2" || name == "auto")) return &kernels_avx2;
#endif
  (void)cpu;
  return name == "scalar" || name == "auto" ? &kernels_scalar : nullptr;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> table{find_kernels("auto")};
  return table;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

bool use_isa(const char* name) {
  const Kernels* table = find_kernels(name);
  if (table) current().store(table);
  return table != nullptr;
}

void out_of_memory() { throw std::bad_alloc(); }

}  // namespace fastsae
