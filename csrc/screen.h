// Operands of the certified screen: x and W rounded to bf16, and the norms that bound what it
// costs.
//
// With ~ for rounding to bf16, |<x, w> - <x~, w~>| <= |x - x~| |w| + |x~| |w - w~|
// (Cauchy-Schwarz). The bound holds as well when the product was computed from unrounded operands,
// in TF32 or in fp32, so no process-wide precision flag can void it. Accumulating D products in
// fp32 adds at most D 2^-24 |x~| |w~|, the rescoring dot less than that again.
#pragma once
#include "decode.h"

namespace fastsae {
namespace {

constexpr float kHuge = 1e18f;          // larger norms could overflow inside the product
constexpr float kSmallest = 0x1p-125f;  // twice the least normal: what flushing a denormal can cost

// sqrt of a sum of squares, rounded up. The sum was taken in fp32 over n terms of 16 lanes; its
// squares may have underflowed.
inline float norm_above(float squares, int64_t n) {
  const double slack = 1.0 + (double)(n / 16 + 16) * 0x1p-23;
  const double root = __builtin_sqrt((double)squares * slack + (double)n * 0x1p-125);
  const float up = (float)(root * (1.0 + 0x1p-20));
  return up <= kHuge ? up : __builtin_inff();  // NaN becomes infinity: never below a threshold
}

struct RowNorms {
  float whole, rounded, error;  // |v|, |v~|, |v - v~|, each rounded up
};

// Rounds v to bf16 into `out` and measures what that changed. A NaN may be rounded to anything: the
// norms become infinite, and nothing is concluded from the product.
template <class I>
inline RowNorms round_row(const float* v, int64_t n, bf16* out) {
  typename I::Vec whole = I::set1(0), rounded = whole, error = whole;
  const typename I::Vec minus = I::set1(-1.0f);
  for (int64_t j = 0; j < n; j += 16) {
    const int rest = (int)min64(16, n - j);
    const typename I::Vec a = rest == 16 ? I::load(v + j) : I::load_n(v + j, rest, 0);
    const typename I::Vec b = I::store_rounded(out + j, a, rest);
    const typename I::Vec d = I::fma(b, minus, a);
    whole = I::fma(a, a, whole);
    rounded = I::fma(b, b, rounded);
    error = I::fma(d, d, error);
  }
  return {norm_above(I::sum(whole), n), norm_above(I::sum(rounded), n),
          norm_above(I::sum(error), n)};
}

template <class I>
void centre_rows(const CentreArgs& a, int64_t begin, int64_t end) {
  Memory memory(2 * a.D);
  // The accumulation of both dots, in units of |x| |w|; 1.2 covers |x~| and |w~| for |x| and |w|.
  const double accumulation = (1.2 * (double)a.D + 64.0) * 0x1p-24;
  const double flushed = __builtin_sqrt((double)a.D) * kSmallest;
  for (int64_t n = begin; n < end; ++n) {
    float* row = a.centred + n * a.D;
    read_row(a.x, a.x_type, n * a.D, a.D, row);
    if (a.b_dec) {
      for (int64_t j = 0; j < a.D; ++j) row[j] -= a.b_dec[j];
    }
    const RowNorms norms =
        round_row<I>(row, a.D, a.screen ? a.screen + n * a.D : (bf16*)memory.data);
    a.bounds[2 * n] =
        (float)((norms.error + accumulation * norms.whole + flushed) * (1.0 + 0x1p-20));
    a.bounds[2 * n + 1] = norms.rounded;
  }
}

template <class I>
void weight_rows(const WeightArgs& a, int64_t begin, int64_t end) {
  Memory memory(6 * a.D + 64);
  float* wide = (float*)memory.data;
  bf16* rounded = (bf16*)(wide + a.D);
  const float flushed = (float)(__builtin_sqrt((double)a.D) * kSmallest);
  for (int64_t f = begin; f < end; ++f) {
    const float* row = wide;
    if (a.weight_type == DType::f32) {
      row = (const float*)a.W + f * a.D;
    } else {
      read_row(a.W, a.weight_type, f * a.D, a.D, wide);
    }
    const RowNorms norms = round_row<I>(row, a.D, a.screen ? a.screen + f * a.D : rounded);
    a.norms[f] = norms.whole;
    a.errors[f] = norms.error + flushed;
  }
}

}  // namespace
}  // namespace fastsae
