// Sixteen float lanes as one AVX-512 register (needs avx512f, bw, dq, vl).
#pragma once
#include <immintrin.h>

#include "types.h"

namespace fastsae {

struct Avx512 {
  using Vec = __m512;
  static constexpr bool kTiles = false;
  static constexpr int kBlockW = 4, kBlockX = 3;  // dots at once: 24 of the 32 registers
  static constexpr int kProductX = 12, kProductW = 2;  // rows and vectors of a product, as many

  FASTSAE_INLINE __mmask16 first(int n) { return (__mmask16)((1u << n) - 1); }
  FASTSAE_INLINE Vec set1(float value) { return _mm512_set1_ps(value); }
  FASTSAE_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
  FASTSAE_INLINE Vec widen(__m256i half) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  FASTSAE_INLINE Vec load(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
  FASTSAE_INLINE Vec load(const f16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  }
  FASTSAE_INLINE Vec fill_rest(Vec v, int n, float fill) {
    return _mm512_mask_mov_ps(_mm512_set1_ps(fill), first(n), v);
  }
  FASTSAE_INLINE Vec load_n(const float* p, int n, float fill) {
    return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), first(n), p);
  }
  FASTSAE_INLINE Vec load_n(const bf16* p, int n, float fill) {
    return fill_rest(widen(_mm256_maskz_loadu_epi16(first(n), p)), n, fill);
  }
  FASTSAE_INLINE Vec load_n(const f16* p, int n, float fill) {
    return fill_rest(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)), n, fill);
  }
  FASTSAE_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  FASTSAE_INLINE void store_n(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
  // Rounds to bf16, to nearest even, and returns what was stored. NaN may come out as anything.
  FASTSAE_INLINE Vec store_rounded(bf16* p, Vec v, int n) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(half, odd), 16);
    _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtepi32_epi16(rounded));
    return _mm512_castsi512_ps(_mm512_slli_epi32(rounded, 16));
  }
  FASTSAE_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  FASTSAE_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  FASTSAE_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  FASTSAE_INLINE Vec sqrt(Vec a) { return _mm512_sqrt_ps(a); }
  FASTSAE_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  FASTSAE_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  FASTSAE_INLINE Vec abs(Vec a) { return _mm512_abs_ps(a); }
  FASTSAE_INLINE uint32_t ge(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  FASTSAE_INLINE uint32_t gt(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  FASTSAE_INLINE uint32_t eq(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  FASTSAE_INLINE uint32_t not_lt(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
  FASTSAE_INLINE uint32_t not_le(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
  FASTSAE_INLINE uint32_t unordered(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
  FASTSAE_INLINE uint32_t gt_key(const int32_t* p, int32_t t) {
    return _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(t));
  }
  FASTSAE_INLINE uint32_t eq_key(const int32_t* p, int32_t t) {
    return _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(t));
  }
  // Through a register: compressing straight to memory is microcoded on Zen 4.
  FASTSAE_INLINE int compress(int32_t* out, uint32_t mask, int32_t base) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i index = _mm512_add_epi32(lanes, _mm512_set1_epi32(base));
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32((__mmask16)mask, index));
    return __builtin_popcount(mask);
  }
  // Writes the set lanes one after the other; may write up to 16.
  FASTSAE_INLINE void compress(float* out, uint32_t mask, Vec v) {
    store(out, _mm512_maskz_compress_ps((__mmask16)mask, v));
  }
  // sum[r] += scale Σ w[j] x[r][j] over 128 columns, 16 partial sums; rows of x are `stride` apart.
  template <int R>
  FASTSAE_INLINE void add_bytes(const int8_t* w, float scale, const int16_t* x, int64_t stride,
                                Vec* sum) {
    __m512i wide[4];
    for (int j = 0; j < 4; ++j) {
      wide[j] = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(w + 32 * j)));
    }
    const Vec factor = _mm512_set1_ps(scale);
    for (int r = 0; r < R; ++r) {
      __m512i part[4];
      for (int j = 0; j < 4; ++j) {
        part[j] = _mm512_madd_epi16(wide[j], _mm512_loadu_si512(x + r * stride + 32 * j));
      }
      const __m512i low = _mm512_add_epi32(part[0], part[1]);
      const __m512i high = _mm512_add_epi32(part[2], part[3]);
      sum[r] = _mm512_fmadd_ps(factor, _mm512_cvtepi32_ps(_mm512_add_epi32(low, high)), sum[r]);
    }
  }
  // The lanes of a and b in turn: a0 b0 a1 b1 ...; *low the first sixteen.
  FASTSAE_INLINE void zip(Vec a, Vec b, Vec* low, Vec* high) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    *low = _mm512_permutex2var_ps(a, first, b);
    *high = _mm512_permutex2var_ps(a, second, b);
  }
  FASTSAE_INLINE float sum(Vec v) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
};

}  // namespace fastsae
