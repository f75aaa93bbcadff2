// What the blocks of a cluster and the lanes of a warp do together, with and without clusters.
#pragma once
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#include <cooperative_groups.h>
#endif

namespace fastsae {

// Blocks of one cluster; a block alone where there are no clusters.
__device__ inline int cluster_rank() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return (int)cooperative_groups::this_cluster().block_rank();
#else
  return 0;
#endif
}

__device__ inline void cluster_sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}

__device__ inline const float* shared_of(float* mine, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
#else
  return mine;
#endif
}

// Sums V values over the 32 lanes in V + log2(32 / V) shuffles: lane l holds value l / (32 / V).
// The tree is the same for every V, so a row's bits do not depend on the rows beside it.
template <int V, int Offset = 16>
__device__ inline float reduce_lanes(float (&v)[V]) {
  if constexpr (V > 1) {
    const bool upper = threadIdx.x & Offset;
    float half[V / 2];
#pragma unroll
    for (int j = 0; j < V / 2; ++j) {
      const float send = upper ? v[j] : v[j + V / 2];
      half[j] = (upper ? v[j + V / 2] : v[j]) + __shfl_xor_sync(~0u, send, Offset);
    }
    return reduce_lanes<V / 2, Offset / 2>(half);
  } else if constexpr (Offset > 0) {
    v[0] += __shfl_xor_sync(~0u, v[0], Offset);
    return reduce_lanes<1, Offset / 2>(v);
  } else {
    return v[0];
  }
}

}  // namespace fastsae
