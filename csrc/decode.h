// Sparse decode and its gradient with respect to the values.
#pragma once
#include "dot.h"
#include "kernels.h"

namespace fastsae {
namespace {

inline float read(const void* data, DType type, int64_t i) {
  if (type == DType::bf16) return to_float(((const bf16*)data)[i]);
  if (type == DType::f16) return to_float(((const f16*)data)[i]);
  return ((const float*)data)[i];
}

inline void write_row(const float* in, int64_t n, DType type, void* out, int64_t offset) {
  if (type == DType::f32) memcpy((float*)out + offset, in, (size_t)n * 4);
  if (type == DType::bf16) {
    for (int64_t j = 0; j < n; ++j) from_float(in[j], (bf16*)out + offset + j);
  }
  if (type == DType::f16) {
    for (int64_t j = 0; j < n; ++j) from_float(in[j], (f16*)out + offset + j);
  }
}

// sum[j] += Σ_r v[r]·w[r][j], the terms of a column one after the other. What is added 1 KB later
// comes into the cache meanwhile: the rows' own columns, then those of the R rows at `next` (null:
// none), because no prefetcher guesses where the next indices point.
template <class I, int R, class T>
inline void add_rows(float* sum, const float* v, const T* const* w, int64_t n,
                     const T* const* next = nullptr) {
  constexpr int64_t kAhead = 1024 / sizeof(T);
  typename I::Vec scale[R];
  for (int r = 0; r < R; ++r) scale[r] = I::set1(v[r]);
  int64_t j = 0;
  const auto add = [&](int64_t end, const T* const* rows, int64_t first) {
    for (; j + 32 <= end; j += 32) {
      typename I::Vec a = I::load(sum + j), b = I::load(sum + j + 16);
      for (int r = 0; r < R; ++r) {
        __builtin_prefetch(rows[r] + (j - first));
        if (sizeof(T) == 4) __builtin_prefetch(rows[r] + (j - first) + 16);
      }
      for (int r = 0; r < R; ++r) {
        a = I::fma(scale[r], I::load(w[r] + j), a);
        b = I::fma(scale[r], I::load(w[r] + j + 16), b);
      }
      I::store(sum + j, a);
      I::store(sum + j + 16, b);
    }
  };
  const int64_t own = max64(0, n - kAhead) / 32 * 32;
  add(own, w, -kAhead);
  add(n, next ? next : w, own);
  for (; j < n; j += 16) {
    const int rest = (int)min64(16, n - j);
    typename I::Vec a = I::load_n(sum + j, rest, 0.0f);
    if (rest == 16) a = I::load(sum + j);
    for (int r = 0; r < R; ++r) {
      a = I::fma(scale[r], rest == 16 ? I::load(w[r] + j) : I::load_n(w[r] + j, rest, 0.0f), a);
    }
    I::store_n(sum + j, a, rest);
  }
}

constexpr int64_t kRows = 4;  // rows added at once: sum stays in L1, the next rows fit beside it

// sum += Σ_i v[i]·W[index[i]], in order.
template <class I, class T>
inline void add_indexed(float* sum, const float* v, const int32_t* index, int64_t count, const T* W,
                        int64_t stride, int64_t n) {
  const T *rows[kRows], *next[kRows];
  int64_t i = 0;
  for (; i + kRows <= count; i += kRows) {
    for (int64_t r = 0; r < kRows; ++r) {
      rows[r] = W + (int64_t)index[i + r] * stride;
      next[r] = W + (int64_t)index[min64(i + kRows + r, count - 1)] * stride;
    }
    add_rows<I, kRows>(sum, v + i, rows, n, next);
  }
  for (; i < count; ++i) {
    const T* row = W + (int64_t)index[i] * stride;
    add_rows<I, 1>(sum, v + i, &row, n);
  }
}

// Sorts n distinct keys by their upper halves, which are < limit, then by their lower halves, which
// ascend already; returns where they ended up, `keys` or `spare`.
inline const int64_t* radix_ascending(int64_t* keys, int64_t* spare, int64_t n, int64_t limit) {
  for (int shift = 0; shift < 32 && (limit - 1) >> shift > 0; shift += 8) {
    int64_t start[257] = {0};
    for (int64_t i = 0; i < n; ++i) ++start[(keys[i] >> (32 + shift) & 255) + 1];
    for (int d = 0; d < 256; ++d) start[d + 1] += start[d];
    for (int64_t i = 0; i < n; ++i) spare[start[keys[i] >> (32 + shift) & 255]++] = keys[i];
    int64_t* swap = keys;
    keys = spare;
    spare = swap;
  }
  return keys;
}

// Room for sorting one row of K entries.
inline int64_t sort_bytes(int64_t K) { return 24 * K + 64; }

// The entries of row n by ascending index, repeated ones in their old order: the order of every
// sum, so that blocks of features may be taken one after the other. Returns how many there are: a
// zero is padding, it must not meet a NaN weight.
template <class I>
inline int64_t sort_entries(const DecodeArgs& a, int64_t n, float* value, int32_t* index,
                            char* memory) {
  constexpr int64_t kRanked = 128;  // so many are sooner compared each with each than counted
  int64_t* keys = (int64_t*)memory;
  float* unsorted = (float*)(keys + 2 * a.K);
  int64_t used = 0;
  bool sorted = true;
  for (int64_t k = 0; k < a.K; ++k) {
    const float v = read(a.values, a.value_type, n * a.K + k);
    if (v == 0) continue;
    index[used] = a.indices[n * a.K + k];
    value[used] = unsorted[used] = v;
    sorted &= used == 0 || index[used - 1] <= index[used];
    ++used;
  }
  if (sorted) return used;
  if (used <= kRanked && a.F <= INT32_MAX / kRanked) {
    int32_t key[kRanked + 16];
    for (int64_t i = 0; i < used; ++i) key[i] = index[i] * (int32_t)kRanked + (int32_t)i;
    for (int64_t i = used; i < used + 16; ++i) key[i] = -1;  // above nothing
    for (int64_t i = 0; i < used; ++i) {
      int32_t above = 0;
      for (int64_t j = 0; j < used; j += 16) {
        above += __builtin_popcount(I::gt_key(key + j, key[i]));
      }
      index[used - 1 - above] = key[i] / (int32_t)kRanked;
      value[used - 1 - above] = unsorted[i];
    }
    return used;
  }
  for (int64_t i = 0; i < used; ++i) keys[i] = (int64_t)index[i] << 32 | i;
  const int64_t* ascending = radix_ascending(keys, keys + a.K, used, a.F);
  for (int64_t i = 0; i < used; ++i) {
    index[i] = (int32_t)(ascending[i] >> 32);
    value[i] = unsorted[(int32_t)ascending[i]];
  }
  return used;
}

inline void begin_sum(const DecodeArgs& a, int64_t first, int64_t columns, float* sum) {
  if (a.bias) {
    memcpy(sum, a.bias + first, (size_t)columns * 4);
  } else {
    memset(sum, 0, (size_t)columns * 4);
  }
}

template <class I, class T>
inline void decode_typed(const DecodeArgs& a, int64_t begin, int64_t end) {
  Memory memory(4 * (a.D + 2 * a.K + 2) + sort_bytes(a.K));
  char* sorting = memory.data;
  float* sum = (float*)(sorting + sort_bytes(a.K));
  float* value = sum + a.D;
  int32_t* index = (int32_t*)(value + a.K);
  const int64_t width = ((a.D + a.slices - 1) / a.slices + 63) / 64 * 64;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item % a.N, first = item / a.N * width;
    const int64_t columns = min64(width, a.D - first);
    if (columns <= 0) continue;
    const int64_t used = sort_entries<I>(a, n, value, index, sorting);
    begin_sum(a, first, columns, sum);
    add_indexed<I>(sum, value, index, used, (const T*)a.W + first, a.D, columns);
    write_row(sum, columns, a.out_type, a.out, n * a.D + first);
  }
}

template <class I>
void decode_rows(const DecodeArgs& a, int64_t begin, int64_t end) {
  if (a.weight_type == DType::f32) decode_typed<I, float>(a, begin, end);
  if (a.weight_type == DType::bf16) decode_typed<I, bf16>(a, begin, end);
  if (a.weight_type == DType::f16) decode_typed<I, f16>(a, begin, end);
}

// Rows [begin, end) of sorted entries, for decode_blocks.
template <class I>
void decode_sort(const DecodeArgs& a, int64_t begin, int64_t end) {
  Memory memory(sort_bytes(a.K));
  for (int64_t n = begin; n < end; ++n) {
    a.counts[n] = (int32_t)sort_entries<I>(a, n, a.sorted_values + n * a.K,
                                           a.sorted_indices + n * a.K, memory.data);
  }
}

// kDecodeColumns columns of some features, side by side: rows a power of two apart would share a
// few sets of the cache. What lies beyond `columns` is zero.
template <class T>
inline void pack_block(const T* W, int64_t D, int64_t columns, int64_t features, T* out) {
  for (int64_t f = 0; f < features; ++f) {
    const T* row = W + f * D;
    if (columns == kDecodeColumns) {
      memcpy(out + f * kDecodeColumns, row, kDecodeColumns * sizeof(T));
    } else {
      memset(out + f * kDecodeColumns, 0, kDecodeColumns * sizeof(T));
      memcpy(out + f * kDecodeColumns, row, (size_t)columns * sizeof(T));
    }
  }
}

// sum [kDecodeColumns] += Σ_i value[i]·W[index[i] - first], in order, in registers.
template <class I, class T>
inline void add_block(float* sum, const float* value, const int32_t* index, int64_t count,
                      const T* W, int64_t first) {
  constexpr int V = kDecodeColumns / 16;
  typename I::Vec part[V];
  for (int j = 0; j < V; ++j) part[j] = I::load(sum + 16 * j);
  for (int64_t i = 0; i < count; ++i) {
    const typename I::Vec scale = I::set1(value[i]);
    const T* w = W + (index[i] - first) * kDecodeColumns;
    for (int j = 0; j < V; ++j) part[j] = I::fma(scale, I::load(w + 16 * j), part[j]);
  }
  for (int j = 0; j < V; ++j) I::store(sum + 16 * j, part[j]);
}

// Work item i: columns of slice i % slices of all rows of block i / slices. Blocks of features pass
// by: each weight comes from memory once for all rows, and is in L2 when they meet it.
template <class I, class T>
inline void decode_blocks_typed(const DecodeArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t C = kDecodeColumns;
  T* weights = (T*)a.scratch;
  float* sums = (float*)(weights + a.block_features * C);
  int32_t* next = (int32_t*)(sums + a.block_rows * C);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t column = item % a.slices * C, columns = min64(C, a.D - column);
    const int64_t row = item / a.slices * a.block_rows, rows = min64(a.block_rows, a.N - row);
    if (rows <= 0) continue;
    for (int64_t n = 0; n < rows; ++n) begin_sum(a, column, columns, sums + n * C);
    memset(next, 0, (size_t)rows * 4);
    for (int64_t first = 0; first < a.F; first += a.block_features) {
      const int64_t last = min64(a.F, first + a.block_features);
      pack_block((const T*)a.W + first * a.D + column, a.D, columns, last - first, weights);
      for (int64_t n = 0; n < rows; ++n) {
        const int32_t* index = a.sorted_indices + (row + n) * a.K;
        const int32_t from = next[n], count = a.counts[row + n];
        int32_t to = from;
        while (to < count && index[to] < last) ++to;
        next[n] = to;
        add_block<I>(sums + n * C, a.sorted_values + (row + n) * a.K + from, index + from,
                     to - from, weights, first);
      }
    }
    for (int64_t n = 0; n < rows; ++n) {
      write_row(sums + n * C, columns, a.out_type, a.out, (row + n) * a.D + column);
    }
  }
}

template <class I>
void decode_blocks(const DecodeArgs& a, int64_t begin, int64_t end) {
  if (a.weight_type == DType::f32) decode_blocks_typed<I, float>(a, begin, end);
  if (a.weight_type == DType::bf16) decode_blocks_typed<I, bf16>(a, begin, end);
  if (a.weight_type == DType::f16) decode_blocks_typed<I, f16>(a, begin, end);
}

inline void read_row(const void* data, DType type, int64_t offset, int64_t n, float* out) {
  if (type == DType::f32) widen_row((const float*)data + offset, n, out);
  if (type == DType::bf16) widen_row((const bf16*)data + offset, n, out);
  if (type == DType::f16) widen_row((const f16*)data + offset, n, out);
}

// out[i] = <x, W[index[i]]> for any weight type.
template <class I>
inline void dot_any(const float* x, const void* W, DType type, int64_t D, const int32_t* index,
                    int64_t n, float* out) {
  if (type == DType::f32) dot_indexed<I>(x, (const float*)W, D, index, n, out);
  if (type == DType::bf16) dot_indexed<I>(x, (const bf16*)W, D, index, n, out);
  if (type == DType::f16) dot_indexed<I>(x, (const f16*)W, D, index, n, out);
}

template <class I>
void gather_dot_rows(const GatherDotArgs& a, int64_t begin, int64_t end) {
  Memory memory(4 * a.D);
  float* wide = (float*)memory.data;
  for (int64_t n = begin; n < end; ++n) {
    read_row(a.g, a.g_type, n * a.D, a.D, wide);
    dot_any<I>(wide, a.W, a.weight_type, a.D, a.indices + n * a.K, a.K, a.out + n * a.K);
  }
}

}  // namespace
}  // namespace fastsae
