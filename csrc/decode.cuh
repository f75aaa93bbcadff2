// Sparse decode on CUDA: gathers the K weight rows a token uses and adds them up in fp32. No
// atomics; the terms of a column are added in the order of the entries, so results repeat bit for
// bit.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace fastsae {

constexpr int kDecodeThreads = 128;
constexpr int kDecodeChunk = 128;  // entries staged in shared memory at a time, one per thread

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline void from_float(float v, float* out) { *out = v; }
__device__ inline void from_float(float v, __nv_bfloat16* out) { *out = __float2bfloat16_rn(v); }
__device__ inline void from_float(float v, __half* out) { *out = __float2half_rn(v); }

// C consecutive elements, loaded as one 16-byte word where C fills one.
template <class T, int C>
struct alignas(sizeof(T) * C) Pack {
  T item[C];
};

template <class Value, class Weight, class Out>
struct DecodeParams {
  const Value* values;     // [N, K]
  const int32_t* indices;  // [N, K]
  const Weight* W;         // [F, D]
  const float* bias;       // [D] or null
  Out* out;                // [N, D]
  int64_t N, K, F, D;
};

// Grid: (rows, column slices). A thread owns C adjacent columns of one row.
template <class Value, class Weight, class Out, int C>
__global__ void __launch_bounds__(kDecodeThreads)
    decode_rows_kernel(DecodeParams<Value, Weight, Out> p) {
  __shared__ float value[kDecodeChunk];
  __shared__ int32_t index[kDecodeChunk];
  const int64_t n = blockIdx.x;
  const int64_t column = ((int64_t)blockIdx.y * kDecodeThreads + threadIdx.x) * C;
  const bool active = column < p.D;  // C divides D
  float sum[C];
#pragma unroll
  for (int c = 0; c < C; ++c) sum[c] = active && p.bias ? p.bias[column + c] : 0.0f;
  for (int64_t first = 0; first < p.K; first += kDecodeChunk) {
    const int count = (int)min((int64_t)kDecodeChunk, p.K - first);
    __syncthreads();
    if (threadIdx.x < count) {
      const int64_t entry = n * p.K + first + threadIdx.x;
      value[threadIdx.x] = to_float(p.values[entry]);
      index[threadIdx.x] = p.indices[entry];
      if (index[threadIdx.x] < 0 || index[threadIdx.x] >= p.F) __trap();
    }
    __syncthreads();
    if (!active) continue;
#pragma unroll 4
    for (int k = 0; k < count; ++k) {
      // A zero is padding: it must not meet a NaN weight. The branch is the same for the whole
      // block.
      if (value[k] == 0.0f) continue;
      const Pack<Weight, C> w = *(const Pack<Weight, C>*)(p.W + index[k] * p.D + column);
#pragma unroll
      for (int c = 0; c < C; ++c) sum[c] = fmaf(value[k], to_float(w.item[c]), sum[c]);
    }
  }
  if (!active) return;
#pragma unroll
  for (int c = 0; c < C; ++c) from_float(sum[c], p.out + n * p.D + column + c);
}

template <class Value, class Weight, class Out>
void decode_rows_cuda(const DecodeParams<Value, Weight, Out>& p, cudaStream_t stream) {
  if (p.N == 0 || p.D == 0) return;
  constexpr int wide = 16 / sizeof(Weight);
  const bool aligned = p.D % wide == 0 && (uintptr_t)p.W % 16 == 0;
  const int64_t columns = (int64_t)kDecodeThreads * (aligned ? wide : 1);
  const dim3 grid((unsigned)p.N, (unsigned)((p.D + columns - 1) / columns));
  if (aligned) {
    decode_rows_kernel<Value, Weight, Out, wide><<<grid, kDecodeThreads, 0, stream>>>(p);
  } else {
    decode_rows_kernel<Value, Weight, Out, 1><<<grid, kDecodeThreads, 0, stream>>>(p);
  }
}

}  // namespace fastsae
