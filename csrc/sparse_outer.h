// dW[f] = Σ v·g_n over the entries of feature f, in ascending row order: no atomics, and the same
// bits whatever the number of threads.
#pragma once
#include "decode.h"

namespace fastsae {
namespace {

constexpr int64_t kSegment = 256;  // entries summed on their own first: keeps long sums accurate

template <class I, class T>
inline void sparse_outer_typed(const SparseOuterArgs& a, int64_t begin, int64_t end) {
  const int64_t columns = a.column_end - a.column_begin;
  const T* g = (const T*)a.g + a.column_begin;
  Memory memory(4 * (columns + kSegment));
  float* partial = (float*)memory.data;
  const float one = 1.0f;
  const float* const partials[1] = {partial};
  for (int64_t f = begin; f < end; ++f) {
    float* row = a.dW + f * a.D + a.column_begin;
    float bias = 0;
    memset(row, 0, (size_t)columns * 4);
    for (int64_t i = a.offsets[f]; i < a.offsets[f + 1]; i += kSegment) {
      const int64_t count = min64(kSegment, a.offsets[f + 1] - i);
      float sum = 0;
      for (int64_t e = i; e < i + count; ++e) sum += a.values[e];
      bias += sum;
      const bool only = a.offsets[f + 1] - a.offsets[f] <= kSegment;
      float* target = only ? row : partial;
      if (!only) memset(partial, 0, (size_t)columns * 4);
      add_indexed<I>(target, a.values + i, a.rows + i, count, g, a.D, columns);
      if (!only) add_rows<I, 1>(row, &one, partials, columns);
    }
    if (a.column_begin == 0) a.db[f] = bias;
  }
}

template <class I>
void sparse_outer_features(const SparseOuterArgs& a, int64_t begin, int64_t end) {
  if (a.g_type == DType::f32) sparse_outer_typed<I, float>(a, begin, end);
  if (a.g_type == DType::bf16) sparse_outer_typed<I, bf16>(a, begin, end);
  if (a.g_type == DType::f16) sparse_outer_typed<I, f16>(a, begin, end);
}

}  // namespace
}  // namespace fastsae
