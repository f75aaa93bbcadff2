// Logits of mi_topk on AMX tiles. An fp32 value is the sum of three bf16 (8 + 8 + 8 bits); of the
// nine products of parts the six largest are taken: what is left out is about 2^-24 of the term.
// The values' range is checked by the caller: parts of tiny values would become 0, those of huge
// ones infinite.
#pragma once
#include "mi.h"
#include "screen.h"

namespace fastsae {
namespace {

// Rows [first, first + 16) of x, those from N on zero, into tiles [steps][P][16][32].
template <class I, int P, class T>
inline void split_rows(const T* x, int64_t N, int64_t D, int64_t first, bf16* tiles) {
  const int64_t steps = (D + 31) / 32;
  const typename I::Vec minus = I::set1(-1.0f);
  if (first + 16 > N) memset(tiles, 0, (size_t)(steps * P) * 1024);
  for (int64_t i = 0; i < min64(16, N - first); ++i) {
    const T* row = x + (first + i) * D;
    for (int64_t j = 0; j < steps * 32; j += 16) {
      const int rest = (int)max64(0, min64(16, D - j));
      typename I::Vec left = rest == 16 ? I::load(row + j) : I::load_n(row + j, rest, 0);
      for (int p = 0; p < P; ++p) {
        bf16* out = tiles + (j / 32 * P + p) * 512 + i * 32 + j % 32;
        left = I::fma(I::store_rounded(out, left, 16), minus, left);
      }
    }
  }
}

template <class I, int P>
inline void split_any_rows(const MiSplitArgs& a, int64_t first, bf16* tiles) {
  if (a.type == DType::f32) split_rows<I, P>((const float*)a.x, a.N, a.D, first, tiles);
  if (a.type == DType::bf16) split_rows<I, P>((const bf16*)a.x, a.N, a.D, first, tiles);
  if (a.type == DType::f16) split_rows<I, P>((const f16*)a.x, a.N, a.D, first, tiles);
}

// Blocks of 16 rows [begin, end).
template <class I>
void mi_split(const MiSplitArgs& a, int64_t begin, int64_t end) {
  if constexpr (I::kTiles) {
    const int64_t tiles = (a.D + 31) / 32 * a.parts;
    Memory memory(tiles * 1024);
    for (int64_t b = begin; b < end; ++b) {
      bf16* out = a.tiles + b * tiles * 512;
      bf16* rows = a.columns ? (bf16*)memory.data : out;
      if (a.parts == 1) split_any_rows<I, 1>(a, b * 16, rows);
      if (a.parts == 3) split_any_rows<I, 3>(a, b * 16, rows);
      for (int64_t t = 0; a.columns && t < tiles; ++t) {
        I::transpose_pairs(rows + t * 512, 32, out + t * 512);
      }
    }
  }
}

// Adds `rows` rows of h [rows, kMiWords] to the running column sums of words from v on.
inline void add_columns(const MiProductArgs& a, int64_t v, int64_t rows, const float* h) {
  const int64_t width = min64(kMiWords, a.V - v);
  float before[kMiWords], top[kMiWords], sum[kMiWords] = {0};
  for (int64_t j = 0; j < kMiWords; ++j) {
    before[j] = top[j] = j < width ? a.column_max[v + j] : 0;
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < kMiWords; ++j) {
      const float l = h[i * kMiWords + j] * a.scale;
      top[j] = l > top[j] ? l : top[j];
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < kMiWords; ++j) {
      sum[j] += exp_below_zero(h[i * kMiWords + j] * a.scale - top[j]);
    }
  }
  for (int64_t j = 0; j < width; ++j) {
    const float total = a.column_sum[v + j];
    const float moved = total > 0 ? total * exp_below_zero(before[j] - top[j]) : total;
    a.column_sum[v + j] = moved + sum[j];
    a.column_max[v + j] = top[j];
  }
}

// h [32, 32] of rows `kMiWords` apart: the product of two blocks of 32 rows. A chain of sums rounds
// at every tile product, so it is cut into lengths whose sums are then added up.
template <class I, int P>
inline void product_block(const bf16* x, const bf16* w, int64_t steps, float* h) {
  constexpr int64_t kLength = P == 1 ? 96 : 16;
  const int64_t block = steps * P * 512;
  alignas(64) float part[32 * 32];
  for (int64_t s = 0; s < steps; s += kLength) {
    const int64_t length = min64(kLength, steps - s), at = s * P * 512;
    const bf16 *a = x + at, *b = w + at;
    if (s == 0) {
      I::template multiply_parts<P>(a, a + block, b, b + block, length, h, kMiWords);
      continue;
    }
    I::template multiply_parts<P>(a, a + block, b, b + block, length, part, 32);
    for (int64_t i = 0; i < 32; ++i) {
      for (int64_t j = 0; j < 32; ++j) h[i * kMiWords + j] += part[i * 32 + j];
    }
  }
}

template <class I, int P>
inline void product_blocks(const MiProductArgs& a, int64_t begin, int64_t end) {
  const int64_t steps = (a.D + 31) / 32, block = steps * P * 512;
  alignas(64) float h[32 * kMiWords];
  memset(h, 0, sizeof h);
  for (int64_t v = begin * kMiWords; v < min64(end * kMiWords, a.V); v += kMiWords) {
    const int64_t width = min64(kMiWords, a.V - v);
    for (int64_t n = 0; n < a.n; n += 32) {
      const bf16* x = a.features + n / 16 * block;
      for (int64_t g = 0; g < width; g += 32) {
        product_block<I, P>(x, a.words + (v + g) / 16 * block, steps, h + g);
      }
      const int64_t rows = min64(32, a.n - n);
      if (a.column_max) add_columns(a, v, rows, h);
      for (int64_t i = 0; a.logits && i < rows; ++i) {
        memcpy(a.logits + (n + i) * a.V + v, h + i * kMiWords, (size_t)width * 4);
      }
    }
  }
}

// All features against blocks [begin, end) of kMiWords words.
template <class I>
void mi_product(const MiProductArgs& a, int64_t begin, int64_t end) {
  if constexpr (I::kTiles) {
    I::begin_tiles();
    if (a.parts == 1) product_blocks<I, 1>(a, begin, end);
    if (a.parts == 3) product_blocks<I, 3>(a, begin, end);
    I::end_tiles();
  }
}

}  // namespace
}  // namespace fastsae
