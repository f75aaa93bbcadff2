// The part of CUDA C++ that csrc/*.cuh speak, for a C++ compiler on a machine without a GPU. Every
// CUDA thread is a fiber of the one thread that launched the kernel: it runs until it must meet
// others, in a shuffle or at a barrier, and the ones that come next run in an order that a test
// chooses (emulation.cpp). Every access of a kernel to memory is checked (memory.cpp).
//
// Stricter than a GPU, so that what passes here does not rest on luck there: all 32 lanes of a warp
// meet, and all threads of a block, at one line of the source; none may leave before. What a thread
// writes to shared memory and another reads or overwrites needs a barrier of the block or cluster
// between them: shuffles order no memory.
//
// Not seen: what only hardware does. nvcc contracts products and sums where this does not, so bits
// differ from a GPU's; and two threads that write one word of global memory go by.
#pragma once
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <source_location>

#define __CUDA_ARCH__ EMULATED_ARCH
#define __global__
#define __device__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs

// --- numbers -------------------------------------------------------------------------------------

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
float __half2float(__half v);
float __bfloat162float(__nv_bfloat16 v);
__half __float2half_rn(float v);
__nv_bfloat16 __float2bfloat16_rn(float v);

inline float __int_as_float(int v) { return std::bit_cast<float>(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}

// --- threads that meet ---------------------------------------------------------------------------

namespace emulation {

using Site = std::source_location;  // where in the kernels' source
enum class Meeting { shuffle, shuffle_xor, ballot, warp, block, cluster, exit };

// Waits for the other threads; what a warp's meeting gives: a lane's value, or the ballot.
uint32_t meet(Meeting meeting, unsigned mask, uint32_t value, int lane, const Site& site);

int cluster_rank();
void* shared_of(const void* mine, int rank);  // the same variable in another block of the cluster
void* static_shared(size_t bytes);            // the block's one variable
void* dynamic_shared();

}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T v, int lane, emulation::Site at = emulation::Site::current()) {
  const uint32_t mine = std::bit_cast<uint32_t>(v);
  return std::bit_cast<T>(emulation::meet(emulation::Meeting::shuffle, mask, mine, lane, at));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, emulation::Site at = emulation::Site::current()) {
  const uint32_t mine = std::bit_cast<uint32_t>(v);
  return std::bit_cast<T>(emulation::meet(emulation::Meeting::shuffle_xor, mask, mine, bits, at));
}
inline unsigned __ballot_sync(unsigned mask, bool v,
                              emulation::Site at = emulation::Site::current()) {
  return emulation::meet(emulation::Meeting::ballot, mask, v, 0, at);
}
inline void __syncwarp(unsigned mask = ~0u, emulation::Site at = emulation::Site::current()) {
  emulation::meet(emulation::Meeting::warp, mask, 0, 0, at);
}
inline void __syncthreads(emulation::Site at = emulation::Site::current()) {
  emulation::meet(emulation::Meeting::block, ~0u, 0, 0, at);
}

namespace cooperative_groups {
struct this_cluster {
  unsigned block_rank() const { return (unsigned)emulation::cluster_rank(); }
  void sync(emulation::Site at = emulation::Site::current()) const {
    emulation::meet(emulation::Meeting::cluster, ~0u, 0, 0, at);
  }
  template <class T>
  T* map_shared_rank(T* mine, int rank) const {
    return (T*)emulation::shared_of(mine, rank);
  }
};
}  // namespace cooperative_groups

// --- launches ------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
using cudaStream_t = void*;

struct cudaFuncAttributes {
  int ptxVersion;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace emulation {

// Runs body(arguments) in every thread of the grid; throws std::runtime_error where a thread does
// what it must not. The arguments, `bytes` long, are constant memory.
cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(const void*),
                const void* arguments, size_t bytes);
cudaError_t allow_shared(const void* kernel, int bytes);

}  // namespace emulation

cudaError_t cudaGetLastError();

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* built, Kernel*) {
  built->ptxVersion = __CUDA_ARCH__ / 10;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  return emulation::allow_shared((const void*)kernel, bytes);
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const auto call = [=] { kernel(arguments...); };
  using Call = decltype(call);
  return emulation::run(
      *config, (const void*)kernel, [](const void* given) { (*(Call*)given)(); }, &call,
      sizeof call);
}

// kernel<<<grid, block, shared, stream>>>(arguments...)
template <class Kernel, class... Arguments>
void emulated_launch(dim3 grid, dim3 block, size_t shared, cudaStream_t stream, Kernel* kernel,
                     const Arguments&... arguments) {
  const cudaLaunchConfig_t config{grid, block, shared, stream};
  cudaLaunchKernelEx(&config, kernel, arguments...);
}
