// What a steered row adds to its policy's numbers; see fastsae/ops/watch.py.
#pragma once
#include "steer.h"

namespace fastsae {
namespace {

// values [N, 4 + J]: finite, not finite, gate open, dose, activations; a slot 0 leaves its row.
template <class I>
void watch_rows(const WatchArgs& w, int64_t begin, int64_t end) {
  constexpr float kLargest = 0x1.fffffep127f;
  const int64_t D = w.D, J = w.J;
  Memory memory(4 * (2 * D + 2 * J));
  float *x = (float*)memory.data, *change = x + D, *h = change + D;
  int32_t* rows = (int32_t*)(h + J);
  for (int64_t n = begin; n < end; ++n) {
    const int64_t slot = w.slots[n], count = w.count[slot];
    if (slot == 0) continue;
    double* out = w.values + n * (4 + J);
    memset(out, 0, (size_t)(4 + J) * sizeof(double));
    read_row(w.x, w.type, n * D, D, x);
    read_row(w.r, w.type, n * D, D, change);
    for (int64_t j = 0; j < D; ++j) change[j] -= x[j];
    const float length = norm_of<I>(x, D), moved = norm_of<I>(change, D);
    if (!(length + moved <= kLargest)) {
      out[1] = 1;
      continue;
    }
    for (int64_t i = 0; i < count; ++i) rows[i] = (int32_t)(slot * J + i);
    dot_indexed<I>(x, w.enc, D, rows, count, h);
    float mean = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = slot * J + i;
      const float value = h[i] + w.bias[at];
      mean += (value > 0 ? value : 0.0f) * w.gate[at];
      out[4 + i] = value > w.floor[at] ? value : 0.0f;
    }
    const float dose = moved > 0 ? moved / length : 0.0f;
    out[0] = 1;
    out[2] = mean >= w.above[slot] || moved > 0;
    out[3] = dose < kLargest ? dose : kLargest;
  }
}

}  // namespace
}  // namespace fastsae
