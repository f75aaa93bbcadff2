// Exact top-k of a row by group maxima: the k-th largest group maximum bounds the k-th largest
// value from below, so only groups that reach it are read again. No sampling, no histogram.
#pragma once
#include "dot.h"
#include "kernels.h"

namespace fastsae {
namespace {

constexpr int64_t kBlock =
    256;  // columns per block: 16 lanes, each the maximum of 16 columns 16 apart

struct SelectScratch {
  float* maxima;     // [blocks * 16]
  int32_t* keys;     // [F + 16]
  int32_t* greater;  // [F + 16]
  int32_t* equal;    // [F + 16]
  int64_t* packed;   // [2 * (F + 16)]
};

inline int64_t block_count(int64_t F) { return (F + kBlock - 1) / kBlock; }

inline int64_t select_bytes(int64_t F) {
  return block_count(F) * 64 + 3 * 4 * (F + 16) + 2 * 8 * (F + 16);
}

inline SelectScratch select_scratch(char* memory, int64_t F) {
  SelectScratch s;
  s.packed = (int64_t*)memory;
  s.maxima = (float*)(s.packed + 2 * (F + 16));
  s.keys = (int32_t*)(s.maxima + block_count(F) * 16);
  s.greater = s.keys + F + 16;
  s.equal = s.greater + F + 16;
  return s;
}

template <class I>
inline int64_t count_at_least(const int32_t* keys, int64_t n, int32_t t) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += keys[i] >= t;
  return count;
}

// A threshold t with count(keys >= t) >= k, and count(keys > t) < k unless the former is at most
// k + slack. Bisection: no data-dependent branch inside the counting loop, and it stops early.
template <class I>
inline int32_t kth_key(const int32_t* keys, int64_t n, int64_t k, int64_t slack = 0) {
  int32_t low = keys[0], high = keys[0];
  for (int64_t i = 1; i < n; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  int64_t lo = low, hi = high;
  while (lo < hi) {
    const int64_t middle = lo + (hi - lo + 1) / 2;
    const int64_t count = count_at_least<I>(keys, n, (int32_t)middle);
    if (count >= k) lo = middle;
    if (count >= k && count <= k + slack) break;
    if (count < k) hi = middle - 1;
  }
  return (int32_t)lo;
}

// Maxima of the 16 lanes of every block; returns whether the row holds a NaN. Four parts of the row
// are read side by side and fetched 1 KB ahead: one stream does not fill the memory's pipe. Between
// the blocks `meanwhile(begin, end)` has the processor, for a range of the row's columns each.
template <class I, class Meanwhile>
inline bool block_maxima(const float* row, int64_t F, float* maxima, Meanwhile meanwhile) {
  constexpr int kParts = 4;
  const int64_t part = F / (kParts * kBlock) * kBlock;
  const float lowest = -__builtin_inff();
  uint32_t nan = 0;
  for (int64_t b = 0; b < part; b += kBlock) {
    typename I::Vec best[kParts];
    for (int p = 0; p < kParts; ++p) best[p] = I::set1(lowest);
    for (int64_t j = b; j < b + kBlock; j += 32) {
      for (int p = 0; p < kParts; ++p) {
        const float* at = row + p * part + j;
        __builtin_prefetch(at + 256);
        __builtin_prefetch(at + 272);
        const typename I::Vec a = I::load(at), c = I::load(at + 16);
        nan |= I::unordered(a, c);
        best[p] = I::max(I::max(a, c), best[p]);
      }
    }
    for (int p = 0; p < kParts; ++p) I::store(maxima + (p * part + b) / 16, best[p]);
    meanwhile(kParts * b, kParts * (b + kBlock));
  }
  meanwhile(kParts * part, F);
  for (int64_t begin = kParts * part; begin < F; begin += kBlock) {
    typename I::Vec best = I::set1(lowest);
    const int64_t end = min64(begin + kBlock, F);
    for (int64_t j = begin; j < end; j += 16) {
      const int rest = (int)min64(16, end - j);
      const typename I::Vec a = rest == 16 ? I::load(row + j) : I::load_n(row + j, rest, lowest);
      nan |= I::unordered(a, a);
      best = I::max(a, best);
    }
    I::store(maxima + begin / 16, best);
  }
  return nan != 0;
}

// A lower bound of the row's k-th largest value, from its block maxima (at least k of them exist).
template <class I>
inline float maxima_bound(const float* maxima, int64_t blocks, int64_t k, int32_t* keys) {
  if (blocks < 4 * k) {
    for (int64_t i = 0; i < blocks * 16; ++i) keys[i] = order_key(maxima[i]);
    return key_to_float(kth_key<I>(keys, blocks * 16, k));
  }
  int64_t n = 0;  // second level: 16 blocks to one vector, still at least 4k groups
  for (int64_t b = 0; b < blocks; b += 16, n += 16) {
    typename I::Vec best = I::load(maxima + b * 16);
    for (int64_t i = b + 1; i < min64(b + 16, blocks); ++i) {
      best = I::max(I::load(maxima + i * 16), best);
    }
    float lane[16];
    I::store(lane, best);
    for (int l = 0; l < 16; ++l) keys[n + l] = order_key(lane[l]);
  }
  return key_to_float(kth_key<I>(keys, n, k));
}

// Keeps exactly min(k, n) of n listed columns: the largest keys, ties to the lower position in the
// list. Rewrites `index`; keys follow. `spare` holds the ties for a moment.
template <class I>
inline int64_t reduce_to_k(int32_t* index, int32_t* keys, int64_t n, int64_t k, int32_t* spare) {
  if (n <= k) return n;
  const int32_t t = kth_key<I>(keys, n, k);
  int64_t kept = 0, ties = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t column = index[i], key = keys[i];
    if (key > t) {
      index[kept] = column;
      keys[kept++] = key;
    } else if (key == t && ties < k) {
      spare[ties++] = column;
    }
  }
  for (int64_t i = 0; kept < k; ++i, ++kept) {
    index[kept] = spare[i];
    keys[kept] = t;
  }
  return kept;
}

// Stable least-significant-digit radix sort, descending by the key in the upper half.
inline void radix_sort(int64_t* items, int64_t* spare, int64_t n) {
  for (int shift = 32; shift < 64; shift += 8) {
    int64_t start[257] = {0};
    for (int64_t i = 0; i < n; ++i) {
      ++start[256 - (((uint64_t)items[i] ^ 0x8000000000000000u) >> shift & 255)];
    }
    for (int d = 0; d < 256; ++d) start[d + 1] += start[d];
    for (int64_t i = 0; i < n; ++i) {
      const int digit = 255 - (int)(((uint64_t)items[i] ^ 0x8000000000000000u) >> shift & 255);
      spare[start[digit]++] = items[i];
    }
    int64_t* swap = items;
    items = spare;
    spare = swap;
  }
}

// Sorts n columns by descending key, then ascending column, in place.
inline void sort_by_key(int32_t* index, const int32_t* keys, int64_t n, int64_t* packed) {
  for (int64_t i = 0; i < n; ++i) {
    packed[i] = (int64_t)((uint64_t)(uint32_t)keys[i] << 32 | (uint32_t)~index[i]);
  }
  if (n > 128) {
    // Stable, so the columns have to be ascending within equal keys: they are, see the callers.
    radix_sort(packed, packed + n, n);
    for (int64_t i = 0; i < n; ++i) index[i] = (int32_t)~(uint32_t)packed[i];
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    int64_t rank = 0;
    for (int64_t j = 0; j < n; ++j) rank += packed[j] > packed[i];
    index[rank] = (int32_t)~(uint32_t)packed[i];
  }
}

// The k largest of a row through its keys: any k, NaN included, a few passes over the row.
template <class I>
inline void select_by_keys(const float* row, int64_t F, int64_t k, const SelectScratch& s) {
  for (int64_t i = 0; i < F; ++i) s.keys[i] = order_key(row[i]);
  for (int64_t i = F; i < F + 16; ++i) s.keys[i] = INT32_MIN;  // below every key
  const int32_t t = kth_key<I>(s.keys, F, k);
  int64_t above = 0, ties = 0;
  for (int64_t j = 0; j < F; j += 16) {
    above += I::compress(s.greater + above, I::gt_key(s.keys + j, t), (int32_t)j);
    if (ties < k) ties += I::compress(s.equal + ties, I::eq_key(s.keys + j, t), (int32_t)j);
  }
  for (int64_t i = 0; above < k; ++i, ++above) s.greater[above] = s.equal[i];
}

// The k largest of a row without NaN through its block maxima, in steps: `look` has to pass all of
// its columns in ascending order, for ties, and until `end` the row, its maxima and the lists in
// the scratch stay as they are.
template <class I>
struct Selection {
  const float* row = nullptr;  // null: none under way
  float* maxima;
  float bound;
  int64_t above, ties;

  inline void begin(const float* r, int64_t F, int64_t k, float* m, const SelectScratch& s) {
    row = r;
    maxima = m;
    bound = maxima_bound<I>(m, block_count(F), k, s.keys);
    above = ties = 0;
  }
  // Lists the columns [begin, end) that reach the bound; `begin` starts a block.
  inline void look(int64_t begin, int64_t end, int64_t k, const SelectScratch& s) {
    const typename I::Vec limit = I::set1(bound);
    for (; begin < end; begin += kBlock) {
      if (!I::ge(I::load(maxima + begin / 16), limit)) continue;
      const int64_t stop = min64(begin + kBlock, end);
      for (int64_t quarter = begin; quarter < stop; quarter += 64) {  // most hold none
        uint32_t any = quarter + 64 > stop;
        if (!any) {
          for (int64_t j = quarter; j < quarter + 64; j += 16) any |= I::ge(I::load(row + j), limit);
        }
        if (any) list(quarter, min64(quarter + 64, stop), k, s);
      }
    }
  }
  inline void list(int64_t begin, int64_t end, int64_t k, const SelectScratch& s) {
    const typename I::Vec limit = I::set1(bound);
    for (int64_t j = begin; j < end; j += 16) {
      const int rest = (int)min64(16, end - j);
      const uint32_t valid = (1u << rest) - 1;
      const typename I::Vec v = rest == 16 ? I::load(row + j) : I::load_n(row + j, rest, 0.0f);
      above += I::compress(s.greater + above, I::gt(v, limit) & valid, (int32_t)j);
      if (ties < k) ties += I::compress(s.equal + ties, I::eq(v, limit) & valid, (int32_t)j);
    }
  }
  // Leaves the columns in s.greater, ascending within equal values.
  inline void end(int64_t k, const SelectScratch& s) {
    for (int64_t i = 0; i < above; ++i) s.keys[i] = order_key(row[s.greater[i]]);
    above = reduce_to_k<I>(s.greater, s.keys, above, k, s.equal + min64(ties, k));
    for (int64_t i = 0; above < k && i < ties; ++i, ++above) s.greater[above] = s.equal[i];
    row = nullptr;
  }
};

inline bool maxima_pay(int64_t F, int64_t k) { return 2 * k <= block_count(F) * 16 && F >= 512; }

// Columns in s.greater, which are the k largest, by descending value; NaN above +inf.
inline void sort_selected(const float* row, int64_t k, const SelectScratch& s) {
  for (int64_t i = 0; i < k; ++i) s.keys[i] = order_key(row[s.greater[i]]);
  sort_by_key(s.greater, s.keys, k, s.packed);
}

// Columns of the k largest, sorted: descending, ties to the lower column, NaN above +inf.
// They are left in s.greater.
template <class I>
inline void select_topk(const float* row, int64_t F, int64_t k, const SelectScratch& s) {
  if (maxima_pay(F, k) && !block_maxima<I>(row, F, s.maxima, [](int64_t, int64_t) {})) {
    Selection<I> selection;
    selection.begin(row, F, k, s.maxima, s);
    selection.look(0, F, k, s);
    selection.end(k, s);
  } else {
    select_by_keys<I>(row, F, k, s);
  }
  sort_selected(row, k, s);
}

template <class I, class T>
inline void topk_typed(const TopkArgs& a, int64_t begin, int64_t end) {
  const T* x = (const T*)a.x;
  T* values = (T*)a.values;
  constexpr bool kFloat = sizeof(T) == sizeof(float);
  const bool pays = maxima_pay(a.F, a.k);
  const int64_t lanes = block_count(a.F) * 16;  // maxima of a row
  Memory memory(select_bytes(a.F) + 4 * (lanes + (kFloat ? 0 : 2 * a.F)));
  const SelectScratch s = select_scratch(memory.data, a.F);
  float* spare = (float*)(memory.data + select_bytes(a.F));
  const auto write = [&](int64_t n, const float* row) {
    sort_selected(row, a.k, s);
    for (int64_t i = 0; i < a.k; ++i) {
      a.indices[n * a.k + i] = s.greater[i];
      values[n * a.k + i] = x[n * a.F + s.greater[i]];
    }
  };
  Selection<I> last;  // of the row before: its steps come between the reads of the row
  const auto finish = [&](int64_t n) {
    if (!last.row) return;
    const float* row = last.row;
    last.end(a.k, s);
    write(n, row);
  };
  for (int64_t n = begin; n < end; ++n) {
    const float* row;
    if constexpr (kFloat) {
      row = x + n * a.F;
    } else {
      float* copy = spare + lanes + n % 2 * a.F;
      widen_row(x + n * a.F, a.F, copy);
      row = copy;
    }
    float* own = n % 2 ? spare : s.maxima;
    const auto meanwhile = [&](int64_t from, int64_t to) {
      if (last.row) last.look(from, to, a.k, s);
    };
    const bool nan = pays && block_maxima<I>(row, a.F, own, meanwhile);
    finish(n - 1);
    if (pays && !nan) {
      last.begin(row, a.F, a.k, own, s);
    } else {
      select_by_keys<I>(row, a.F, a.k, s);
      write(n, row);
    }
  }
  if (last.row) last.look(0, a.F, a.k, s);
  finish(end - 1);
}

template <class I>
void topk_rows(const TopkArgs& a, int64_t begin, int64_t end) {
  if (a.dtype == DType::f32) topk_typed<I, float>(a, begin, end);
  if (a.dtype == DType::bf16) topk_typed<I, bf16>(a, begin, end);
  if (a.dtype == DType::f16) topk_typed<I, f16>(a, begin, end);
}

}  // namespace
}  // namespace fastsae
