// The rows of a residual that is kept as the sum of two tensors; see fastsae/ops/residual.py.
#pragma once
#include "decode.h"

namespace fastsae {
namespace {

// x[i] = hidden[index[i]] + residual[index[i]], rounded once, as the model's next layer adds them.
template <class T>
inline void take_typed(const ResidualArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t from = a.index[i] * a.D;
    const T* hidden = (const T*)a.hidden + from;
    T* x = (T*)a.x + i * a.D;
    if (a.residual == nullptr) {
      memcpy(x, hidden, (size_t)a.D * sizeof(T));
      continue;
    }
    const T* residual = (const T*)a.residual + from;
    for (int64_t j = 0; j < a.D; ++j) {
      from_float(to_float(hidden[j]) + to_float(residual[j]), x + j);
    }
  }
}

// A row of y that differs from x becomes the residual, zeros the hidden; others keep both parts.
template <class T>
inline void put_typed(const ResidualArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T *x = (const T*)a.x + i * a.D, *y = (const T*)a.y + i * a.D;
    int32_t changed = 0;
    for (int64_t j = 0; j < a.D; ++j) changed |= to_float(y[j]) != to_float(x[j]);
    if (!changed) continue;
    const int64_t to = a.index[i] * a.D;
    memcpy((T*)(a.residual ? a.residual : a.hidden) + to, y, (size_t)a.D * sizeof(T));
    if (a.residual) memset((T*)a.hidden + to, 0, (size_t)a.D * sizeof(T));
  }
}

template <class I>
void residual_take(const ResidualArgs& a, int64_t begin, int64_t end) {
  if (a.type == DType::f32) take_typed<float>(a, begin, end);
  if (a.type == DType::bf16) take_typed<bf16>(a, begin, end);
  if (a.type == DType::f16) take_typed<f16>(a, begin, end);
}

template <class I>
void residual_put(const ResidualArgs& a, int64_t begin, int64_t end) {
  if (a.type == DType::f32) put_typed<float>(a, begin, end);
  if (a.type == DType::bf16) put_typed<bf16>(a, begin, end);
  if (a.type == DType::f16) put_typed<f16>(a, begin, end);
}

}  // namespace
}  // namespace fastsae
