// Encoding without [N, F] pre-activations, in four passes over a tile of rows: scan (approximate
// products, candidates kept), plan (which of them need a value), rescore (their dots, in feature
// order so that a weight row is read once), write. Rescoring dots alone make the result.
// Without a screen the scan computes every rescoring dot itself, and only write is left.
#pragma once
#include "candidates.h"

namespace fastsae {
namespace {

// Features of range r: whole panels, shared out evenly.
inline int64_t range_begin(const EncodeArgs& a, int64_t r) {
  const int64_t panels = (a.F + kPanel - 1) / kPanel;
  return min64(a.F, panels * r / a.ranges * kPanel);
}

// The rows and the range of features of one work item.
struct Item {
  int64_t range, row_begin, row_end;
};

inline Item item_of(const EncodeArgs& a, int64_t i) {
  const int64_t blocks = (a.N + 31) / 32, group = i / a.ranges;
  return {i % a.ranges, min64(a.N, blocks * group / a.groups * 32),
          min64(a.N, blocks * (group + 1) / a.groups * 32)};
}

inline int64_t list_bytes(int64_t n) { return select_bytes(n) + 64; }

// h [rows, kPanel] of rescoring dots. A few weight rows stay in L1 while all rows of x pass.
template <class I, class T>
inline void exact_panel(const EncodeArgs& a, int64_t n, int64_t rows, int64_t first, int64_t width,
                        float* h) {
  constexpr int X = I::kBlockX, R = I::kBlockW;
  constexpr int64_t kStay = 32 << 10;
  const T* W = (const T*)a.W + first * a.D;
  const int64_t stay = max64(R, kStay / (a.D * (int64_t)sizeof(T)) / R * R);
  for (int64_t begin = 0; begin < width; begin += stay) {
    const int64_t end = min64(begin + stay, width);
    for (int64_t i = 0; i < rows; i += X) {
      for (int64_t f = begin; f < end; f += R) {
        const T* w[R];
        const float* x[X];
        for (int r = 0; r < R; ++r) w[r] = W + min64(f + r, width - 1) * a.D;
        if (rows - i == 1) {
          dot_rows<I, R>(a.centred + (n + i) * a.stride, w, a.D, h + i * kPanel + f);
          continue;
        }
        for (int r = 0; r < X; ++r) x[r] = a.centred + (n + min64(i + r, rows - 1)) * a.stride;
        dot_block<I>(x, w, a.D, h + i * kPanel + f, kPanel);
      }
    }
  }
}

template <class I>
inline void exact_any_panel(const EncodeArgs& a, int64_t n, int64_t rows, int64_t first,
                            int64_t width, float* h) {
  if (a.weight_type == DType::f32) exact_panel<I, float>(a, n, rows, first, width, h);
  if (a.weight_type == DType::bf16) exact_panel<I, bf16>(a, n, rows, first, width, h);
  if (a.weight_type == DType::f16) exact_panel<I, f16>(a, n, rows, first, width, h);
}

// Where one thread keeps a panel and compacts lists.
struct ScanScratch {
  SelectScratch select;
  Panel panel;
};

constexpr int64_t kScanRows = 32;  // rows that meet a panel at a time

// dot_block writes whole blocks: up to kMostRows rows of products.
constexpr int64_t kMostRows = kScanRows + 4;

inline int64_t scan_bytes(const EncodeArgs& a) {
  const int64_t rounding = a.tiles && !a.weight_tiles ? (a.panel + 16) * ((a.D + 31) / 32) * 64 : 0;
  const int64_t packing = a.floats ? a.panel * a.D * 4 : 0;
  return padded_to(list_bytes(a.capacity), 64) + (kMostRows + 5) * kPanel * 4 + rounding + packing;
}

inline ScanScratch scan_scratch(const EncodeArgs& a, char* memory) {
  ScanScratch s;
  Panel& p = s.panel;
  s.select = select_scratch(memory, a.capacity);
  p.h = (float*)(memory + padded_to(list_bytes(a.capacity), 64));
  p.norms = p.h + kMostRows * kPanel;
  p.errors = p.norms + kPanel;
  p.products = p.errors + kPanel;
  p.bias = p.products + kPanel;
  p.threshold = p.bias + kPanel;
  p.tiles = (bf16*)(p.threshold + kPanel);
  p.packed = p.threshold + kPanel;
  p.fetch = nullptr;
  p.lines = 0;
  p.rounded = p.tiles + a.panel * ((a.D + 31) / 32) * 32;
  memset(p.norms, 0, 5 * kPanel * 4);
  return s;
}

// The features of one panel: norms, bias and threshold; weights in tiles where the screen has them.
template <class I>
inline void begin_panel(const EncodeArgs& a, int64_t first, int64_t width, Panel* p) {
  const size_t bytes = (size_t)width * 4;
  if (a.threshold) memcpy(p->threshold, a.threshold + first, bytes);
  if constexpr (I::kTiles) {
    if (a.tiles) load_panel<I>(a, first, width, p);
  }
  if (a.floats) pack_any_panel<I>(a, first, width, p);
  if (a.norms) {
    memcpy(p->norms, a.norms + first, bytes);
    memcpy(p->errors, a.errors + first, bytes);
    memcpy(p->products, a.products + first, bytes);
  }
  for (int64_t j = 0; j < width; ++j) p->bias[j] = a.b_enc[first + j] + p->products[j];
}

// Products of 32 rows by tiles. In parts of the depth for which the rows stay in L1, where enough
// features share them; weights of the next panel are on their way into L2.
template <class I>
inline void tile_products(const EncodeArgs& a, int64_t n, int64_t width, Panel* p) {
  constexpr int64_t kPart = 8, kShare = 128;
  const int64_t steps = (a.D + 31) / 32, part = width >= kShare ? kPart : steps;
  const bf16* x = a.tiles + n * steps * 32;
  for (int64_t s = 0; s < steps; s += part) {
    const int64_t count = min64(part, steps - s);
    for (int64_t g = 0; g < width; g += 32) {
      const bf16 *a0 = x + s * 512, *b0 = p->tiles + (g * steps + s * 16) * 32;
      I::multiply_tiles(a0, a0 + steps * 512, b0, b0 + steps * 512, count, p->h + g, kPanel, s > 0,
                        p->fetch, p->lines);
      p->fetch += 64 * p->lines * count;
    }
  }
}

template <class I>
inline void panel_products(const EncodeArgs& a, int64_t n, int64_t rows, int64_t first,
                           int64_t width, Panel* p) {
  if constexpr (I::kTiles) {
    if (a.tiles) {
      tile_products<I>(a, n, width, p);
      return;
    }
  }
  if (a.floats) {
    product_panel<I>(a, n, rows, width, p->packed, p->h);
  } else if (a.words) {
    byte_panel<I>(a, n, rows, first, width, p->h);
  } else {
    exact_any_panel<I>(a, n, rows, first, width, p->h);
  }
}

// All features of a range meet rows [begin, end).
template <class I>
inline void scan_rows(const EncodeArgs& a, int64_t range, int64_t begin, int64_t end,
                      ScanScratch* s) {
  const int64_t last = range_begin(a, range + 1);
  if (a.weight_tiles) s->panel.lines = max64(1, 1024 / padded_to(end - begin, 32));
  for (int64_t first = range_begin(a, range); first < last; first += a.panel) {
    const int64_t width = min64(a.panel, last - first);
    begin_panel<I>(a, first, width, &s->panel);
    const int64_t together = a.floats ? kProductRows : kScanRows;
    for (int64_t n = begin; n < end; n += together) {
      const int64_t rows = min64(together, end - n);
      panel_products<I>(a, n, rows, first, width, &s->panel);
      for (int64_t m = n; m < n + rows; ++m) {
        const float* h = s->panel.h + (m - n) * kPanel;
        if (is_screened(a)) {
          offer<I, true>(a, s->panel, m, range, first, width, h, s->select);
        } else {
          offer<I, false>(a, s->panel, m, range, first, width, h, s->select);
        }
      }
    }
  }
}

template <class I>
void encode_scan(const EncodeArgs& a, int64_t begin, int64_t end) {
  Memory memory(scan_bytes(a));
  ScanScratch s = scan_scratch(a, memory.data);
  if constexpr (I::kTiles) {
    if (a.tiles) I::begin_tiles();
  }
  for (int64_t i = begin; i < end; ++i) {
    const Item item = item_of(a, i);
    // Reading a copy of the weights again costs less than rows that do not stay in L2; rounding
    // the weights again would not.
    const int64_t all = item.row_end - item.row_begin, fit = (1 << 20) / (2 * a.D) / 32 * 32;
    const int64_t step = a.weight_tiles ? max64(64, fit) : max64(1, all);
    for (int64_t n = item.row_begin; n < item.row_end; n += step) {
      scan_rows<I>(a, item.range, n, min64(n + step, item.row_end), &s);
    }
  }
  if constexpr (I::kTiles) {
    if (a.tiles) I::end_tiles();
  }
}

template <class I>
void encode_plan(const EncodeArgs& a, int64_t begin, int64_t end, bool first) {
  Memory memory(list_bytes(a.ranges * a.capacity));
  const SelectScratch s = select_scratch(memory.data, a.ranges * a.capacity);
  for (int64_t n = begin; n < end; ++n) plan_row<I>(a, n, first, s);
}

// The planned dots of one item in feature order, so that weights come from memory once; eight at a
// time, for their rows are far apart.
template <class I, class T>
inline void rescore_item(const EncodeArgs& a, const Item& item) {
  constexpr int kTogether = 8;
  const int64_t D = a.D, from = range_begin(a, item.range);
  const int64_t features = range_begin(a, item.range + 1) - from;
  int64_t total = 0;
  for (int64_t n = item.row_begin; n < item.row_end; ++n) {
    total += list_of(a, n, item.range).tally->todo;
  }
  if (total == 0) return;
  Memory memory(4 * (features + 2) + 12 * (total + kTogether));
  int32_t* next = (int32_t*)memory.data;  // where the dots of feature f go, at f + 1
  int32_t* row = next + features + 2;
  int32_t* column = row + total + kTogether;
  float* dots = (float*)(column + total + kTogether);
  memset(next, 0, (size_t)(features + 2) * 4);
  for (int64_t n = item.row_begin; n < item.row_end; ++n) {
    const List l = list_of(a, n, item.range);
    for (int32_t i = 0; i < l.tally->todo; ++i) ++next[l.index[l.todo[i]] - from + 2];
  }
  for (int64_t f = 0; f < features; ++f) next[f + 2] += next[f + 1];
  for (int64_t n = item.row_begin; n < item.row_end; ++n) {
    const List l = list_of(a, n, item.range);
    for (int32_t i = 0; i < l.tally->todo; ++i) {
      const int32_t f = l.index[l.todo[i]], at = next[f - from + 1]++;
      row[at] = (int32_t)n;
      column[at] = f;
    }
  }
  for (int64_t i = 0; i < kTogether; ++i) {
    row[total + i] = row[total - 1];
    column[total + i] = column[total - 1];
  }
  for (int64_t e = 0; e < total; e += kTogether) {
    const float* x[kTogether];
    const T* w[kTogether];
    for (int64_t i = 0; i < kTogether; ++i) {
      x[i] = a.centred + row[e + i] * a.stride;
      w[i] = (const T*)a.W + column[e + i] * D;
    }
    dot_pairs<I, kTogether>(x, w, D, dots + e);
  }
  // The features fill once more in the same order, now at next[f].
  for (int64_t n = item.row_begin; n < item.row_end; ++n) {
    const List l = list_of(a, n, item.range);
    for (int32_t i = 0; i < l.tally->todo; ++i) {
      const int32_t at = l.todo[i], f = l.index[at];
      const float h = dots[next[f - from]++] + a.b_enc[f];
      // Comparing rounds as well; NaN and infinity are no evidence.
      const float bound = l.error[at] + 0x1p-20f * __builtin_fabsf(h);
      if (__builtin_fabsf(h - l.h[at]) > bound && __builtin_fabsf(h) < kHuge) {
        __atomic_store_n(a.stale, (uint8_t)1, __ATOMIC_RELAXED);
      }
      l.h[at] = h;
      l.error[at] = 0;
    }
  }
}

template <class I>
void encode_rescore(const EncodeArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (a.weight_type == DType::f32) rescore_item<I, float>(a, item_of(a, i));
    if (a.weight_type == DType::bf16) rescore_item<I, bf16>(a, item_of(a, i));
    if (a.weight_type == DType::f16) rescore_item<I, f16>(a, item_of(a, i));
  }
}

// Writes the active ones of `count` sorted entries, then padding: value 0 and the lowest unused
// indices.
inline void write_topk(const EncodeArgs& a, int64_t row, const int32_t* sorted, int64_t count,
                       const float* h, const int32_t* column, uint8_t* used) {
  float* values = a.values + row * a.k;
  int32_t* indices = a.indices + row * a.k;
  memset(used, 0, (size_t)a.k);
  int64_t active = 0;
  for (; active < count && !(h[sorted[active]] <= 0); ++active) {
    const int32_t f = column[sorted[active]];
    values[active] = h[sorted[active]];
    indices[active] = f;
    if (f < a.k) used[f] = 1;
  }
  for (int32_t f = 0; active < a.k; ++f) {
    if (used[f]) continue;
    values[active] = 0;
    indices[active++] = f;
  }
}

// Entries !(h <= max(θ, 0)) in ascending order, into a buffer of their own.
inline void write_threshold(const EncodeArgs& a, int64_t row, int64_t count, const float* h,
                            const int32_t* column) {
  int32_t* out = (int32_t*)malloc((size_t)(8 * count + 8));
  if (!out) out_of_memory();
  int64_t kept = 0;
  float* value = (float*)(out + count);
  for (int64_t i = 0; i < count; ++i) {
    const float theta = a.threshold[column[i]], floor = theta < 0 ? 0 : theta;
    out[kept] = column[i];
    value[kept] = h[i];
    kept += !(h[i] <= floor);
  }
  memmove(out + kept, value, (size_t)kept * 4);
  a.entries[row] = out;
  a.counts[row] = kept;
}

template <class I>
void encode_write(const EncodeArgs& a, int64_t begin, int64_t end) {
  const int64_t most = a.ranges * a.capacity, bytes = a.threshold ? 0 : list_bytes(most);
  Memory memory(bytes + 8 * most + a.k);
  const SelectScratch s = select_scratch(memory.data, most);
  float* h = (float*)(memory.data + bytes);
  int32_t* column = (int32_t*)(h + most);
  for (int64_t n = begin; n < end; ++n) {
    if (a.left[n]) continue;
    int64_t count = 0;
    for (int64_t r = 0; r < a.ranges; ++r) {
      const List l = list_of(a, n, r);
      if (l.tally->count == kOverflow) a.left[n] = 1;
      for (int32_t i = 0; i < l.tally->count; ++i) {
        h[count] = l.h[i];
        column[count++] = l.index[i];
      }
    }
    if (a.left[n]) continue;
    if (a.threshold) {
      write_threshold(a, a.rows[n], count, h, column);
      continue;
    }
    for (int64_t i = 0; i < count; ++i) {
      s.greater[i] = (int32_t)i;
      s.keys[i] = order_key(h[i]);
    }
    count = reduce_to_k<I>(s.greater, s.keys, count, a.k, s.equal);
    sort_by_key(s.greater, s.keys, count, s.packed);
    write_topk(a, a.rows[n], s.greater, count, h, column, (uint8_t*)(column + most));
  }
}

}  // namespace
}  // namespace fastsae
