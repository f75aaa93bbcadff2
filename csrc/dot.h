// The rescoring dot: every value an exact op returns comes from this one summation order, whatever
// the batch, tile, thread count or fallback that asked for it.
#pragma once
#include "types.h"

namespace fastsae {
namespace {

// out[r] = Σ_j x[j]·w[r][j]: 32 partial sums (column j goes to sum j mod 32; the last, incomplete
// sixteen to their own lanes), then the fixed tree of I::sum. R rows share the loads of x; a row's
// value depends neither on R nor on which operand is x.
template <class I, int R, class X, class T>
inline void dot_rows(const X* x, const T* const* w, int64_t D, float* out) {
  typename I::Vec even[R], odd[R];
  for (int r = 0; r < R; ++r) even[r] = odd[r] = I::set1(0.0f);
  int64_t j = 0;
  for (; j + 32 <= D; j += 32) {
    const typename I::Vec x0 = I::load(x + j), x1 = I::load(x + j + 16);
    for (int r = 0; r < R; ++r) {
      even[r] = I::fma(x0, I::load(w[r] + j), even[r]);
      odd[r] = I::fma(x1, I::load(w[r] + j + 16), odd[r]);
    }
  }
  if (j + 16 <= D) {
    const typename I::Vec x0 = I::load(x + j);
    for (int r = 0; r < R; ++r) even[r] = I::fma(x0, I::load(w[r] + j), even[r]);
    j += 16;
  }
  if (j < D) {
    const int rest = (int)(D - j);
    const typename I::Vec x0 = I::load_n(x + j, rest, 0.0f);
    for (int r = 0; r < R; ++r) odd[r] = I::fma(x0, I::load_n(w[r] + j, rest, 0.0f), odd[r]);
  }
  for (int r = 0; r < R; ++r) out[r] = I::sum(I::add(even[r], odd[r]));
}

// out[i] = <x[i], w[i]>: R independent dots, whose loads from distant rows overlap.
template <class I, int R, class T>
inline void dot_pairs(const float* const* x, const T* const* w, int64_t D, float* out) {
  typename I::Vec even[R], odd[R];
  for (int r = 0; r < R; ++r) even[r] = odd[r] = I::set1(0.0f);
  int64_t j = 0;
  for (; j + 32 <= D; j += 32) {
    for (int r = 0; r < R; ++r) {
      even[r] = I::fma(I::load(x[r] + j), I::load(w[r] + j), even[r]);
      odd[r] = I::fma(I::load(x[r] + j + 16), I::load(w[r] + j + 16), odd[r]);
    }
  }
  if (j + 16 <= D) {
    for (int r = 0; r < R; ++r) even[r] = I::fma(I::load(x[r] + j), I::load(w[r] + j), even[r]);
    j += 16;
  }
  if (j < D) {
    const int n = (int)(D - j);
    for (int r = 0; r < R; ++r) {
      odd[r] = I::fma(I::load_n(x[r] + j, n, 0.0f), I::load_n(w[r] + j, n, 0.0f), odd[r]);
    }
  }
  for (int r = 0; r < R; ++r) out[r] = I::sum(I::add(even[r], odd[r]));
}

// out[x * out_stride + w] for kBlockX rows x and kBlockW rows w: dot_rows, but each load serves
// several dots. Rows may repeat, where there are fewer.
template <class I, class T>
inline void dot_block(const float* const* x, const T* const* w, int64_t D, float* out,
                      int64_t out_stride) {
  constexpr int X = I::kBlockX, R = I::kBlockW;
  typename I::Vec even[X][R], odd[X][R], a[X];
  for (int i = 0; i < X; ++i)
    for (int r = 0; r < R; ++r) even[i][r] = odd[i][r] = I::set1(0.0f);
  int64_t j = 0;
  for (; j + 32 <= D; j += 32) {
    for (int i = 0; i < X; ++i) a[i] = I::load(x[i] + j);
    for (int r = 0; r < R; ++r) {
      const typename I::Vec b = I::load(w[r] + j);
      for (int i = 0; i < X; ++i) even[i][r] = I::fma(a[i], b, even[i][r]);
    }
    for (int i = 0; i < X; ++i) a[i] = I::load(x[i] + j + 16);
    for (int r = 0; r < R; ++r) {
      const typename I::Vec b = I::load(w[r] + j + 16);
      for (int i = 0; i < X; ++i) odd[i][r] = I::fma(a[i], b, odd[i][r]);
    }
  }
  if (j + 16 <= D) {
    for (int i = 0; i < X; ++i) a[i] = I::load(x[i] + j);
    for (int r = 0; r < R; ++r) {
      const typename I::Vec b = I::load(w[r] + j);
      for (int i = 0; i < X; ++i) even[i][r] = I::fma(a[i], b, even[i][r]);
    }
    j += 16;
  }
  if (j < D) {
    const int rest = (int)(D - j);
    for (int i = 0; i < X; ++i) a[i] = I::load_n(x[i] + j, rest, 0.0f);
    for (int r = 0; r < R; ++r) {
      const typename I::Vec b = I::load_n(w[r] + j, rest, 0.0f);
      for (int i = 0; i < X; ++i) odd[i][r] = I::fma(a[i], b, odd[i][r]);
    }
  }
  for (int i = 0; i < X; ++i)
    for (int r = 0; r < R; ++r) out[i * out_stride + r] = I::sum(I::add(even[i][r], odd[i][r]));
}

// out[i] = <x, W[index[i]]> for n listed rows.
template <class I, class T>
inline void dot_indexed(const float* x, const T* W, int64_t D, const int32_t* index, int64_t n,
                        float* out) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const T* rows[4];
    for (int r = 0; r < 4; ++r) {
      rows[r] = W + (int64_t)index[i + r] * D;
      // The next four rows are anywhere: start them before this group is done.
      if (i + 4 + r < n) __builtin_prefetch(W + (int64_t)index[i + 4 + r] * D);
    }
    dot_rows<I, 4>(x, rows, D, out + i);
  }
  for (; i < n; ++i) {
    const T* row = W + (int64_t)index[i] * D;
    dot_rows<I, 1>(x, &row, D, out + i);
  }
}

template <class T>
inline void widen_row(const T* in, int64_t n, float* out) {
  for (int64_t j = 0; j < n; ++j) out[j] = to_float(in[j]);
}

}  // namespace
}  // namespace fastsae
