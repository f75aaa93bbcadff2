// Scores between features and words from chunks of logits: column sums first, then score and
// select.
#pragma once
#include "topk.h"

namespace fastsae {
namespace {

// e^x for x <= 0, about 1 ulp: 2^n times a polynomial on [-ln2/2, ln2/2]. Loops over it vectorise.
// Below -87 the result is 0; NaN stays.
FASTSAE_INLINE float exp_below_zero(float x) {
  const float scaled = x * 1.44269504f;
  const float n = (scaled + 12582912.0f) - 12582912.0f;  // round to nearest
  float f = x - n * 0.693359375f;
  f = f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  const float small = x < -87.0f ? 0.0f : p;
  const int32_t exponent = x < -87.0f ? 0 : (int32_t)n;
  return small * bits_to_float((uint32_t)(exponent + 127) << 23);
}

// Columns [begin, end) of one chunk: running maximum and sum over features, rows in ascending
// order.
template <class I>
void mi_columns(const MiArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kWidth = 256;
  for (int64_t v = begin; v < end; v += kWidth) {
    const int64_t width = min64(kWidth, end - v);
    float top[kWidth], sum[kWidth];
    for (int64_t j = 0; j < width; ++j) {
      top[j] = a.column_max[v + j];
      sum[j] = 0;
    }
    for (int64_t n = 0; n < a.n; ++n) {
      const float* row = a.logits + n * a.V + v;
      for (int64_t j = 0; j < width; ++j) {
        const float l = row[j] * a.scale;
        top[j] = l > top[j] ? l : top[j];
      }
    }
    for (int64_t n = 0; n < a.n; ++n) {
      const float* row = a.logits + n * a.V + v;
      for (int64_t j = 0; j < width; ++j) sum[j] += exp_below_zero(row[j] * a.scale - top[j]);
    }
    for (int64_t j = 0; j < width; ++j) {
      const float before = a.column_sum[v + j];
      const float moved =
          before > 0 ? before * exp_below_zero(a.column_max[v + j] - top[j]) : before;
      a.column_sum[v + j] = moved + sum[j];
      a.column_max[v + j] = top[j];
    }
  }
}

template <class I>
inline float row_maximum(const float* row, int64_t n, float scale) {
  typename I::Vec best = I::set1(-__builtin_inff());
  const typename I::Vec factor = I::set1(scale);
  for (int64_t j = 0; j < n; j += 16) {
    const int rest = (int)min64(16, n - j);
    const typename I::Vec v = rest == 16 ? I::load(row + j) : I::load_n(row + j, rest, row[0]);
    best = I::max(I::mul(v, factor), best);
  }
  float lane[16], top = -__builtin_inff();
  I::store(lane, best);
  for (int l = 0; l < 16; ++l) top = lane[l] > top ? lane[l] : top;
  return top;
}

// score[v] of one row, see fastsae/ops/mi.py.
template <class I>
inline void score_row(const MiArgs& a, const float* row, float* score) {
  for (int64_t v = 0; v < a.V; ++v) score[v] = row[v] * a.scale - a.column_lse[v];
  if (a.objective == Objective::pmi) return;
  const float top = row_maximum<I>(row, a.V, a.scale);
  const float prior = a.objective == Objective::mi ? a.log_features : 0.0f;
  float partial[64] = {0};
  int64_t v = 0;
  for (; v + 64 <= a.V; v += 64) {
    for (int j = 0; j < 64; ++j) {
      const float p = exp_below_zero(row[v + j] * a.scale - top);
      partial[j] += p;
      score[v + j] = p * (score[v + j] + prior);
    }
  }
  for (int j = 0; v < a.V; ++v, ++j) {
    const float p = exp_below_zero(row[v] * a.scale - top);
    partial[j] += p;
    score[v] = p * (score[v] + prior);
  }
  float total = 0;
  for (int j = 0; j < 64; ++j) total += partial[j];
  const float inverse = 1.0f / total;
  for (v = 0; v < a.V; ++v) score[v] *= inverse;
}

template <class I>
void mi_rows(const MiArgs& a, int64_t begin, int64_t end) {
  Memory memory(select_bytes(a.V) + 4 * a.V);
  const SelectScratch s = select_scratch(memory.data, a.V);
  float* score = (float*)(memory.data + select_bytes(a.V));
  for (int64_t n = begin; n < end; ++n) {
    const float* row = a.logits + n * a.V;
    const float* ranked = row;
    if (a.objective != Objective::logit) {
      score_row<I>(a, row, score);
      ranked = score;
    }
    select_topk<I>(ranked, a.V, a.top, s);
    for (int64_t i = 0; i < a.top; ++i) {
      a.indices[n * a.top + i] = s.greater[i];
      a.scores[n * a.top + i] = ranked[s.greater[i]];
    }
  }
}

}  // namespace
}  // namespace fastsae
