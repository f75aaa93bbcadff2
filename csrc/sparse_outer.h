// dW[f] = Σ v·g_n over the entries of feature f, in ascending row order: no atomics, and the same
// bits whatever the number of threads.
#pragma once
#include "decode.h"

namespace fastsae {
namespace {

constexpr int64_t kSegment = 256;  // entries summed on their own first: keeps long sums accurate

// sum += Σ_i v[i]·g[rows[i]], in order, by segments; `partial` is scratch of n floats.
template <class I, class T>
inline void add_entries(float* sum, float* partial, const float* v, const int32_t* rows,
                        int64_t count, const T* g, int64_t stride, int64_t n) {
  if (count <= kSegment) return add_indexed<I>(sum, v, rows, count, g, stride, n);
  const float one = 1.0f;
  const float* const partials[1] = {partial};
  for (int64_t i = 0; i < count; i += kSegment) {
    memset(partial, 0, (size_t)n * 4);
    add_indexed<I>(partial, v + i, rows + i, min64(kSegment, count - i), g, stride, n);
    add_rows<I, 1>(sum, &one, partials, n);
  }
}

inline float sum_entries(const float* v, int64_t count) {
  float total = 0;
  for (int64_t i = 0; i < count; i += kSegment) {
    float sum = 0;
    for (int64_t e = i; e < min64(count, i + kSegment); ++e) sum += v[e];
    total += sum;
  }
  return total;
}

template <class I, class T>
inline void sparse_outer_typed(const SparseOuterArgs& a, int64_t begin, int64_t end) {
  const int64_t columns = a.column_end - a.column_begin;
  Memory memory(4 * columns);
  for (int64_t f = begin; f < end; ++f) {
    const int64_t first = a.offsets[f], count = a.offsets[f + 1] - first;
    float* row = a.dW + f * a.D + a.column_begin;
    memset(row, 0, (size_t)columns * 4);
    add_entries<I>(row, (float*)memory.data, a.values + first, a.rows + first, count,
                   (const T*)a.g + a.column_begin, a.D, columns);
    if (a.column_begin == 0) a.db[f] = sum_entries(a.values + first, count);
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
