// The activations' side of the certified screen, and the bound that makes it one. The weights' side
// is panel.h.
//
// Products are of activations about a centre, d = x - c, and of weights, both rounded (~): to bf16
// in AMX tiles, or, for the few rows of a decoding step, to int16 and int8. Then
// |<d, w> - <d~, w~>| <= |d - d~| |w| + |d~| |w - w~| (Cauchy-Schwarz), and
// <x, w> = <d, w> + <c, w>, the last by the rescoring dot. Accumulating D products in fp32 adds at most D 2^-24 |d~| |w~|
// whatever the order; the rescoring dot, 32 chains of D / 32, at most (D / 32 + 8) 2^-24 |x| |w|.
// Integer sums over 128 weights are exact (128 * 127 * 32767 < 2^31), so int8 products cost
// (D / 128 + 8) 2^-24 |d~| |w~|. Without tiles, many rows are screened by fp32 products: nothing is
// rounded before them, and there is no centre (product.h).
#pragma once
#include "decode.h"

namespace fastsae {
namespace {

inline int64_t padded_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

constexpr float kHuge = 1e18f;          // larger norms could overflow inside the product
constexpr float kFlushed = 0x1p-125f;  // what flushing a denormal can cost: twice the least normal

// sqrt of a sum of squares, rounded up. The sum was taken in fp32 over n terms of 16 lanes; its
// squares may have underflowed.
inline float norm_above(float squares, int64_t n) {
  const double slack = 1.0 + (double)(n / 16 + 16) * 0x1p-23;
  const double root = __builtin_sqrt((double)squares * slack + (double)n * 0x1p-125);
  const float up = (float)(root * (1.0 + 0x1p-20));
  return up <= kHuge ? up : __builtin_inff();  // NaN becomes infinity: never below a threshold
}

struct RowNorms {
  float whole, error;  // |v|, |v - v~|, each rounded up
};

// Rounds v to bf16 into out[32 s + j] of step s, `stride` elements from one step to the next, with
// zeros up to a whole step, and measures what that changed. A NaN may be rounded to anything: the
// norms become infinite, and nothing is concluded from the product.
template <class I, class T>
inline RowNorms round_row(const T* v, int64_t n, bf16* out, int64_t stride) {
  typename I::Vec whole = I::set1(0), error = whole;
  const typename I::Vec minus = I::set1(-1.0f);
  for (int64_t j = 0; j < (n + 31) / 32 * 32; j += 16) {
    const int rest = (int)max64(0, min64(16, n - j));
    __builtin_prefetch((const char*)(v + j) + 2048);  // rows follow each other
    const typename I::Vec a = rest == 16 ? I::load(v + j) : I::load_n(v + j, rest, 0);
    const typename I::Vec b = I::store_rounded(out + j / 32 * stride + j % 32, a, 16);
    const typename I::Vec d = I::fma(b, minus, a);
    whole = I::fma(a, a, whole);
    error = I::fma(d, d, error);
  }
  return {norm_above(I::sum(whole), n), norm_above(I::sum(error), n)};
}

constexpr int64_t kBytes = 128;  // weights that share a scale
constexpr int64_t kDepth = 128;  // fp32 products that are summed in one chain
constexpr int64_t kPanel = 256;  // features per panel, at most

inline float largest(const float* v, int64_t n) {
  float top = 0;
  for (int64_t j = 0; j < n; ++j) {
    const float a = __builtin_fabsf(v[j]);
    top = a > top ? a : top;
  }
  return top;
}

// q = round(v / scale) for n values, and the squares of what that changed. Scales below 2^-100
// become 0: their quotients could overflow, and nothing is lost but precision of the screen.
template <class Q>
inline float quantise(const float* v, int64_t n, float limit, Q* q, float* error) {
  const float top = largest(v, n);
  const float scale = top / limit < 0x1p-100f ? 0 : top / limit;
  const float inverse = scale > 0 && top < kHuge ? 1 / scale : 0;
  float squares = 0;
  for (int64_t j = 0; j < n; ++j) {
    const float r = v[j] * inverse, rounded = (r + 12582912.0f) - 12582912.0f;
    const float clamped = rounded > limit ? limit : (rounded < -limit ? -limit : rounded);
    q[j] = clamped == clamped ? (Q)(int32_t)clamped : (Q)0;  // NaN: the norms say so
    const float d = v[j] - scale * clamped;
    squares += d * d;
  }
  *error += squares;
  return scale;
}

// Rows of x - b_dec - centre in int16, with the factors of |w| and |w - w~| in the screen's error.
inline void round_words(const CentreArgs& a, int64_t n, const float* about, double far) {
  const int64_t D = a.D, padded = padded_to(D, kBytes);
  float squares = 0, error = 0;
  for (int64_t j = 0; j < D; ++j) squares += about[j] * about[j];
  int16_t* q = a.words + n * padded;
  a.word_scale[n] = quantise(about, D, 32767.0f, q, &error);
  for (int64_t j = D; j < padded; ++j) q[j] = 0;
  // The sums above are one long chain each: count 2^-24 per term.
  const double slack = 1.0 + (double)(D + 16) * 0x1p-23;
  const double whole = __builtin_sqrt((double)squares * slack + (double)D * 0x1p-125);
  // scale * q is rounded where d is taken: 2^-24 of |d|.
  const double lost =
      __builtin_sqrt((double)error * slack + (double)D * 0x1p-125) + 0x1p-23 * whole;
  const double rounded = whole + lost;
  const double screened = 1.04 * (double)(D / kBytes + 8) * 0x1p-24 * rounded;
  const double rescored = (double)(D / 32 + 8) * 0x1p-24 * (whole + 2 * far);
  const double flushed = __builtin_sqrt((double)D) * kFlushed;
  a.bounds[2 * n] =
      (float)((lost + screened + rescored + 0x1p-23 * whole + flushed) * (1.0 + 0x1p-20));
  a.bounds[2 * n + 1] = (float)(rounded * (1.0 + 0x1p-20));
  if (!(whole < (double)kHuge)) a.bounds[2 * n] = __builtin_inff();  // NaN too
}

// The factor of |w| in the error of fp32 products; they round nothing else.
template <class I>
inline void bound_floats(const CentreArgs& a, int64_t n, const float* row) {
  typename I::Vec squares = I::set1(0);
  for (int64_t j = 0; j < a.D; j += 16) {
    const int rest = (int)min64(16, a.D - j);
    const typename I::Vec v = rest == 16 ? I::load(row + j) : I::load_n(row + j, rest, 0);
    squares = I::fma(v, v, squares);
  }
  const double whole = norm_above(I::sum(squares), a.D);
  const double screened = (double)(kDepth + a.D / kDepth + 2) * 0x1p-24;
  const double rescored = (double)(a.D / 32 + 8) * 0x1p-24;
  a.bounds[2 * n] = (float)(1.0001 * (screened + rescored) * whole);
  a.bounds[2 * n + 1] = 0;
}

// Rows [begin, end) of x in fp32, b_dec subtracted; for a screen, also in tiles about the centre,
// with the factors of |w| and |w - w~| in its error.
template <class I>
void centre_rows(const CentreArgs& a, int64_t begin, int64_t end) {
  const int64_t D = a.D, steps = (D + 31) / 32;
  Memory memory(4 * D);
  float* about = (float*)memory.data;
  // Sums of |d~| |w~|: |w~| <= 1.04 |w|, in bf16 as in int8.
  const double screened = 1.04 * ((double)D + 8.0) * 0x1p-24;
  const double rescored = (double)(D / 32 + 8) * 0x1p-24;
  const double flushed = __builtin_sqrt((double)D) * kFlushed;
  for (int64_t n = begin; n < end; ++n) {
    float* row = a.centred + n * a.stride;
    read_row(a.x, a.x_type, n * D, D, row);
    if (a.b_dec) {
      for (int64_t j = 0; j < D; ++j) row[j] -= a.b_dec[j];
    }
    if (a.floats) {
      bound_floats<I>(a, n, row);
      continue;
    }
    if (!a.tiles && !a.words) continue;
    const float* source = row;
    double far = 0;
    if (a.centre) {
      for (int64_t j = 0; j < D; ++j) about[j] = row[j] - a.centre[j];
      source = about;
      far = a.centre_norm;
    }
    if (a.words) {
      round_words(a, n, source, far);
      continue;
    }
    bf16* tile = a.tiles + n / 16 * steps * 512 + n % 16 * 32;
    const RowNorms norms = round_row<I>(source, D, tile, 512);
    // |d~| <= |d| + |d - d~|, |x| <= |d| + |c|; 2^-23 |d| is the rounding of x - c.
    const double rounded = (double)norms.whole + norms.error;
    const double accumulated = screened * rounded + rescored * (norms.whole + 2 * far);
    a.bounds[2 * n] =
        (float)((norms.error + accumulated + 0x1p-23 * norms.whole + flushed) * (1.0 + 0x1p-20));
    a.bounds[2 * n + 1] = (float)(rounded * (1.0 + 0x1p-20));
  }
}

// ε for 16 columns: x_error·|w| + x_norm·|w - w~| + 2^-20·(|h| + |b|) + absolute. The relative term
// covers the fp32 sums made with b.
template <class I>
struct Bound {
  typename I::Vec x_error, x_norm, absolute, relative;

  inline void set(const EncodeArgs& a, int64_t n) {
    x_error = I::set1(a.bounds[2 * n]);
    x_norm = I::set1(a.bounds[2 * n + 1]);
    absolute = I::set1((float)a.D * kFlushed);
    relative = I::set1(0x1p-20f);
  }
  inline typename I::Vec error(typename I::Vec h, typename I::Vec b, typename I::Vec norm,
                               typename I::Vec lost) const {
    const typename I::Vec size = I::add(I::abs(h), I::abs(b));
    const typename I::Vec rounding = I::fma(relative, size, absolute);
    return I::fma(x_error, norm, I::fma(x_norm, lost, rounding));
  }
};

}  // namespace
}  // namespace fastsae
