// The weights' side of the screen: panels of features rounded as they come, or read from a copy of
// the weights that was made for the purpose.
#pragma once
#include "product.h"

namespace fastsae {
namespace {

// What the scan of one panel reads beside the products.
struct Panel {
  bf16* tiles;                           // [kPanel / 16][steps][16 pairs][16 columns][2]
  float *norms, *errors, *products;      // [kPanel]: |w|, |w - w~|, <centre, w>
  float *bias, *threshold;               // [kPanel]: b_enc + <centre, w>, θ
  bf16* rounded;                         // [16][32 * steps] rows on their way into tiles
  float* packed;                         // of product.h, where there are no tiles
  const char* fetch;                     // what of the next panel comes into L2 next, and
  int64_t lines;                         // how many cache lines in a step of a product
  float* h;                              // [kScanRows + a block of dots][kPanel] products
};

// Rounds 16 weight rows from `first` on into tiles; those from `end` on are zero.
template <class I, class T>
inline void round_rows(const T* W, int64_t D, int64_t first, int64_t end, const float* centre,
                       bf16* rounded, bf16* tiles, float* norms, float* errors, float* products) {
  const int64_t steps = (D + 31) / 32;
  const float flushed = (float)(__builtin_sqrt((double)D) * kFlushed);
  for (int64_t i = 0; i < 16; ++i) {
    bf16* out = rounded + i * steps * 32;
    if (first + i >= end) {
      memset(out, 0, (size_t)steps * 64);
      continue;
    }
    const T* row = W + (first + i) * D;
    const RowNorms n = round_row<I>(row, D, out, 32);
    norms[i] = n.whole;
    errors[i] = n.error + flushed;
    products[i] = 0;
    if (centre) dot_rows<I, 1>(centre, &row, D, products + i);
  }
  for (int64_t s = 0; s < steps; ++s) {
    I::transpose_pairs(rounded + s * 32, steps * 32, tiles + s * 512);
  }
}

template <class I>
inline void round_rows_any(const void* W, DType type, int64_t D, int64_t first, int64_t end,
                           const float* centre, bf16* rounded, bf16* tiles, float* norms,
                           float* errors, float* products) {
  if (type == DType::f32) {
    round_rows<I>((const float*)W, D, first, end, centre, rounded, tiles, norms, errors, products);
  } else if (type == DType::bf16) {
    round_rows<I>((const bf16*)W, D, first, end, centre, rounded, tiles, norms, errors, products);
  } else {
    round_rows<I>((const f16*)W, D, first, end, centre, rounded, tiles, norms, errors, products);
  }
}

// The panel of features [first, first + width) in tiles: rounded now, or from the copy.
template <class I>
inline void load_panel(const EncodeArgs& a, int64_t first, int64_t width, Panel* p) {
  const int64_t steps = (a.D + 31) / 32;
  if (a.weight_tiles) {
    p->tiles = (bf16*)a.weight_tiles + first * steps * 32;
    p->fetch = (const char*)(p->tiles + a.panel * steps * 32);
    return;
  }
  for (int64_t g = 0; g < padded_to(width, 32); g += 16) {
    round_rows_any<I>(a.W, a.weight_type, a.D, first + g, first + width, a.centre, p->rounded,
                      p->tiles + g * steps * 32, p->norms + g, p->errors + g, p->products + g);
  }
}

template <class I>
inline void pack_any_panel(const EncodeArgs& a, int64_t first, int64_t width, Panel* p) {
  if (a.weight_type == DType::f32) {
    pack_panel<I>((const float*)a.W, a.D, first, width, p->packed, p->norms);
  } else if (a.weight_type == DType::bf16) {
    pack_panel<I>((const bf16*)a.W, a.D, first, width, p->packed, p->norms);
  } else {
    pack_panel<I>((const f16*)a.W, a.D, first, width, p->packed, p->norms);
  }
}

// Weight rows [begin, end) as the screen reads them, see CopyArgs.
template <class I>
inline void byte_rows(const CopyArgs& a, int64_t begin, int64_t end) {
  Memory memory(4 * padded_to(a.D, kBytes));
  float* wide = (float*)memory.data;
  const int64_t D = a.D, blocks = padded_to(D, kBytes) / kBytes;
  const float flushed = (float)(__builtin_sqrt((double)D) * kFlushed);
  for (int64_t f = begin; f < end; ++f) {
    read_row(a.W, a.weight_type, f * D, D, wide);
    for (int64_t j = D; j < blocks * kBytes; ++j) wide[j] = 0;
    float error = 0, squares = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const float* v = wide + b * kBytes;
      float part = 0, lost = 0;
      for (int64_t j = 0; j < kBytes; ++j) part += v[j] * v[j];
      a.scales[f * blocks + b] =
          quantise(v, kBytes, 127.0f, a.bytes + (f * blocks + b) * kBytes, &lost);
      squares += part;
      error += lost;
    }
    const double slack = 1.0 + (double)(blocks + kBytes + 16) * 0x1p-23;
    const double whole = __builtin_sqrt((double)squares * slack + (double)D * 0x1p-125);
    const double lost = __builtin_sqrt((double)error * slack + (double)D * 0x1p-125);
    const bool bounded = whole < (double)kHuge;  // not NaN either
    a.norms[f] = bounded ? (float)(whole * (1.0 + 0x1p-20)) : __builtin_inff();
    a.errors[f] =
        bounded ? (float)((lost + 0x1p-23 * whole) * (1.0 + 0x1p-20)) + flushed : __builtin_inff();
    const float* rows[1] = {wide};
    dot_rows<I, 1>(a.centre, rows, D, a.products + f);
  }
}

// Weight rows [begin, end), begin a multiple of 16, as screens read them.
template <class I>
void copy_rows(const CopyArgs& a, int64_t begin, int64_t end) {
  if (a.bytes) {
    byte_rows<I>(a, begin, min64(end, a.F));
    return;
  }
  if constexpr (I::kTiles) {
    const int64_t steps = (a.D + 31) / 32;
    Memory memory(16 * steps * 64);
    for (int64_t f = begin; f < end; f += 16) {
      round_rows_any<I>(a.W, a.weight_type, a.D, f, a.F, a.centre, (bf16*)memory.data,
                        a.tiles + f * steps * 32, a.norms + f, a.errors + f, a.products + f);
    }
  }
}

// Weights are read once, from memory: kStreams rows side by side, each fetched kAheadBytes ahead,
// since one stream does not fill the memory's pipe.
constexpr int64_t kAheadBytes = 4096, kStreams = 4;

// <d~, w~> of S weight rows, `apart` features from each other, and X rows of x, `rows` of which
// exist.
template <class I, int X, int S>
inline void byte_dots(const EncodeArgs& a, int64_t n, int64_t rows, int64_t feature, int64_t apart,
                      bool fetch, float* h) {
  const int64_t padded = padded_to(a.D, kBytes), blocks = padded / kBytes;
  const int8_t* w = a.bytes + feature * padded;
  const float* scales = a.scales + feature * blocks;
  const int16_t* x = a.words + n * padded;
  typename I::Vec sum[S][X];
  for (int s = 0; s < S; ++s)
    for (int r = 0; r < X; ++r) sum[s][r] = I::set1(0);
  for (int64_t b = 0; b < blocks; ++b) {
    for (int s = 0; s < S; ++s) {
      const int8_t* at = w + s * apart * padded + b * kBytes;
      if (fetch) {
        __builtin_prefetch(at + kAheadBytes);
        __builtin_prefetch(at + kAheadBytes + 64);
      }
      I::template add_bytes<X>(at, scales[s * apart * blocks + b], x + b * kBytes, padded, sum[s]);
    }
  }
  for (int s = 0; s < S; ++s) {
    for (int64_t r = 0; r < min64(X, rows); ++r) {
      h[r * kPanel + s * apart] = I::sum(sum[s][r]) * a.word_scale[n + r];
    }
  }
}

template <class I, int S>
inline void byte_rows_of(const EncodeArgs& a, int64_t n, int64_t rows, int64_t feature,
                         int64_t apart, float* h) {
  constexpr int64_t X = 4;
  for (int64_t i = 0; i < rows; i += X) {
    float* out = h + i * kPanel;
    // Missing rows of a block are whatever follows: words has room for three more.
    if (rows - i == 1) {
      byte_dots<I, 1, S>(a, n + i, 1, feature, apart, i == 0, out);
    } else if (rows - i == 2) {
      byte_dots<I, 2, S>(a, n + i, 2, feature, apart, i == 0, out);
    } else {
      byte_dots<I, X, S>(a, n + i, rows - i, feature, apart, i == 0, out);
    }
  }
}

// h [rows, kPanel] = <d~, w~>; rows share the weights' expansion.
template <class I>
inline void byte_panel(const EncodeArgs& a, int64_t n, int64_t rows, int64_t first, int64_t width,
                       float* h) {
  // Sixteen registers (all but AVX-512) hold the sums of several weight rows for one row of x only.
  const int64_t apart = rows == 1 || I::kBlockX > 1 ? width / kStreams : 0;
  for (int64_t f = 0; f < apart; ++f) {
    byte_rows_of<I, kStreams>(a, n, rows, first + f, apart, h + f);
  }
  for (int64_t f = apart * kStreams; f < width; ++f) {
    byte_rows_of<I, 1>(a, n, rows, first + f, 0, h + f);
  }
}

}  // namespace
}  // namespace fastsae
