// A kernel for every mistake that the emulation must see: none may go by in silence, or hang.
#include <string>

#include "state.h"

namespace {

constexpr int kThreads = 64;

#define SHARED float* shared = (float*)emulation::dynamic_shared()

__global__ void reads_before_it_is_written(float* out) {
  SHARED;
  shared[threadIdx.x] = 1;
  out[threadIdx.x] = shared[(threadIdx.x + 32) % kThreads];
}

__global__ void overwrites_what_others_read(float* out) {
  SHARED;
  shared[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
  shared[threadIdx.x] = 2;
}

__global__ void shuffles_order_no_memory(float* out) {
  SHARED;
  shared[threadIdx.x] = 1;
  out[threadIdx.x] = __shfl_sync(~0u, 1.0f, 0) + shared[threadIdx.x ^ 1];
}

__global__ void half_the_block_waits(float*) {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void two_barriers_at_once(float*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void half_the_warp_shuffles(float* out) {
  if (threadIdx.x % 2) out[threadIdx.x] = __shfl_sync(~0u, 1.0f, 1);
}

__global__ void masks_out_a_lane(float* out) { out[threadIdx.x] = __shfl_sync(~1u, 1.0f, 1); }

__global__ void asks_a_lane_of_another_warp(float* out) {
  out[threadIdx.x] = __shfl_sync(~0u, 1.0f, 32);
}

__global__ void writes_past_its_shared_memory(float*) {
  SHARED;
  shared[threadIdx.x + 1] = 1;
}

__global__ void writes_past_the_tensor(float* out) { out[threadIdx.x + 1] = 1; }

__global__ void loads_at_an_odd_address(float* out) {
  const float4 four = *(const float4*)(out + 1);
  out[threadIdx.x] = four.x;
}

__global__ void reads_of_another_block_too_early(float* out) {
  SHARED;
  shared[threadIdx.x] = 1;
  __syncthreads();
  const unsigned other = 1 - cooperative_groups::this_cluster().block_rank();
  out[threadIdx.x] = cooperative_groups::this_cluster().map_shared_rank(shared, other)[0];
}

__global__ void leaves_while_others_read(float* out) {
  SHARED;
  shared[threadIdx.x] = 1;
  cooperative_groups::this_cluster().sync();
  const unsigned other = 1 - cooperative_groups::this_cluster().block_rank();
  out[threadIdx.x] = cooperative_groups::this_cluster().map_shared_rank(shared, other)[0];
}

__global__ void one_block_leaves_the_others_waiting(float*) {
  if (blockIdx.x == 0) cooperative_groups::this_cluster().sync();
}

struct {
  const char* name;
  void (*kernel)(float*);
} mistakes[] = {
#define MISTAKE(name) {#name, name}
    MISTAKE(reads_before_it_is_written),
    MISTAKE(overwrites_what_others_read),
    MISTAKE(shuffles_order_no_memory),
    MISTAKE(half_the_block_waits),
    MISTAKE(two_barriers_at_once),
    MISTAKE(half_the_warp_shuffles),
    MISTAKE(masks_out_a_lane),
    MISTAKE(asks_a_lane_of_another_warp),
    MISTAKE(writes_past_its_shared_memory),
    MISTAKE(writes_past_the_tensor),
    MISTAKE(loads_at_an_odd_address),
    MISTAKE(reads_of_another_block_too_early),
    MISTAKE(leaves_while_others_read),
    MISTAKE(one_block_leaves_the_others_waiting),
};

std::string said;

}  // namespace

// What is said of the mistake of this name in a cluster of two blocks; empty: nothing was seen.
extern "C" const char* mistake(const char* name) {
  alignas(16) float out[kThreads] = {};
  cudaLaunchAttribute cluster{cudaLaunchAttributeClusterDimension, {dim3(2)}};
  const cudaLaunchConfig_t config{dim3(2), dim3(kThreads), sizeof out, nullptr, &cluster, 1};
  said = "no such kernel";
  for (const auto& [known, kernel] : mistakes) {
    if (std::string(known) != name) continue;
    emulation::know(out, sizeof out, true);
    try {
      const cudaError_t error = cudaLaunchKernelEx(&config, kernel, (float*)out);
      said = error == cudaSuccess ? "" : "not launched";
    } catch (const std::exception& error) {
      said = error.what();
    }
    emulation::forget();
  }
  return said.c_str();
}
