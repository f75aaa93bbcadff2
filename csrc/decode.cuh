// Sparse decode on CUDA: gathers the K weight rows a token uses and adds them up in fp32, in the
// order of the entries: no atomics, and a row's bits depend on nothing but the row.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace fastsae {

constexpr int kDecodeWarps = 4;         // tokens of one block, a warp each
constexpr int kDecodeRows = 8;          // weight rows a warp asks for before it waits
constexpr int kDecodeWarpsWanted = 512;  // that fill a GPU: about four per multiprocessor

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

// A warp: one row, 32·C columns. The slice of columns is the slow axis of the grid, so that all
// rows gather from the F·32·C weights of one slice, which stay in L2, before the next begins.
template <class Value, class Weight, class Out, int C>
__global__ void __launch_bounds__(32 * kDecodeWarps, 8)
    decode_rows_kernel(DecodeParams<Value, Weight, Out> p) {
  const int lane = threadIdx.x % 32;
  const int64_t n = (int64_t)blockIdx.x * kDecodeWarps + threadIdx.x / 32;
  if (n >= p.N) return;  // whole warps: the shuffles below stay complete
  const int64_t column = ((int64_t)blockIdx.y * 32 + lane) * C;
  const bool active = column < p.D;  // C divides D
  float sum[C];
#pragma unroll
  for (int c = 0; c < C; ++c) sum[c] = 0.0f;
  for (int64_t first = 0; first < p.K; first += 32) {
    float value = 0.0f;
    int32_t index = 0;
    if (first + lane < p.K) {
      value = to_float(p.values[n * p.K + first + lane]);
      index = p.indices[n * p.K + first + lane];
    }
    // A kernel cannot raise: an index out of range reads nothing and must show. A zero is padding:
    // it must not meet a NaN weight.
    const bool known = index >= 0 && index < p.F;
    if (value != 0.0f && !known) value = __int_as_float(0x7fffffff);
    const unsigned reads = __ballot_sync(~0u, value != 0.0f && known);
    const int count = (int)min((int64_t)32, p.K - first);
    for (int k = 0; k < count; k += kDecodeRows) {
      Pack<Weight, C> rows[kDecodeRows];
#pragma unroll
      for (int i = 0; i < kDecodeRows; ++i) {
        const int64_t row = __shfl_sync(~0u, index, k + i);
        rows[i] = Pack<Weight, C>{};
        if (active && (reads >> (k + i) & 1)) {
          rows[i] = *(const Pack<Weight, C>*)(p.W + row * p.D + column);
        }
      }
#pragma unroll
      for (int i = 0; i < kDecodeRows; ++i) {
        const float v = __shfl_sync(~0u, value, k + i);  // 0 past the last entry
#pragma unroll
        for (int c = 0; c < C; ++c) sum[c] = fmaf(v, to_float(rows[i].item[c]), sum[c]);
      }
    }
  }
  if (!active) return;
  Pack<Out, C> result;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    from_float(sum[c] + (p.bias ? p.bias[column + c] : 0.0f), &result.item[c]);
  }
  *(Pack<Out, C>*)(p.out + n * p.D + column) = result;
}

template <class Value, class Weight, class Out, int C>
void decode_slices(const DecodeParams<Value, Weight, Out>& p, cudaStream_t stream) {
  const int64_t columns = 32 * C;
  const dim3 grid((unsigned)((p.N + kDecodeWarps - 1) / kDecodeWarps),
                  (unsigned)((p.D + columns - 1) / columns));
  decode_rows_kernel<Value, Weight, Out, C><<<grid, 32 * kDecodeWarps, 0, stream>>>(p);
}

// 16 bytes per lane, or one element where rows are too few to fill the GPU or not aligned.
template <class Value, class Weight, class Out>
void decode_rows_cuda(const DecodeParams<Value, Weight, Out>& p, cudaStream_t stream) {
  if (p.N == 0 || p.D == 0) return;
  constexpr int wide = 16 / sizeof(Weight);
  const bool aligned = p.D % wide == 0 && (uintptr_t)p.W % 16 == 0;
  if (aligned && p.N * p.D >= (int64_t)kDecodeWarpsWanted * 32 * wide) {
    decode_slices<Value, Weight, Out, wide>(p, stream);
  } else {
    decode_slices<Value, Weight, Out, 1>(p, stream);
  }
}

}  // namespace fastsae
