// One optimiser step of a TopK SAE: per feature both weight gradients, Adam, the unit decoder row.
// A gradient row lives in the cache only: [F, D] gradients would cost more traffic than all else.
#pragma once
#include "sparse_outer.h"

namespace fastsae {
namespace {

// Adam on w[0, n) with gradient grad - radial·w; returns Σ w² of the new w.
template <class I>
inline float adam_row(const AdamArgs& a, const float* grad, float radial, float* w, float* m,
                      float* v, int64_t n) {
  using Vec = typename I::Vec;
  const Vec keep_m = I::set1(a.beta1), keep_v = I::set1(a.beta2), minus = I::set1(-radial);
  const Vec new_m = I::set1(1 - a.beta1), new_v = I::set1(1 - a.beta2);
  const Vec root = I::set1(a.root), eps = I::set1(a.eps), step = I::set1(-a.step);
  Vec square = I::set1(0.0f);
  for (int64_t j = 0; j < n; j += 16) {
    const int rest = (int)min64(16, n - j);
    const auto read = [&](const float* p) {
      return rest == 16 ? I::load(p + j) : I::load_n(p + j, rest, 0.0f);
    };
    const auto write = [&](float* p, Vec x) {
      if (rest == 16) {
        I::store(p + j, x);
      } else {
        I::store_n(p + j, x, rest);
      }
    };
    // The next row follows, but prefetchers stop at the page's end, which often is the row's.
    __builtin_prefetch(w + n + j);
    __builtin_prefetch(m + n + j);
    __builtin_prefetch(v + n + j);
    Vec x = read(w);
    const Vec g = I::fma(minus, x, read(grad));
    const Vec first = I::fma(keep_m, read(m), I::mul(new_m, g));
    const Vec second = I::fma(keep_v, read(v), I::mul(new_v, I::mul(g, g)));
    write(m, first);
    write(v, second);
    x = I::fma(step, I::div(first, I::fma(I::sqrt(second), root, eps)), x);
    square = I::fma(x, x, square);
    write(w, x);
  }
  return I::sum(square);
}

template <class I>
inline void scale_row(float* w, float factor, int64_t n) {
  int64_t j = 0;
  for (; j + 16 <= n; j += 16) I::store(w + j, I::mul(I::load(w + j), I::set1(factor)));
  for (; j < n; ++j) w[j] *= factor;
}

template <class I>
void adam_vector(const AdamArgs& a, const float* grad, float* const* state, int64_t n) {
  adam_row<I>(a, grad, 0.0f, state[0], state[1], state[2], n);
}

// slopes = <w, g_n>, then sum += Σ v·g_n: both from one read of the rows of g.
template <class I>
inline void slopes_and_sum(const CodeArgs& a, const float* w, int64_t begin, int64_t end, float* sum,
                           float* partial) {
  constexpr int64_t kTogether = 8;  // rows that stay in the cache between the two
  const float one = 1.0f;
  const float* const partials[1] = {partial};
  for (int64_t i = begin; i < end; i += kSegment) {
    const int64_t stop = min64(end, i + kSegment);
    const bool only = end - begin <= kSegment;
    float* target = only ? sum : partial;
    if (!only) memset(partial, 0, (size_t)a.D * 4);
    for (int64_t e = i; e < stop; e += kTogether) {
      const int64_t count = min64(kTogether, stop - e);
      dot_indexed<I>(w, a.g, a.D, a.rows + e, count, a.slopes + e);
      add_indexed<I>(target, a.values + e, a.rows + e, count, a.g, a.D, a.D);
    }
    if (!only) add_rows<I, 1>(sum, &one, partials, a.D);
  }
}

// Features [begin, end); adds Σ_f db_enc[f]·W_enc[f], by the weights before the step, to `shift`.
template <class I>
void train_features(const TrainArgs& a, float* shift, int64_t begin, int64_t end) {
  const CodeArgs& c = a.code;
  const int64_t D = c.D;
  Memory memory(4 * 3 * D);
  float *dec = (float*)memory.data, *enc = dec + D, *partial = enc + D;
  for (int64_t f = begin; f < end; ++f) {
    const int64_t first = c.offsets[f], count = c.offsets[f + 1] - first;
    const int32_t slot = a.extra_slot ? a.extra_slot[f] : -1;
    float *w_dec = a.W_dec[0] + f * D, *w_enc = a.W_enc[0] + f * D;
    float bias = 0, radial = 0;
    if (slot >= 0) {
      memcpy(dec, a.extra_dec + slot * D, (size_t)D * 4);
      memcpy(enc, a.extra_enc + slot * D, (size_t)D * 4);
      bias = a.extra_bias[slot];
    } else {
      memset(dec, 0, (size_t)D * 4);
      memset(enc, 0, (size_t)D * 4);
    }
    slopes_and_sum<I>(c, w_dec, first, first + count, dec, partial);
    add_entries<I>(enc, partial, c.slopes + first, c.rows + first, count, c.x, D, D);
    bias += sum_entries(c.slopes + first, count);
    if (count || slot >= 0) {
      const float* const other = w_dec;
      dot_rows<I, 1>(dec, &other, D, &radial);
      const float* const row = w_enc;
      add_rows<I, 1>(shift, &bias, &row, D);
    }
    const float square = adam_row<I>(a.adam, dec, radial, w_dec, a.W_dec[1] + f * D,
                                     a.W_dec[2] + f * D, D);
    scale_row<I>(w_dec, 1 / __builtin_sqrtf(square), D);
    adam_row<I>(a.adam, enc, 0.0f, w_enc, a.W_enc[1] + f * D, a.W_enc[2] + f * D, D);
    adam_row<I>(a.adam, &bias, 0.0f, a.b_enc[0] + f, a.b_enc[1] + f, a.b_enc[2] + f, 1);
  }
}

// --- gradients of few features with many entries each -------------------------------------------

constexpr int kVecs = 8;
constexpr int64_t kColumns = 16 * kVecs;  // of one slice: all rows of g fit in L2

// sum = Σ v·slice[rows], in registers; with Dot also slopes += <w, slice[rows]>.
template <class I, bool Dot>
inline void slice_entries(const CodeArgs& a, const float* slice, const float* v, const float* w,
                          int64_t begin, int64_t end, float* sum) {
  using Vec = typename I::Vec;
  Vec weight[kVecs], total[kVecs];
  for (int i = 0; i < kVecs; ++i) {
    if (Dot) weight[i] = I::load(w + 16 * i);
    total[i] = I::set1(0.0f);
  }
  for (int64_t segment = begin; segment < end; segment += kSegment) {
    Vec part[kVecs];
    for (int i = 0; i < kVecs; ++i) part[i] = I::set1(0.0f);
    for (int64_t e = segment; e < min64(end, segment + kSegment); ++e) {
      const float* row = slice + a.rows[e] * kColumns;
      const Vec scale = I::set1(v[e]);
      Vec even = I::set1(0.0f), odd = even;
      for (int i = 0; i < kVecs; i += 2) {
        const Vec x0 = I::load(row + 16 * i), x1 = I::load(row + 16 * i + 16);
        part[i] = I::fma(scale, x0, part[i]);
        part[i + 1] = I::fma(scale, x1, part[i + 1]);
        if (Dot) {
          even = I::fma(weight[i], x0, even);
          odd = I::fma(weight[i + 1], x1, odd);
        }
      }
      if (Dot) a.slopes[e] += I::sum(I::add(even, odd));
    }
    for (int i = 0; i < kVecs; ++i) total[i] = I::add(total[i], part[i]);
  }
  for (int i = 0; i < kVecs; ++i) I::store(sum + 16 * i, total[i]);
}

// The last slice is filled up with zeros, which change nothing.
template <class I, bool Dot>
inline void all_slices(const CodeArgs& a, const float* matrix, const float* v, const float* W,
                       float* out, int64_t begin, int64_t end) {
  Memory memory(4 * a.N * kColumns);
  float* slice = (float*)memory.data;
  float weights[kColumns], sum[kColumns];
  for (int64_t j = 0; j < a.D; j += kColumns) {
    const int64_t n = min64(kColumns, a.D - j);
    if (n < kColumns) memset(slice, 0, (size_t)(a.N * kColumns) * 4);
    for (int64_t r = 0; r < a.N; ++r) {
      memcpy(slice + r * kColumns, matrix + r * a.D + j, (size_t)n * 4);
    }
    memset(weights, 0, sizeof weights);
    for (int64_t f = begin; f < end; ++f) {
      if (Dot) memcpy(weights, W + f * a.D + j, (size_t)n * 4);
      slice_entries<I, Dot>(a, slice, v, weights, a.offsets[f], a.offsets[f + 1], sum);
      memcpy(out + f * a.D + j, sum, (size_t)n * 4);
    }
  }
}

template <class I>
void code_gradients(const CodeGradientArgs& a, int64_t begin, int64_t end) {
  const CodeArgs& c = a.code;
  all_slices<I, true>(c, c.g, c.values, a.W, a.dW_dec, begin, end);
  all_slices<I, false>(c, c.x, c.slopes, nullptr, a.dW_enc, begin, end);
  for (int64_t f = begin; f < end; ++f) {
    a.db_enc[f] = sum_entries(c.slopes + c.offsets[f], c.offsets[f + 1] - c.offsets[f]);
  }
}

}  // namespace
}  // namespace fastsae
