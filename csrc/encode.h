// Encoding without [N, F] pre-activations in fp32: a screened product decides which rescoring dots
// are computed, and those alone make the result. Certificate: screen.h.
#pragma once
#include "screen.h"
#include "topk.h"

namespace fastsae {
namespace {

// h[n][f] = <x_n, w_f> + b_f for every row and feature: four features at a time, W read once.
template <class I, class T>
inline void dense_typed(const DenseArgs& a, int64_t begin, int64_t end) {
  const T* W = (const T*)a.W;
  for (int64_t f = begin; f < end; f += 4) {
    const int64_t count = min64(4, end - f);
    const T* rows[4];
    for (int r = 0; r < 4; ++r) rows[r] = W + min64(f + r, end - 1) * a.D;
    for (int64_t n = 0; n < a.N; ++n) {
      float h[4];
      dot_rows<I, 4>(a.centred + n * a.D, rows, a.D, h);
      for (int64_t r = 0; r < count; ++r) a.h[n * a.F + f + r] = h[r] + a.b_enc[f + r];
    }
  }
}

template <class I>
void dense_features(const DenseArgs& a, int64_t begin, int64_t end) {
  if (a.weight_type == DType::f32) dense_typed<I, float>(a, begin, end);
  if (a.weight_type == DType::bf16) dense_typed<I, bf16>(a, begin, end);
  if (a.weight_type == DType::f16) dense_typed<I, f16>(a, begin, end);
}

inline float max_or_infinite(float a, float b) {
  return b != b ? __builtin_inff() : (a > b ? a : b);
}

// Maxima of the feature bounds over the groups of block_maxima: they bound a whole group at once.
template <class I>
void group_bounds(const EncodeArgs& a, float* out) {
  const int64_t groups = block_count(a.F) * 16;
  memset(out, 0, (size_t)groups * 12);
  for (int64_t f = 0; f < a.F; ++f) {
    const int64_t group = f / kBlock * 16 + f % 16;
    float* slot = out + group;
    slot[0] = max_or_infinite(slot[0], a.norms[f]);
    slot[groups] = max_or_infinite(slot[groups], a.errors[f]);
    slot[2 * groups] = max_or_infinite(slot[2 * groups], __builtin_fabsf(a.b_enc[f]));
  }
}

struct EncodeScratch {
  SelectScratch select;
  float* h;            // [F + 16] one row of pre-activations: screened, exact where rescored
  float* dots;         // [F]
  int32_t* found;      // [F + 16] candidates, ascending
  int32_t* todo;       // [F] those of them not rescored yet
  uint16_t* rescored;  // [F / 16 + 1] a bit per column; all zero between rows
};

inline int64_t encode_bytes(int64_t F) { return select_bytes(F) + 16 * (F + 32) + F / 8 + 64; }

inline EncodeScratch encode_scratch(char* memory, int64_t F) {
  EncodeScratch s;
  s.select = select_scratch(memory, F);
  s.h = (float*)(memory + select_bytes(F));
  s.dots = s.h + F + 16;
  s.found = (int32_t*)(s.dots + F);
  s.todo = s.found + F + 16;
  s.rescored = (uint16_t*)(s.todo + F);
  memset(s.rescored, 0, (size_t)(F / 16 + 1) * 2);
  return s;
}

// h = screen + b for one row, and its block maxima. NaN does not count in the maxima (its group has
// an infinite bound). Returns whether there was one.
template <class I, class T>
inline bool load_screen(const EncodeArgs& a, int64_t n, float* h, float* maxima) {
  const float lowest = -__builtin_inff();
  uint32_t nan = 0;
  for (int64_t tile = 0; tile < a.F; tile += a.tile) {
    const int64_t width = min64(a.tile, a.F - tile);
    const T* row = (const T*)a.screen + tile * a.N + n * width;
    for (int64_t begin = 0; begin < width; begin += kBlock) {
      typename I::Vec best = I::set1(lowest);
      const int64_t end = min64(begin + kBlock, width);
      int64_t j = begin;
      for (; j + 16 <= end; j += 16) {
        const typename I::Vec v = I::add(I::load(row + j), I::load(a.b_enc + tile + j));
        I::store(h + tile + j, v);
        nan |= I::unordered(v, v);
        best = I::max(v, best);
      }
      if (j < end) {
        const int rest = (int)(end - j);
        const typename I::Vec b = I::load_n(a.b_enc + tile + j, rest, 0.0f);
        const typename I::Vec v = I::add(I::load_n(row + j, rest, lowest), b);
        I::store_n(h + tile + j, v, rest);
        nan |= I::unordered(v, v) & ((1u << rest) - 1);
        best = I::max(v, best);
      }
      I::store(maxima + (tile + begin) / 16, best);
    }
  }
  return nan != 0;
}

template <class I>
inline bool load_any(const EncodeArgs& a, int64_t n, float* h, float* maxima) {
  if (a.screen_type == DType::bf16) return load_screen<I, bf16>(a, n, h, maxima);
  if (a.screen_type == DType::f16) return load_screen<I, f16>(a, n, h, maxima);
  return load_screen<I, float>(a, n, h, maxima);
}

// U = h + ε for 16 columns, ε = x_error·|w| + x_norm·|w - w~| + relative·(|h| + |b|) + absolute.
// It increases with h, so a group's maxima give a bound of the group.
template <class I>
struct Bound {
  typename I::Vec x_error, x_norm, relative, absolute;

  Bound(const EncodeArgs& a, int64_t n) {
    x_error = I::set1(a.bounds[2 * n]);
    x_norm = I::set1(a.bounds[2 * n + 1]);
    // A bf16 screen was rounded once more (2^-8); 2^-20 covers the fp32 sums made here.
    relative = I::set1(a.screen_type == DType::f32 ? 0x1p-20f : 0x1.03p-8f);
    absolute = I::set1((float)a.D * kSmallest);
  }
  inline typename I::Vec above(typename I::Vec h, typename I::Vec norm, typename I::Vec error,
                               typename I::Vec b) const {
    const typename I::Vec size = I::add(I::abs(h), I::abs(b));
    const typename I::Vec operands = I::fma(x_error, norm, I::fma(x_norm, error, absolute));
    return I::add(h, I::fma(relative, size, operands));
  }
  inline typename I::Vec columns(const EncodeArgs& a, const float* h, int64_t j, int rest) const {
    if (rest >= 16) {
      return above(I::load(h + j), I::load(a.norms + j), I::load(a.errors + j),
                   I::load(a.b_enc + j));
    }
    return above(I::load_n(h + j, rest, 0), I::load_n(a.norms + j, rest, 0),
                 I::load_n(a.errors + j, rest, 0), I::load_n(a.b_enc + j, rest, 0));
  }
};

// Replaces h by the rescoring dot for n listed columns.
template <class I>
inline void rescore(const EncodeArgs& a, int64_t row, const int32_t* columns, int64_t n,
                    const EncodeScratch& s) {
  dot_any<I>(a.centred + row * a.D, a.W, a.weight_type, a.D, columns, n, s.dots);
  for (int64_t i = 0; i < n; ++i) s.h[columns[i]] = s.dots[i] + a.b_enc[columns[i]];
}

// Columns that the bound cannot exclude from the members >= t, ascending, into s.found.
template <class I>
inline int64_t find_candidates(const EncodeArgs& a, const Bound<I>& bound, float t,
                               const EncodeScratch& s) {
  const int64_t blocks = block_count(a.F), groups = blocks * 16;
  const typename I::Vec limit = I::set1(t);
  int64_t found = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const float* group = a.group_bounds + b * 16;
    const typename I::Vec best = bound.above(I::load(s.select.maxima + b * 16), I::load(group),
                                             I::load(group + groups), I::load(group + 2 * groups));
    if (!I::not_lt(best, limit)) continue;
    const int64_t end = min64((b + 1) * kBlock, a.F);
    for (int64_t j = b * kBlock; j < end; j += 16) {
      const int rest = (int)min64(16, end - j);
      uint32_t mask = I::not_lt(bound.columns(a, s.h, j, rest), limit);
      if (rest < 16) mask &= (1u << rest) - 1;
      if (mask) found += I::compress(s.found + found, mask, (int32_t)j);
    }
  }
  return found;
}

// The exact members of the row's top-k among s.found, which holds every h > 0 that can be one.
// Returns false when there are too many candidates.
template <class I>
inline bool screen_row(const EncodeArgs& a, int64_t n, const EncodeScratch& s, int64_t* found) {
  const int64_t seeds = maxima_pay(a.F, a.k) ? select_by_maxima<I>(s.h, a.F, a.k, s.select)
                                             : (select_by_keys<I>(s.h, a.F, a.k, s.select), a.k);
  const int32_t* seed = s.select.greater;
  rescore<I>(a, n, seed, seeds, s);
  // Any k exact values bound the k-th largest from below; members <= 0 need not be found.
  float t = seeds == a.k ? __builtin_inff() : 0.0f;
  for (int64_t i = 0; i < seeds; ++i) t = s.h[seed[i]] < t ? s.h[seed[i]] : t;
  t = t > 0.0f ? t : 0.0f;
  *found = find_candidates<I>(a, Bound<I>(a, n), t, s);
  if (*found > a.capacity) return false;
  for (int64_t i = 0; i < seeds; ++i) s.rescored[seed[i] >> 4] |= (uint16_t)(1 << (seed[i] & 15));
  int64_t todo = 0;
  for (int64_t i = 0; i < *found; ++i) {
    s.todo[todo] = s.found[i];
    todo += !(s.rescored[s.found[i] >> 4] >> (s.found[i] & 15) & 1);
  }
  for (int64_t i = 0; i < seeds; ++i) s.rescored[seed[i] >> 4] = 0;
  rescore<I>(a, n, s.todo, todo, s);
  return true;
}

// Writes the active ones of `count` sorted columns, then padding: value 0 and the lowest unused
// indices.
inline void write_topk(const EncodeArgs& a, int64_t row, const int32_t* sorted, int64_t count,
                       const float* h, uint8_t* used) {
  float* values = a.values + row * a.k;
  int32_t* indices = a.indices + row * a.k;
  memset(used, 0, (size_t)a.k);
  int64_t active = 0;
  for (; active < count && !(h[sorted[active]] <= 0); ++active) {
    values[active] = h[sorted[active]];
    indices[active] = sorted[active];
    if (sorted[active] < a.k) used[sorted[active]] = 1;
  }
  for (int32_t f = 0; active < a.k; ++f) {
    if (used[f]) continue;
    values[active] = 0;
    indices[active++] = f;
  }
}

template <class I>
void encode_topk_rows(const EncodeArgs& a, int64_t begin, int64_t end) {
  Memory memory(encode_bytes(a.F));
  const EncodeScratch s = encode_scratch(memory.data, a.F);
  for (int64_t n = begin; n < end; ++n) {
    const float* h = s.h;
    int32_t* chosen = s.select.greater;
    int64_t count = a.k;
    if (a.screen_is_exact) {
      h = (const float*)a.screen + n * a.F;
      select_topk<I>(h, a.F, a.k, s.select);
    } else {
      // A norm that is not finite or too large has no bound: the caller computes the whole row.
      if (!(a.bounds[2 * n] < kHuge && a.bounds[2 * n + 1] < kHuge)) {
        a.left[n] = 1;
        continue;
      }
      const bool nan = load_any<I>(a, n, s.h, s.select.maxima);
      if (!a.exact) {
        if (nan || !maxima_pay(a.F, a.k)) {
          select_by_keys<I>(h, a.F, a.k, s.select);
        } else {
          select_by_maxima<I>(h, a.F, a.k, s.select);
        }
      } else if (screen_row<I>(a, n, s, &count)) {
        chosen = s.found;
      } else {
        a.left[n] = 1;
        continue;
      }
      for (int64_t i = 0; i < count; ++i) s.select.keys[i] = order_key(h[chosen[i]]);
      count = reduce_to_k<I>(chosen, s.select.keys, count, a.k, s.select.equal);
      sort_by_key(chosen, s.select.keys, count, s.select.packed);
    }
    write_topk(a, a.rows[n], chosen, count, h, (uint8_t*)s.select.packed);
  }
}

// Entries !(h <= max(θ, 0)) of the row among `count` ascending columns, into a buffer of its own.
inline void write_threshold(const EncodeArgs& a, int64_t row, const int32_t* columns, int64_t count,
                            const float* h) {
  int32_t* out = (int32_t*)malloc((size_t)(8 * count + 8));
  if (!out) out_of_memory();
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t f = columns ? columns[i] : (int32_t)i;
    const float floor = a.threshold[f] < 0 ? 0 : a.threshold[f];
    if (!(h[f] <= floor)) out[kept++] = f;
  }
  for (int64_t i = 0; i < kept; ++i) memcpy(out + kept + i, h + out[i], 4);
  a.entries[row] = out;
  a.counts[row] = kept;
}

template <class I>
void encode_threshold_rows(const EncodeArgs& a, int64_t begin, int64_t end) {
  Memory memory(encode_bytes(a.F));
  const EncodeScratch s = encode_scratch(memory.data, a.F);
  for (int64_t n = begin; n < end; ++n) {
    if (a.screen_is_exact) {
      write_threshold(a, a.rows[n], nullptr, a.F, (const float*)a.screen + n * a.F);
      continue;
    }
    if (!(a.bounds[2 * n] < kHuge && a.bounds[2 * n + 1] < kHuge)) {
      a.left[n] = 1;
      continue;
    }
    load_any<I>(a, n, s.h, s.select.maxima);
    const Bound<I> bound(a, n);
    const typename I::Vec zero = I::set1(0);
    int64_t found = 0;
    for (int64_t j = 0; j < a.F; j += 16) {
      const int rest = (int)min64(16, a.F - j);
      const typename I::Vec theta =
          rest == 16 ? I::load(a.threshold + j) : I::load_n(a.threshold + j, rest, 0);
      // max returns its second operand for NaN: a NaN threshold stays one, and keeps its column.
      uint32_t mask = I::not_lt(bound.columns(a, s.h, j, rest), I::max(zero, theta));
      if (rest < 16) mask &= (1u << rest) - 1;
      if (mask) found += I::compress(s.found + found, mask, (int32_t)j);
    }
    if (found > a.capacity) {
      a.left[n] = 1;
      continue;
    }
    rescore<I>(a, n, s.found, found, s);
    write_threshold(a, a.rows[n], s.found, found, s.h);
  }
}

}  // namespace
}  // namespace fastsae
