// Steering on CUDA in one launch: a cluster of blocks owns up to R rows, each block a slice of the
// columns, so that even one row reads its weights through eight multiprocessors, and rows of one
// policy read them once. Partial dots meet through distributed shared memory and are added in the
// order of the blocks by every block alike. Before sm_90 there are no clusters: one block per R rows.
#pragma once
#include "cluster.cuh"
#include "decode.cuh"

namespace fastsae {

constexpr int kSteerThreads = 256;
constexpr int kSteerWarps = kSteerThreads / 32;
constexpr int kSteerItems = 64;   // features whose activations are found together
constexpr int kSteerBlock = 512;  // columns a warp holds in registers, 16 per lane
constexpr int kSteerCluster = 8;  // blocks: the largest portable cluster
constexpr int kItemsPerWarp = kSteerItems / kSteerWarps;

template <class T>
struct SteerParams {
  const T* x;              // [N, D]
  const int32_t* slots;    // [N]
  const float* strengths;  // [N]
  T* out;                  // [N, D]
  const float *enc, *bias, *theta, *dec;       // [rows, D], [rows]
  const int32_t *op_kind, *op_begin, *op_end;  // [S, P]
  const float* op_scalar;                      // [S, P]
  const int32_t* item_row;                     // [I]
  const float* item_value;                     // [I]
  const int32_t *gate_begin, *gate_end;        // [S]
  const float* gate_above;                     // [S]
  const int32_t* norm_preserve;                // [S]
  int64_t N, D;
  int S, P, blocks;  // blocks: of a cluster
};

template <int R>
struct SteerShared {
  float partial[2][kSteerItems * R];  // this block's share; the next exchange uses the other half
  float norms[2][2 * R];
  float warp_sums[kSteerWarps][2 * R];
  float coefficient[kSteerItems * R];
  float total[R];
  int32_t row[kSteerItems];
  int32_t slot[R];
  float strength[R];
};

template <class T, int R, bool Vector>
struct Steer {
  static constexpr int kBlock = Vector ? kSteerBlock : 128;  // single elements would spill
  const SteerParams<T>& p;
  SteerShared<R>& s;
  float *r, *delta;  // [R, columns] of this block, in shared memory
  int columns;       // of a block, a multiple of 4; those past D hold 0
  int64_t first;     // column of this block
  int turn = 0;

  // Four (or two) weights at column first + c, 0 past the last and past those of this block (there
  // an infinity, times 0, would be NaN). They are read unconditionally, from column 0 where there
  // are none, for a branch would make every row wait for the one before it.
  __device__ float4 four(const float* row, int c) const {
    const int64_t at = c < columns ? first + c : p.D;
    float4 w;
    if constexpr (Vector) {  // D is a multiple of 4
      w = *(const float4*)(row + (at < p.D ? at : 0));
    } else {
      w = make_float4(row[at < p.D ? at : 0], row[at + 1 < p.D ? at + 1 : 0],
                      row[at + 2 < p.D ? at + 2 : 0], row[at + 3 < p.D ? at + 3 : 0]);
    }
    return make_float4(at < p.D ? w.x : 0, at + 1 < p.D ? w.y : 0, at + 2 < p.D ? w.z : 0,
                       at + 3 < p.D ? w.w : 0);
  }

  __device__ float2 two(const float* row, int64_t at) const {
    float2 w;
    if constexpr (Vector) {
      w = *(const float2*)(row + (at < p.D ? at : 0));
    } else {
      w = make_float2(row[at < p.D ? at : 0], row[at + 1 < p.D ? at + 1 : 0]);
    }
    return make_float2(at < p.D ? w.x : 0, at + 1 < p.D ? w.y : 0);
  }

  // s.coefficient[item·R + row] = a of items begin..begin+count-1, count <= kSteerItems.
  __device__ void activations(int begin, int count) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float sums[kItemsPerWarp * R] = {};
    int64_t at[kItemsPerWarp];  // of the items' rows, asked for before the first row is
#pragma unroll
    for (int i = 0; i < kItemsPerWarp; ++i) {
      const int item = warp + i * kSteerWarps;
      at[i] = p.item_row[begin + min(item, count - 1)] * p.D;  // too many are thrown away below
    }
    for (int block = 0; block < columns; block += kBlock) {
      float4 mine[R][kBlock / 128];
#pragma unroll
      for (int row = 0; row < R; ++row) {
#pragma unroll
        for (int j = 0; j < kBlock / 128; ++j) {
          const int c = block + j * 128 + lane * 4;
          mine[row][j] = c < columns ? *(const float4*)(r + row * columns + c)
                                     : make_float4(0, 0, 0, 0);
        }
      }
#pragma unroll
      for (int i = 0; i < kItemsPerWarp; ++i) {
        // The compiler would move all loads up here, and spill: a barrier keeps a few together.
        if (i % (R > 1 ? 2 : 4) == 0) __syncwarp();
        float4 w[kBlock / 128];
#pragma unroll
        for (int j = 0; j < kBlock / 128; ++j) {
          const int c = block + j * 128 + lane * 4;
          w[j] = four(p.enc + at[i], c);
        }
#pragma unroll
        for (int j = 0; j < kBlock / 128; ++j) {
#pragma unroll
          for (int n = 0; n < R; ++n) {
            float sum = sums[i * R + n];
            sum = fmaf(w[j].x, mine[n][j].x, sum);
            sum = fmaf(w[j].y, mine[n][j].y, sum);
            sum = fmaf(w[j].z, mine[n][j].z, sum);
            sums[i * R + n] = fmaf(w[j].w, mine[n][j].w, sum);
          }
        }
      }
    }
    const float sum = reduce_lanes(sums);
    constexpr int kLanes = 32 / (kItemsPerWarp * R);  // lanes that hold the same sum
    const int value = lane / kLanes, item = warp + value / R * kSteerWarps;
    if (lane % kLanes == 0) s.partial[turn][item * R + value % R] = sum;
    cluster_sync();
    for (int i = threadIdx.x; i < count * R; i += kSteerThreads) {
      float h = 0;
      for (int block = 0; block < p.blocks; ++block) h += shared_of(&s.partial[turn][i], block)[0];
      const int row = p.item_row[begin + i / R];
      h += p.bias[row];
      const float theta = p.theta[row];
      s.coefficient[i] = h <= (theta < 0 ? 0 : theta) ? 0 : h;  // NaN stays
    }
    turn ^= 1;
    __syncthreads();
  }

  // delta += Σ coefficient · dec over the items.
  __device__ void expand(int count) {
    for (int c = threadIdx.x * 2; c < columns; c += kSteerThreads * 2) {
      float2 sum[R];
#pragma unroll
      for (int n = 0; n < R; ++n) sum[n] = *(const float2*)(delta + n * columns + c);
#pragma unroll 8
      for (int item = 0; item < count; ++item) {
        const float2 w = two(p.dec + s.row[item] * p.D, first + c);
#pragma unroll
        for (int n = 0; n < R; ++n) {
          const float v = s.coefficient[item * R + n];
          if (v != 0) {  // an unused direction may hold NaN
            sum[n].x = fmaf(v, w.x, sum[n].x);
            sum[n].y = fmaf(v, w.y, sum[n].y);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < R; ++n) *(float2*)(delta + n * columns + c) = sum[n];
    }
  }

  // s.total[row] += Σ coefficient of the row, by a warp per row.
  __device__ void add_items(int count) {
    const int lane = threadIdx.x % 32, n = threadIdx.x / 32;
    float sum[1] = {0};
    for (int item = lane; item < count; item += 32) sum[0] += s.coefficient[item * R + n];
    const float all = reduce_lanes(sum);
    if (lane == 0) s.total[n] += all;
  }

  // s.norms: Σ of 2·R per-thread values over the threads of all blocks, the same in every block.
  __device__ void exchange(float (&mine)[2 * R], float (&all)[2 * R]) {
    const float sum = reduce_lanes(mine);
    constexpr int kLanes = 32 / (2 * R);
    const int lane = threadIdx.x % 32;
    if (lane % kLanes == 0) s.warp_sums[threadIdx.x / 32][lane / kLanes] = sum;
    __syncthreads();
    if (threadIdx.x < 2 * R) {
      float block = 0;
      for (int warp = 0; warp < kSteerWarps; ++warp) block += s.warp_sums[warp][threadIdx.x];
      s.norms[turn][threadIdx.x] = block;
    }
    cluster_sync();
#pragma unroll
    for (int i = 0; i < 2 * R; ++i) {
      all[i] = 0;
      for (int block = 0; block < p.blocks; ++block) {
        all[i] += shared_of(&s.norms[turn][i], block)[0];
      }
    }
    turn ^= 1;
  }

  __device__ void clear_sums() {
    __syncthreads();  // whoever reads the last ones is done
    for (int c = threadIdx.x; c < R * columns; c += kSteerThreads) delta[c] = 0;
    if (threadIdx.x < R) s.total[threadIdx.x] = 0;
    __syncthreads();
  }

  // One operation, or the gate (kind 6), on the rows whose bit is set in `passes`.
  __device__ void operation(int kind, int begin, int end, float magnitude, unsigned passes) {
    clear_sums();
#pragma unroll 1
    for (int start = begin; start < end; start += kSteerItems) {
      const int count = min(kSteerItems, end - start);
      if (threadIdx.x < count) s.row[threadIdx.x] = p.item_row[start + threadIdx.x];
      if (kind != 4) activations(start, count);
      for (int i = threadIdx.x; kind != 6 && i < count * R; i += kSteerThreads) {
        const float value = p.item_value[start + i / R], a = kind == 4 ? 0 : s.coefficient[i];
        const float gap = (kind == 5 ? magnitude : value) - a;
        const float raised = gap < 0 ? 0 : gap;  // NaN stays
        s.coefficient[i] = kind == 1 ? value * a : kind == 2 ? gap : kind == 4 ? value : raised;
      }
      __syncthreads();
      if (kind != 6) expand(count);
      if (threadIdx.x < 32 * R) add_items(count);
      __syncthreads();
    }
    if (kind == 5) return enforce(magnitude, passes);
#pragma unroll
    for (int n = 0; n < R; ++n) {
      const bool moves = kind != 6 && passes >> n & 1;
      for (int c = threadIdx.x; moves && c < columns; c += kSteerThreads) {
        r[n * columns + c] = fmaf(s.strength[n], delta[n * columns + c], r[n * columns + c]);
      }
    }
    __syncthreads();
  }

  // r + σ m delta / total, at the norm of r.
  __device__ void enforce(float magnitude, unsigned passes) {
    float mine[2 * R] = {}, all[2 * R];
#pragma unroll
    for (int n = 0; n < R; ++n) {
      for (int c = threadIdx.x; c < columns; c += kSteerThreads) {
        const int i = n * columns + c;
        const float moved = r[i] + s.strength[n] * magnitude * (delta[i] / s.total[n]);
        delta[i] = moved;
        mine[2 * n] += r[i] * r[i];
        mine[2 * n + 1] += moved * moved;
      }
    }
    exchange(mine, all);
#pragma unroll
    for (int n = 0; n < R; ++n) {
      const float before = sqrtf(all[2 * n]), after = sqrtf(all[2 * n + 1]);
      const bool moves = (passes >> n & 1) && s.total[n] > 0 && after > 0;
      for (int c = threadIdx.x; moves && c < columns; c += kSteerThreads) {
        r[n * columns + c] = delta[n * columns + c] * (before / after);
      }
    }
    __syncthreads();
  }

  // Scales the rows of r to the norm of x.
  __device__ void preserve(int64_t row, unsigned passes) {
    float mine[2 * R] = {}, all[2 * R];
#pragma unroll
    for (int n = 0; n < R; ++n) {
      const bool passing = passes >> n & 1;
      for (int c = threadIdx.x; passing && c < columns && first + c < p.D; c += kSteerThreads) {
        const float x = to_float(p.x[(row + n) * p.D + first + c]), now = r[n * columns + c];
        mine[2 * n] += x * x;
        mine[2 * n + 1] += now * now;
      }
    }
    exchange(mine, all);
#pragma unroll
    for (int n = 0; n < R; ++n) {
      const float before = sqrtf(all[2 * n]), after = sqrtf(all[2 * n + 1]);
      const bool scales = (passes >> n & 1) && after > 0;
      for (int c = threadIdx.x; scales && c < columns; c += kSteerThreads) {
        r[n * columns + c] *= before / after;
      }
    }
    __syncthreads();
  }

  // The gate and all operations of `slot` on the rows in `passes`; returns those that it let pass.
  __device__ unsigned policy(int slot, int64_t row, unsigned passes) {
    const int gate_begin = p.gate_begin[slot], gate_end = p.gate_end[slot];
#pragma unroll 1
    for (int i = gate_end > gate_begin ? -1 : 0; i < p.P; ++i) {
      const int at = slot * p.P + i, kind = i < 0 ? 6 : p.op_kind[at];
      if (kind == 0) continue;
      const int begin = i < 0 ? gate_begin : p.op_begin[at], end = i < 0 ? gate_end : p.op_end[at];
      operation(kind, begin, end, i < 0 ? 0 : p.op_scalar[at], passes);
      for (int n = 0; i < 0 && n < R; ++n) {
        const float mean = s.total[n] / (float)(end - begin);
        if (!(mean >= p.gate_above[slot])) passes &= ~(1u << n);
      }
      if (!passes) return 0;  // every block of the cluster decides alike
    }
    if (p.norm_preserve[slot]) preserve(row, passes);
    return passes;
  }
};

template <class T, int R, bool Vector>
__global__ void __launch_bounds__(kSteerThreads, 1)
    steer_rows_kernel(SteerParams<T> p, int columns) {
  extern __shared__ float4 memory[];
  __shared__ SteerShared<R> shared;
  const int64_t row = (int64_t)(blockIdx.x / p.blocks) * R;
  const int rank = cluster_rank();
  const int64_t first = (int64_t)rank * columns;
  float* r = (float*)memory;
  Steer<T, R, Vector> steer{p, shared, r, r + R * columns, columns, first};
  if (threadIdx.x < R) {
    const int64_t n = row + threadIdx.x;
    shared.slot[threadIdx.x] = n < p.N ? p.slots[n] : 0;
    shared.strength[threadIdx.x] = n < p.N ? p.strengths[n] : 0;
  }
  __syncthreads();
  unsigned todo = 0, changed = 0;
#pragma unroll
  for (int n = 0; n < R; ++n) {
    if (shared.slot[n] > 0 && shared.slot[n] < p.S) todo |= 1u << n;
  }
  if (todo) {
    for (int n = 0; n < R; ++n) {
      for (int c = threadIdx.x; c < columns; c += kSteerThreads) {
        const bool inside = (todo >> n & 1) && first + c < p.D;
        r[n * columns + c] = inside ? to_float(p.x[(row + n) * p.D + first + c]) : 0;
      }
    }
#pragma unroll 1
    while (todo) {  // the rows of one policy go together
      const int slot = shared.slot[__ffs(todo) - 1];
      unsigned together = 0;
      for (int n = 0; n < R; ++n) together |= (shared.slot[n] == slot ? 1u : 0u) << n;
      changed |= steer.policy(slot, row, together);
      todo &= ~together;
    }
    cluster_sync();  // a block's shared memory stays until all have read it
  }
  for (int n = 0; n < R && row + n < p.N; ++n) {
    // A kernel cannot raise, and a wrong slot must show: it makes the row NaN.
    const bool wrong = shared.slot[n] < 0 || shared.slot[n] >= p.S;
    for (int c = threadIdx.x; c < columns && first + c < p.D; c += kSteerThreads) {
      const int64_t i = (row + n) * p.D + first + c;
      T value = p.x[i];  // a row without a policy keeps its bits
      if (changed >> n & 1) from_float(r[n * columns + c], &value);
      if (wrong) from_float(__int_as_float(0x7fffffff), &value);
      p.out[i] = value;
    }
  }
}

template <class T, int R, bool Vector>
cudaError_t steer_rows(SteerParams<T> p, cudaStream_t stream) {
  const auto kernel = steer_rows_kernel<T, R, Vector>;
  cudaFuncAttributes built;
  cudaError_t error = cudaFuncGetAttributes(&built, kernel);
  if (error != cudaSuccess) return error;
  p.blocks = built.ptxVersion >= 90 && p.D > 128 ? kSteerCluster : 1;
  const int64_t share = (p.D + p.blocks - 1) / p.blocks;
  const int columns = (int)((share + 3) / 4 * 4);
  const size_t bytes = 2 * sizeof(float) * R * columns;
  if (bytes > 32 << 10) {  // more than comes without asking
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if constexpr (R > 1) {
      if (error != cudaSuccess) {  // wide rows without clusters: one at a time may fit
        cudaGetLastError();
        return steer_rows<T, 1, Vector>(p, stream);
      }
    }
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)((p.N + R - 1) / R * p.blocks));
  config.blockDim = dim3(kSteerThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = p.blocks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = p.blocks > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, p, columns);
}

// Few rows: a cluster each. Many: four rows share the weights they read.
template <class T>
cudaError_t steer_rows_cuda(const SteerParams<T>& p, cudaStream_t stream) {
  if (p.N == 0 || p.D == 0) return cudaSuccess;
  const bool vector = p.D % 4 == 0 && ((uintptr_t)p.enc | (uintptr_t)p.dec) % 16 == 0;
  if (!vector) return steer_rows<T, 1, false>(p, stream);
  return p.N <= 16 ? steer_rows<T, 1, true>(p, stream) : steer_rows<T, 4, true>(p, stream);
}

}  // namespace fastsae
