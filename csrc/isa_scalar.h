// Sixteen float lanes in portable C++: what runs where neither AVX2 nor AVX-512 does.
#pragma once
#include "types.h"

namespace fastsae {

struct Scalar {
  struct Vec {
    float lane[16];
  };
  static constexpr bool kTiles = false;
  static constexpr int kBlockW = 1, kBlockX = 1;
  static constexpr int kProductX = 2, kProductW = 1;
#define FASTSAE_LANES for (int l = 0; l < 16; ++l)

  FASTSAE_INLINE Vec set1(float value) {
    Vec v;
    FASTSAE_LANES v.lane[l] = value;
    return v;
  }
  template <class T>
  FASTSAE_INLINE Vec load(const T* p) {
    Vec v;
    FASTSAE_LANES v.lane[l] = to_float(p[l]);
    return v;
  }
  // The first n < 16 lanes; the others hold `fill`.
  template <class T>
  FASTSAE_INLINE Vec load_n(const T* p, int n, float fill) {
    Vec v;
    FASTSAE_LANES v.lane[l] = l < n ? to_float(p[l]) : fill;
    return v;
  }
  FASTSAE_INLINE void store(float* p, Vec v) { FASTSAE_LANES p[l] = v.lane[l]; }
  FASTSAE_INLINE void store_n(float* p, Vec v, int n) {
    for (int l = 0; l < n; ++l) p[l] = v.lane[l];
  }
  // Rounds to bf16, to nearest even, and returns what was stored. NaN may come out as anything.
  FASTSAE_INLINE Vec store_rounded(bf16* p, Vec v, int n) {
    FASTSAE_LANES {
      const uint32_t bits = float_to_bits(v.lane[l]);
      const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
      v.lane[l] = bits_to_float(rounded << 16);
      if (l < n) p[l].bits = (uint16_t)rounded;
    }
    return v;
  }
  FASTSAE_INLINE Vec add(Vec a, Vec b) {
    FASTSAE_LANES a.lane[l] += b.lane[l];
    return a;
  }
  FASTSAE_INLINE Vec mul(Vec a, Vec b) {
    FASTSAE_LANES a.lane[l] *= b.lane[l];
    return a;
  }
  FASTSAE_INLINE Vec div(Vec a, Vec b) {
    FASTSAE_LANES a.lane[l] /= b.lane[l];
    return a;
  }
  FASTSAE_INLINE Vec sqrt(Vec a) {
    FASTSAE_LANES a.lane[l] = __builtin_sqrtf(a.lane[l]);
    return a;
  }
  // a·b + c. Fused only where the machine has the instruction: the libm call would be 50x slower.
  FASTSAE_INLINE Vec fma(Vec a, Vec b, Vec c) {
#ifdef __FP_FAST_FMAF
    FASTSAE_LANES a.lane[l] = __builtin_fmaf(a.lane[l], b.lane[l], c.lane[l]);
#else
    FASTSAE_LANES a.lane[l] = a.lane[l] * b.lane[l] + c.lane[l];
#endif
    return a;
  }
  // The second operand where either is NaN, like maxps.
  FASTSAE_INLINE Vec max(Vec a, Vec b) {
    FASTSAE_LANES a.lane[l] = a.lane[l] > b.lane[l] ? a.lane[l] : b.lane[l];
    return a;
  }
  FASTSAE_INLINE Vec abs(Vec a) {
    FASTSAE_LANES a.lane[l] = __builtin_fabsf(a.lane[l]);
    return a;
  }
#define FASTSAE_COMPARE(name, condition)        \
  FASTSAE_INLINE uint32_t name(Vec a, Vec b) {  \
    uint32_t mask = 0;                          \
    FASTSAE_LANES {                             \
      const float x = a.lane[l], y = b.lane[l]; \
      mask |= (uint32_t)(condition) << l;       \
    }                                           \
    return mask;                                \
  }
  FASTSAE_COMPARE(ge, x >= y)
  FASTSAE_COMPARE(gt, x > y)
  FASTSAE_COMPARE(eq, x == y)
  FASTSAE_COMPARE(not_lt, !(x < y))
  FASTSAE_COMPARE(not_le, !(x <= y))
  FASTSAE_COMPARE(unordered, x != x || y != y)
#undef FASTSAE_COMPARE
  FASTSAE_INLINE uint32_t gt_key(const int32_t* p, int32_t t) {
    uint32_t mask = 0;
    FASTSAE_LANES mask |= (uint32_t)(p[l] > t) << l;
    return mask;
  }
  FASTSAE_INLINE uint32_t eq_key(const int32_t* p, int32_t t) {
    uint32_t mask = 0;
    FASTSAE_LANES mask |= (uint32_t)(p[l] == t) << l;
    return mask;
  }
  // Writes base + l for the set lanes, ascending; may write up to 16 entries. Returns how many
  // count.
  FASTSAE_INLINE int compress(int32_t* out, uint32_t mask, int32_t base) {
    int n = 0;
    for (; mask; mask &= mask - 1) out[n++] = base + __builtin_ctz(mask);
    return n;
  }
  // Writes the set lanes one after the other; may write up to 16.
  FASTSAE_INLINE void compress(float* out, uint32_t mask, Vec v) {
    for (; mask; mask &= mask - 1) *out++ = v.lane[__builtin_ctz(mask)];
  }
  // sum[r] += scale Σ w[j] x[r][j] over 128 columns, 16 partial sums; rows of x are `stride` apart.
  template <int R>
  FASTSAE_INLINE void add_bytes(const int8_t* w, float scale, const int16_t* x, int64_t stride,
                                Vec* sum) {
    for (int r = 0; r < R; ++r) {
      FASTSAE_LANES {
        int32_t part = 0;
        for (int j = l; j < 128; j += 16) part += (int32_t)w[j] * x[r * stride + j];
        sum[r].lane[l] += scale * (float)part;
      }
    }
  }
  // The lanes of a and b in turn: a0 b0 a1 b1 ...; *low the first sixteen.
  FASTSAE_INLINE void zip(Vec a, Vec b, Vec* low, Vec* high) {
    FASTSAE_LANES low->lane[l] = l % 2 ? b.lane[l / 2] : a.lane[l / 2];
    FASTSAE_LANES high->lane[l] = l % 2 ? b.lane[8 + l / 2] : a.lane[8 + l / 2];
  }
  // Fixed tree: 8, 4, 2, 1 apart. The same in every instruction set.
  FASTSAE_INLINE float sum(Vec v) {
    for (int half = 8; half >= 1; half /= 2)
      for (int l = 0; l < half; ++l) v.lane[l] += v.lane[l + half];
    return v.lane[0];
  }
#undef FASTSAE_LANES
};

}  // namespace fastsae
