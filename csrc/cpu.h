// What this processor can do, and the instruction set in use.
#pragma once

namespace fastsae {

struct CpuFeatures {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, avx512_vnni = false, amx_bf16 = false;
  bool tiles = false;  // everything that kernels_amx.cpp is compiled for
};

// GCC and Clang check that the operating system saves the registers as well, not only cpuid.
inline CpuFeatures cpu_features() {
  CpuFeatures f;
#if defined(__x86_64__)
  __builtin_cpu_init();
  f.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
  f.avx512 = f.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  f.avx512_bf16 = f.avx512 && __builtin_cpu_supports("avx512bf16");
  f.avx512_vnni = f.avx512 && __builtin_cpu_supports("avx512vnni");
  f.amx_bf16 = f.avx512 && __builtin_cpu_supports("amx-bf16");
  f.tiles = f.amx_bf16 && f.avx512_bf16 && f.avx512_vnni && __builtin_cpu_supports("amx-tile");
#endif
  return f;
}

}  // namespace fastsae
