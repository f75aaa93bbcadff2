// Steering policies: the operations of a row's slot, one after the other, on its fp32 residual.
#pragma once
#include "decode.h"

namespace fastsae {
namespace {

enum : int32_t { kAmplify = 1, kCalibrate = 2, kFloor = 3, kAdd = 4, kEnforce = 5 };

template <class I>
inline float norm_of(const float* v, int64_t n) {
  const float* row = v;
  float square;
  dot_rows<I, 1>(v, &row, n, &square);
  return __builtin_sqrtf(square);
}

// a_i = h_i where h_i > max(θ_i, 0), else 0 (NaN stays), for items [begin, end) of the table.
template <class I>
inline void activations(const SteerTableArgs& t, const float* r, int64_t D, int64_t begin,
                        int64_t end, float* a) {
  const int32_t* rows = t.item_row + begin;
  dot_indexed<I>(r, t.enc, D, rows, end - begin, a);
  for (int64_t i = 0; i < end - begin; ++i) {
    const float h = a[i] + t.bias[rows[i]], theta = t.theta[rows[i]];
    const float floor = theta < 0 ? 0 : theta;
    a[i] = h <= floor ? 0 : h;
  }
}

// r + s m Σ (v_i / Σv) d_i rescaled to |r|, v_i = ReLU(m - a_i); r where Σv or the new norm is 0.
template <class I>
inline void enforce(const SteerTableArgs& t, float* r, int64_t D, int64_t begin, int64_t end,
                    float* a, float magnitude, float strength) {
  float total = 0;
  for (int64_t i = 0; i < end - begin; ++i) {
    const float missing = magnitude - a[i];
    a[i] = missing < 0 ? 0 : missing;
    total += a[i];
  }
  if (!(total > 0)) return;
  const float before = norm_of<I>(r, D);
  for (int64_t i = 0; i < end - begin; ++i) a[i] = strength * magnitude * (a[i] / total);
  add_indexed<I>(r, a, t.item_row + begin, end - begin, t.dec, D, D);
  const float after = norm_of<I>(r, D);
  if (!(after > 0)) return;
  for (int64_t j = 0; j < D; ++j) r[j] *= before / after;
}

template <class I>
inline void run_operation(const SteerTableArgs& t, int64_t slot, int64_t p, float strength,
                          float* r, int64_t D, float* a) {
  const int64_t at = slot * t.P + p;
  const int32_t kind = t.op_kind[at];
  const int64_t begin = t.op_begin[at], end = t.op_end[at];
  if (kind == 0 || end <= begin) return;
  if (kind != kAdd) activations<I>(t, r, D, begin, end, a);
  if (kind == kEnforce) {
    enforce<I>(t, r, D, begin, end, a, t.op_scalar[at], strength);
    return;
  }
  for (int64_t i = 0; i < end - begin; ++i) {
    const float value = t.item_value[begin + i];
    float c = value;
    if (kind == kAmplify) c = value * a[i];
    if (kind == kCalibrate || kind == kFloor) c = value - a[i];
    if (kind == kFloor) c = c < 0 ? 0 : c;
    a[i] = strength * c;
  }
  add_indexed<I>(r, a, t.item_row + begin, end - begin, t.dec, D, D);
}

template <class I>
void steer_rows(const SteerArgs& s, int64_t begin, int64_t end) {
  const SteerTableArgs& t = s.table;
  const int64_t row_bytes = s.D * (s.x_type == DType::f32 ? 4 : 2);
  Memory memory(4 * (s.D + t.items));
  float* r = (float*)memory.data;
  float* a = r + s.D;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t slot = s.slots[n];
    bool open = slot != 0;  // nothing of the table is read for slot 0: it may be missing
    if (open) {
      const int64_t gate = t.gate_begin[slot], gate_end = t.gate_end[slot];
      read_row(s.x, s.x_type, n * s.D, s.D, r);
      if (gate_end > gate) {
        activations<I>(t, r, s.D, gate, gate_end, a);
        float sum = 0;
        for (int64_t i = 0; i < gate_end - gate; ++i) sum += a[i];
        open = sum / (float)(gate_end - gate) >= t.gate_above[slot];
      }
    }
    if (!open) {
      memcpy((char*)s.out + n * row_bytes, (const char*)s.x + n * row_bytes, (size_t)row_bytes);
      continue;
    }
    const float before = t.norm_preserve[slot] ? norm_of<I>(r, s.D) : 0.0f;
    for (int64_t p = 0; p < t.P; ++p) {
      run_operation<I>(t, slot, p, s.strengths[n], r, s.D, a);
    }
    if (t.norm_preserve[slot]) {
      const float after = norm_of<I>(r, s.D);
      if (after > 0) {
        for (int64_t j = 0; j < s.D; ++j) r[j] *= before / after;
      }
    }
    write_row(r, s.D, s.x_type, s.out, n * s.D);
  }
}

}  // namespace
}  // namespace fastsae
