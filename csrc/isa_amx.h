// AVX-512 with AMX tiles for products of bf16 matrices (needs amx-tile, amx-bf16, avx512bf16, and
// the operating system's permission, see cpu.cpp).
#pragma once
#include "isa_avx512.h"

namespace fastsae {

struct Amx : Avx512 {
  static constexpr bool kTiles = true;

  // As Avx512, by one instruction; denormals become 0.
  FASTSAE_INLINE Vec store_rounded(bf16* p, Vec v, int n) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(v);
    _mm256_mask_storeu_epi16(p, first(n), rounded);
    return widen(rounded);
  }

  // As Avx512, with products and their sums in one instruction.
  template <int R>
  FASTSAE_INLINE void add_bytes(const int8_t* w, float scale, const int16_t* x, int64_t stride,
                                Vec* sum) {
    __m512i wide[4];
    for (int j = 0; j < 4; ++j) {
      wide[j] = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(w + 32 * j)));
    }
    const Vec factor = _mm512_set1_ps(scale);
    for (int r = 0; r < R; ++r) {
      __m512i part = _mm512_setzero_si512();
      for (int j = 0; j < 4; ++j) {
        const __m512i v = _mm512_loadu_si512(x + r * stride + 32 * j);
        part = _mm512_dpwssd_epi32(part, wide[j], v);
      }
      sum[r] = _mm512_fmadd_ps(factor, _mm512_cvtepi32_ps(part), sum[r]);
    }
  }

  // A tile is 16 rows of 64 bytes. All eight are configured that way between begin and end.
  FASTSAE_INLINE void begin_tiles() {
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = 16;
    }
    _tile_loadconfig(&config);
  }
  FASTSAE_INLINE void end_tiles() { _tile_release(); }

  // c [32, 32] = A Bᵀ from tiles of 16 x 32 (A) and of 16 pairs x 16 columns (B), `steps` of them
  // each one after the other in memory; a1 and b1 are the lower rows of A and the right columns.
  // `more`: added to what c holds. In every step, `lines` cache lines from `fetch` on come into L2.
  FASTSAE_INLINE void multiply_tiles(const bf16* a0, const bf16* a1, const bf16* b0, const bf16* b1,
                                     int64_t steps, float* c, int64_t stride, bool more,
                                     const char* fetch, int64_t lines) {
    if (more) {
      _tile_loadd(0, c, stride * 4);
      _tile_loadd(1, c + 16, stride * 4);
      _tile_loadd(2, c + 16 * stride, stride * 4);
      _tile_loadd(3, c + 16 * stride + 16, stride * 4);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t s = 0; s < steps; ++s) {
      for (int64_t l = 0; l < lines; ++l, fetch += 64) _mm_prefetch(fetch, _MM_HINT_T1);
      _tile_loadd(4, a0 + s * 512, 64);
      _tile_loadd(6, b0 + s * 512, 64);
      _tile_loadd(5, a1 + s * 512, 64);
      _tile_loadd(7, b1 + s * 512, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, stride * 4);
    _tile_stored(1, c + 16, stride * 4);
    _tile_stored(2, c + 16 * stride, stride * 4);
    _tile_stored(3, c + 16 * stride + 16, stride * 4);
  }

  // multiply_tiles for operands in P parts of falling size (hi + mid + lo), which lie tile beside
  // tile in every step. Of three parts, the three smallest of nine products are left out.
  template <int P>
  FASTSAE_INLINE void multiply_parts(const bf16* a0, const bf16* a1, const bf16* b0, const bf16* b1,
                                     int64_t steps, float* c, int64_t stride) {
    static_assert(P == 1 || P == 3);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    // Part by part along a path on which two products in a row share a part.
    constexpr int kA[6] = {2, 1, 1, 0, 0, 0}, kB[6] = {0, 0, 1, 1, 2, 0}, first = P == 1 ? 5 : 0;
    for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 6
      for (int i = first; i < 6; ++i) {
        if (i == first || kA[i] != kA[i - 1]) {
          _tile_loadd(4, a0 + kA[i] * 512, 64);
          _tile_loadd(5, a1 + kA[i] * 512, 64);
        }
        if (i == first || kB[i] != kB[i - 1]) {
          _tile_loadd(6, b0 + kB[i] * 512, 64);
          _tile_loadd(7, b1 + kB[i] * 512, 64);
        }
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      a0 += P * 512;
      a1 += P * 512;
      b0 += P * 512;
      b1 += P * 512;
    }
    _tile_stored(0, c, stride * 4);
    _tile_stored(1, c + 16, stride * 4);
    _tile_stored(2, c + 16 * stride, stride * 4);
    _tile_stored(3, c + 16 * stride + 16, stride * 4);
  }

  // out[i][j] = in[j][i] for 16 x 16 pairs of bf16; rows of `in` are `stride` elements apart.
  FASTSAE_INLINE void transpose_pairs(const bf16* in, int64_t stride, bf16* out) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(in + i * stride);
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // a[4q + c] holds column c + 4l of rows 4q..4q+3 in its 128-bit lane l.
    for (int c = 0; c < 4; ++c) {
      b[c] = _mm512_shuffle_i32x4(a[c], a[c + 4], 0x88);
      b[c + 4] = _mm512_shuffle_i32x4(a[c], a[c + 4], 0xdd);
      b[c + 8] = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0x88);
      b[c + 12] = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0xdd);
    }
    for (int c = 0; c < 4; ++c) {
      _mm512_storeu_si512(out + c * 32, _mm512_shuffle_i32x4(b[c], b[c + 8], 0x88));
      _mm512_storeu_si512(out + (c + 8) * 32, _mm512_shuffle_i32x4(b[c], b[c + 8], 0xdd));
      _mm512_storeu_si512(out + (c + 4) * 32, _mm512_shuffle_i32x4(b[c + 4], b[c + 12], 0x88));
      _mm512_storeu_si512(out + (c + 12) * 32, _mm512_shuffle_i32x4(b[c + 4], b[c + 12], 0xdd));
    }
  }
};

}  // namespace fastsae
