// Sixteen float lanes as two AVX2 registers (needs avx2, fma, f16c).
#pragma once
#include <immintrin.h>

#include "types.h"

namespace fastsae {

struct Avx2 {
  struct Vec {
    __m256 lo, hi;
  };
  static constexpr bool kTiles = false;
  static constexpr int kBlockW = 2, kBlockX = 1;  // dots at once: 8 of the 16 registers
  static constexpr int kProductX = 6, kProductW = 1;  // rows and vectors of a product: 12 of them

  FASTSAE_INLINE Vec set1(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  FASTSAE_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  FASTSAE_INLINE __m256 widen(const bf16* p) {
    const __m128i half = _mm_loadu_si128((const __m128i*)p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  FASTSAE_INLINE Vec load(const bf16* p) { return {widen(p), widen(p + 8)}; }
  FASTSAE_INLINE Vec load(const f16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
  }
  template <class T>
  FASTSAE_INLINE Vec load_n(const T* p, int n, float fill) {
    float lane[16];
    for (int l = 0; l < 16; ++l) lane[l] = fill;
    for (int l = 0; l < n; ++l) lane[l] = to_float(p[l]);
    return load(lane);
  }
  FASTSAE_INLINE void store(float* p, Vec v) {
    _mm256_storeu_ps(p, v.lo);
    _mm256_storeu_ps(p + 8, v.hi);
  }
  FASTSAE_INLINE void store_n(float* p, Vec v, int n) {
    float lane[16];
    store(lane, v);
    for (int l = 0; l < n; ++l) p[l] = lane[l];
  }
  FASTSAE_INLINE __m256i round_bits(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff));
    return _mm256_srli_epi32(_mm256_add_epi32(half, odd), 16);
  }
  // Rounds to bf16, to nearest even, and returns what was stored. NaN may come out as anything.
  FASTSAE_INLINE Vec store_rounded(bf16* p, Vec v, int n) {
    const __m256i lo = round_bits(v.lo), hi = round_bits(v.hi);
    // packus works within 128-bit halves; the permutation puts the quarters back in order.
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xd8);
    if (n == 16) {
      _mm256_storeu_si256((__m256i*)p, packed);
    } else {
      uint16_t lane[16];
      _mm256_storeu_si256((__m256i*)lane, packed);
      memcpy(p, lane, (size_t)n * 2);
    }
    return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
  }
  FASTSAE_INLINE Vec add(Vec a, Vec b) {
    return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
  }
  FASTSAE_INLINE Vec mul(Vec a, Vec b) {
    return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
  }
  FASTSAE_INLINE Vec div(Vec a, Vec b) {
    return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
  }
  FASTSAE_INLINE Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
  FASTSAE_INLINE Vec fma(Vec a, Vec b, Vec c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
  }
  FASTSAE_INLINE Vec max(Vec a, Vec b) {
    return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
  }
  FASTSAE_INLINE Vec abs(Vec a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
  }
#define FASTSAE_COMPARE(name, predicate)                                            \
  FASTSAE_INLINE uint32_t name(Vec a, Vec b) {                                      \
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, predicate)) |     \
           (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, predicate)) << 8; \
  }
  FASTSAE_COMPARE(ge, _CMP_GE_OQ)
  FASTSAE_COMPARE(gt, _CMP_GT_OQ)
  FASTSAE_COMPARE(eq, _CMP_EQ_OQ)
  FASTSAE_COMPARE(not_lt, _CMP_NLT_UQ)
  FASTSAE_COMPARE(not_le, _CMP_NLE_UQ)
  FASTSAE_COMPARE(unordered, _CMP_UNORD_Q)
#undef FASTSAE_COMPARE
#define FASTSAE_COMPARE_KEY(name, instruction)                                              \
  FASTSAE_INLINE uint32_t name(const int32_t* p, int32_t t) {                               \
    const __m256i lo = _mm256_loadu_si256((const __m256i*)p), limit = _mm256_set1_epi32(t); \
    const __m256i hi = _mm256_loadu_si256((const __m256i*)(p + 8));                         \
    return (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(instruction(lo, limit))) |      \
           (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(instruction(hi, limit))) << 8;  \
  }
  FASTSAE_COMPARE_KEY(gt_key, _mm256_cmpgt_epi32)
  FASTSAE_COMPARE_KEY(eq_key, _mm256_cmpeq_epi32)
#undef FASTSAE_COMPARE_KEY
  FASTSAE_INLINE int compress(int32_t* out, uint32_t mask, int32_t base) {
    int n = 0;
    for (; mask; mask &= mask - 1) out[n++] = base + __builtin_ctz(mask);
    return n;
  }
  FASTSAE_INLINE void compress(float* out, uint32_t mask, Vec v) {
    float lane[16];
    store(lane, v);
    for (; mask; mask &= mask - 1) *out++ = lane[__builtin_ctz(mask)];
  }
  // sum[r] += scale Σ w[j] x[r][j] over 128 columns, 16 partial sums; rows of x are `stride` apart.
  template <int R>
  FASTSAE_INLINE void add_bytes(const int8_t* w, float scale, const int16_t* x, int64_t stride,
                                Vec* sum) {
    const __m256 factor = _mm256_set1_ps(scale);
    for (int r = 0; r < R; ++r) {
      __m256i part[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
      for (int j = 0; j < 8; ++j) {
        const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w + 16 * j)));
        const __m256i v = _mm256_loadu_si256((const __m256i*)(x + r * stride + 16 * j));
        part[j % 2] = _mm256_add_epi32(part[j % 2], _mm256_madd_epi16(wide, v));
      }
      sum[r].lo = _mm256_fmadd_ps(factor, _mm256_cvtepi32_ps(part[0]), sum[r].lo);
      sum[r].hi = _mm256_fmadd_ps(factor, _mm256_cvtepi32_ps(part[1]), sum[r].hi);
    }
  }
  // The lanes of a and b in turn: a0 b0 a1 b1 ...; *low the first sixteen.
  FASTSAE_INLINE Vec zip_eight(__m256 a, __m256 b) {
    const __m256 l = _mm256_unpacklo_ps(a, b), h = _mm256_unpackhi_ps(a, b);
    return {_mm256_permute2f128_ps(l, h, 0x20), _mm256_permute2f128_ps(l, h, 0x31)};
  }
  FASTSAE_INLINE void zip(Vec a, Vec b, Vec* low, Vec* high) {
    *low = zip_eight(a.lo, b.lo);
    *high = zip_eight(a.hi, b.hi);
  }
  FASTSAE_INLINE float sum(Vec v) {
    const __m256 eight = _mm256_add_ps(v.lo, v.hi);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
};

}  // namespace fastsae
