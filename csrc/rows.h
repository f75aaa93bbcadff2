// The rows that a screen is taken about; baseline code, shared by the bindings of encode and its
// copies.
#pragma once
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels.h"

namespace fastsae {
namespace {

inline size_t bytes_of(DType type) { return type == DType::f32 ? 4 : 2; }

// The mean of rows x - b_dec, about which screens are taken; false where it is not finite. Rows
// four times as long as the median row do not count: one would spoil the screen of all others.
template <class T>
bool mean_row(const CentreArgs& c, const T* x, int64_t rows, float* mean, double* norm) {
  std::vector<float> squares((size_t)rows), sorted;
  for (int64_t n = 0; n < rows; ++n) {
    float part[16] = {0};
    for (int64_t j = 0; j < c.D; ++j) {
      const float v = to_float(x[n * c.D + j]) - (c.b_dec ? c.b_dec[j] : 0.0f);
      part[j % 16] += v * v;
    }
    const float square = std::accumulate(part, part + 16, 0.0f);
    squares[(size_t)n] = square < 1e36f ? square : INFINITY;  // NaN too
  }
  sorted = squares;
  std::nth_element(sorted.begin(), sorted.begin() + rows / 2, sorted.end());
  const float most = 16 * sorted[(size_t)rows / 2];
  std::fill_n(mean, c.D, 0.0f);
  int64_t counted = 0;
  for (int64_t n = 0; n < rows; ++n) {
    if (!(squares[(size_t)n] <= most) || squares[(size_t)n] == INFINITY) continue;
    ++counted;
    for (int64_t j = 0; j < c.D; ++j) mean[j] += to_float(x[n * c.D + j]);
  }
  if (counted == 0) return false;
  double square = 0;
  for (int64_t j = 0; j < c.D; ++j) {
    mean[j] = mean[j] / (float)counted - (c.b_dec ? c.b_dec[j] : 0.0f);
    square += (double)mean[j] * mean[j];
  }
  *norm = std::sqrt(square) * (1.0 + 1e-6);
  return *norm < 1e18;
}

inline bool mean_any_row(const CentreArgs& c, int64_t rows, float* mean, double* norm) {
  rows = std::min<int64_t>(rows, 1024);
  if (c.x_type == DType::f32) return mean_row(c, (const float*)c.x, rows, mean, norm);
  if (c.x_type == DType::bf16) return mean_row(c, (const bf16*)c.x, rows, mean, norm);
  return mean_row(c, (const f16*)c.x, rows, mean, norm);
}

}  // namespace
}  // namespace fastsae
