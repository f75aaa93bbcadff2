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

// sum[j] += Σ_r v[r]·w[r][j], the terms of a column one after the other; meanwhile the R rows at
// `next` come into the cache, because no prefetcher guesses where the next indices point.
template <class I, int R, class T>
inline void add_rows(float* sum, const float* v, const T* const* w, int64_t n,
                     const T* const* next = nullptr) {
  typename I::Vec scale[R];
  for (int r = 0; r < R; ++r) scale[r] = I::set1(v[r]);
  int64_t j = 0;
  for (; j + 32 <= n; j += 32) {
    typename I::Vec a = I::load(sum + j), b = I::load(sum + j + 16);
    if (next) {
      for (int r = 0; r < R; ++r) {
        __builtin_prefetch(next[r] + j);
        if (sizeof(T) == 4) __builtin_prefetch(next[r] + j + 16);
      }
    }
    for (int r = 0; r < R; ++r) {
      a = I::fma(scale[r], I::load(w[r] + j), a);
      b = I::fma(scale[r], I::load(w[r] + j + 16), b);
    }
    I::store(sum + j, a);
    I::store(sum + j + 16, b);
  }
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
    add_rows<I, kRows>(sum, v + i, rows, n, i + kRows < count ? next : nullptr);
  }
  for (; i < count; ++i) {
    const T* row = W + (int64_t)index[i] * stride;
    add_rows<I, 1>(sum, v + i, &row, n);
  }
}

// Columns of a matrix side by side: rows a power of two apart would share a few sets of the cache.
template <class T>
inline void pack_columns(const T* in, int64_t rows, int64_t stride, int64_t n, T* out) {
  for (int64_t r = 0; r < rows; ++r) memcpy(out + r * n, in + r * stride, (size_t)n * sizeof(T));
}

template <class I, class T>
inline void decode_typed(const DecodeArgs& a, int64_t begin, int64_t end) {
  Memory memory(4 * (a.D + 2 * a.K));
  float* sum = (float*)memory.data;
  float* value = sum + a.D;
  int32_t* index = (int32_t*)(value + a.K);
  const int64_t width = ((a.D + a.slices - 1) / a.slices + 63) / 64 * 64;
  Memory slice(a.pack ? a.F * width * (int64_t)sizeof(T) : 0);
  int64_t packed = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item % a.N, first = item / a.N * width;
    const int64_t columns = min64(width, a.D - first);
    if (columns <= 0) continue;
    const T* W = (const T*)a.W + first;
    if (a.pack && packed != first) {
      pack_columns(W, a.F, a.D, columns, (T*)slice.data);
      packed = first;
    }
    int64_t used = 0;
    for (int64_t k = 0; k < a.K; ++k) {
      const float v = read(a.values, a.value_type, n * a.K + k);
      // A zero is padding: it must not meet a NaN weight.
      if (v != 0) {
        value[used] = v;
        index[used++] = a.indices[n * a.K + k];
      }
    }
    if (a.bias) {
      memcpy(sum, a.bias + first, (size_t)columns * 4);
    } else {
      memset(sum, 0, (size_t)columns * 4);
    }
    if (a.pack) {
      add_indexed<I>(sum, value, index, used, (const T*)slice.data, columns, columns);
    } else {
      add_indexed<I>(sum, value, index, used, W, a.D, columns);
    }
    write_row(sum, columns, a.out_type, a.out, n * a.D + first);
  }
}

template <class I>
void decode_rows(const DecodeArgs& a, int64_t begin, int64_t end) {
  if (a.weight_type == DType::f32) decode_typed<I, float>(a, begin, end);
  if (a.weight_type == DType::bf16) decode_typed<I, bf16>(a, begin, end);
  if (a.weight_type == DType::f16) decode_typed<I, f16>(a, begin, end);
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
