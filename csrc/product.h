// The screen of processors without AMX: fp32 products of panels of weights, one feature per lane.
//
// A panel is stored by depth, so that a vector of weights meets one value of x and no sum crosses
// lanes. Sums over kDepth products are added up, so a product is within (kDepth + D / kDepth + 2)
// 2^-24 |x| |w| of <x, w>: a screen with an error so small that few dots are left.
#pragma once
#include "screen.h"

namespace fastsae {
namespace {

// 16 x 16: row i of v becomes lane i. Zipping rows i and i + 8 four times is a perfect shuffle each.
template <class I>
inline void transpose(typename I::Vec* v) {
  typename I::Vec t[16];
#pragma GCC unroll 2
  for (int round = 0; round < 2; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) I::zip(v[i], v[i + 8], t + 2 * i, t + 2 * i + 1);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) I::zip(t[i], t[i + 8], v + 2 * i, v + 2 * i + 1);
  }
}

// Weight rows [first, first + width), zeros up to a block, as
// [block of 16 kProductW features][D][feature], and their norms, rounded up.
template <class I, class T>
inline void pack_panel(const T* W, int64_t D, int64_t first, int64_t width, float* packed,
                       float* norms) {
  constexpr int64_t kBlock = 16 * I::kProductW;
  for (int64_t g = 0; g < padded_to(width, kBlock); g += 16) {
    float* out = packed + g / kBlock * kBlock * D + g % kBlock;
    typename I::Vec squares = I::set1(0);
    for (int64_t j = 0; j < D; j += 16) {
      const int depth = (int)min64(16, D - j);
      typename I::Vec v[16];
      for (int64_t i = 0; i < 16; ++i) {
        const T* row = W + (first + g + i) * D + j;
        if (g + i >= width) {
          v[i] = I::set1(0);
        } else {
          v[i] = depth == 16 ? I::load(row) : I::load_n(row, depth, 0);
        }
      }
      transpose<I>(v);
      for (int i = 0; i < depth; ++i) {
        squares = I::fma(v[i], v[i], squares);
        I::store(out + (j + i) * kBlock, v[i]);
      }
    }
    float lane[16];
    I::store(lane, squares);
    // One chain per feature: D terms in a lane.
    for (int64_t i = 0; i < min64(16, width - g); ++i) norms[g + i] = norm_above(lane[i], 16 * D);
  }
}

// h [kProductX, 16 kProductW] (+)= products of x and weights over `depth`.
template <class I>
inline void product_block(const float* x, int64_t stride, const float* w, int64_t depth, bool add,
                          float* h, int64_t h_stride) {
  constexpr int X = I::kProductX, R = I::kProductW;
  typename I::Vec sum[X * R];
#pragma GCC unroll 24
  for (int i = 0; i < X * R; ++i) sum[i] = I::set1(0);
#pragma GCC unroll 1
  for (int64_t j = 0; j < depth; ++j) {
    typename I::Vec b[R];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) b[r] = I::load(w + (j * R + r) * 16);
#pragma GCC unroll 12
    for (int i = 0; i < X; ++i) {
      const typename I::Vec a = I::set1(x[i * stride + j]);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) sum[i * R + r] = I::fma(a, b[r], sum[i * R + r]);
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < X * R; ++i) {
    float* to = h + i / R * h_stride + i % R * 16;
    I::store(to, add ? I::add(I::load(to), sum[i]) : sum[i]);
  }
}

constexpr int64_t kProductRows = 24;  // rows that meet a packed panel at a time: whole blocks

// h [kProductRows, kPanel] of products with a packed panel; rows of x up to a whole block
// exist.
template <class I>
inline void product_panel(const EncodeArgs& a, int64_t n, int64_t rows, int64_t width,
                          const float* packed, float* h) {
  static_assert(kProductRows % I::kProductX == 0 && I::kProductX <= 12, "see EncodeArgs");
  constexpr int64_t kBlock = 16 * I::kProductW;
  for (int64_t j = 0; j < a.D; j += kDepth) {
    const int64_t depth = min64(kDepth, a.D - j);
    for (int64_t g = 0; g < width; g += kBlock) {
      const float* w = packed + g * a.D + j * kBlock;
      for (int64_t i = 0; i < rows; i += I::kProductX) {
        product_block<I>(a.centred + (n + i) * a.stride + j, a.stride, w, depth, j > 0,
                         h + i * kPanel + g, kPanel);
      }
    }
  }
}

}  // namespace
}  // namespace fastsae
