// The few columns of a row that can still be members, kept while pre-activations stream by.
//
// A row meets the features in `ranges` ranges, each with a list of its own in ascending order: the
// column, its pre-activation h and a bound of h's error (0: h is the exact value). `floor` is a
// lower bound of the k-th largest exact value, or 0: members <= 0 need not be found.
#pragma once
#include "panel.h"
#include "topk.h"

namespace fastsae {
namespace {

inline bool is_screened(const EncodeArgs& a) { return a.floats || a.tiles || a.words; }

constexpr int32_t kOverflow = -1;  // Tally::count of a row that is left to the full path

struct List {
  int32_t* index;
  float *h, *error;
  int32_t* todo;  // positions that the next rescoring computes
  Tally* tally;
};

inline List list_of(const EncodeArgs& a, int64_t n, int64_t range) {
  const int64_t at = n * a.ranges + range, begin = at * a.capacity;
  return {a.index + begin, a.h + begin, a.error + begin, a.todo + begin, a.tally + at};
}

// Order-preserving key of a lower bound of the exact value; a NaN that is not exact bounds nothing.
inline int32_t lower_key(float h, float error) {
  const float lower = h - error;
  return (lower != lower) & (error != 0) ? INT32_MIN : order_key(lower);
}

// Keeps the entries that can reach `floor`; returns how many. Lists have room for 16 more.
template <class I>
inline int32_t prune(const List& l, int32_t count, float floor) {
  const typename I::Vec limit = I::set1(floor);
  int32_t kept = 0;
  for (int32_t i = 0; i < count; i += 16) {
    const typename I::Vec h = I::load(l.h + i), error = I::load(l.error + i);
    const typename I::Vec index = I::load((const float*)l.index + i);  // bits, moved unread
    uint32_t mask = I::not_lt(I::add(h, error), limit);
    if (i + 16 > count) mask &= (1u << (count - i)) - 1;
    I::compress(l.h + kept, mask, h);
    I::compress(l.error + kept, mask, error);
    I::compress((float*)l.index + kept, mask, index);
    kept += __builtin_popcount(mask);
  }
  return kept;
}

// A full list: raises the floor by what the list itself proves, and drops what is below it.
template <class I>
inline void compact(const EncodeArgs& a, const List& l, const SelectScratch& s) {
  Tally& t = *l.tally;
  for (int32_t i = 0; i < t.count; ++i) s.keys[i] = lower_key(l.h[i], l.error[i]);
  const bool screened = is_screened(a);
  if (!screened && t.count > a.k) {
    // Exact values: nothing but the first k members of the list so far can be members of the row.
    const int32_t kth = kth_key<I>(s.keys, t.count, a.k);
    int64_t ties = a.k;
    for (int32_t i = 0; i < t.count; ++i) ties -= s.keys[i] > kth;
    int32_t kept = 0;
    for (int32_t i = 0; i < t.count; ++i) {
      if (s.keys[i] < kth || (s.keys[i] == kth && ties-- <= 0)) continue;
      l.index[kept] = l.index[i];
      l.h[kept++] = l.h[i];
    }
    float lowest = __builtin_inff();
    for (int32_t i = 0; i < kept; ++i) lowest = l.h[i] < lowest ? l.h[i] : lowest;
    if (kept == a.k) t.floor = lowest > t.floor ? lowest : t.floor;
    t.count = kept;
  } else if (screened) {
    if (t.count >= a.k) {
      // Any bound will do that is nearly as good: an exact one costs three times the passes.
      const float proven = key_to_float(kth_key<I>(s.keys, t.count, a.k, a.k / 8 + 4));
      t.floor = proven > t.floor ? proven : t.floor;
    }
    t.count = prune<I>(l, t.count, t.floor);
  }
  const int64_t room = a.capacity - kPanel - 16;
  t.limit = (int32_t)min64(room, max64(2 * t.count, t.count + kPanel));
  if (t.count > room) t.count = kOverflow;
}

// Offers `width` pre-activations of one row, columns first.. on, to its list.
template <class I, bool kScreened>
inline void offer(const EncodeArgs& a, const Panel& p, int64_t n, int64_t range, int64_t first,
                  int64_t width, const float* screen, const SelectScratch& s) {
  const List l = list_of(a, n, range);
  Tally& t = *l.tally;
  if (t.count == kOverflow) return;
  Bound<I> bound;
  if constexpr (kScreened) bound.set(a, n);
  const typename I::Vec zero = I::set1(0), floor = I::set1(t.floor);
  int32_t count = t.count;
  for (int64_t j = 0; j < width; j += 16) {
    const typename I::Vec b = I::load(p.bias + j), h = I::add(I::load(screen + j), b);
    const typename I::Vec e =
        kScreened ? bound.error(h, b, I::load(p.norms + j), I::load(p.errors + j)) : zero;
    // max returns its second operand for NaN: a NaN threshold stays one, and keeps its column.
    const typename I::Vec limit = a.threshold ? I::max(zero, I::load(p.threshold + j)) : floor;
    uint32_t mask = kScreened ? I::not_lt(I::add(h, e), limit) : I::not_le(h, limit);
    if (j + 16 > width) mask &= (1u << (width - j)) - 1;
    // No branch: whether a vector holds a candidate is anybody's guess.
    I::compress(l.h + count, mask, h);
    I::compress(l.error + count, mask, e);
    count += I::compress(l.index + count, mask, (int32_t)(first + j));
  }
  t.count = count;
  if (count <= t.limit) return;
  if (a.threshold) {
    t.count = kOverflow;
  } else {
    compact<I>(a, l, s);
  }
}

// Raises the floor of a whole row by all of its lists, drops what is below it, and lists what the
// next rescoring computes: first the k that screen best, whose exact values raise the floor again;
// then everything left. Of a threshold's candidates, everything.
template <class I>
inline void plan_row(const EncodeArgs& a, int64_t n, bool first, const SelectScratch& s) {
  int64_t total = 0;
  for (int64_t r = 0; r < a.ranges; ++r) {
    const List l = list_of(a, n, r);
    if (l.tally->count == kOverflow) {
      a.left[n] = 1;
      for (int64_t q = 0; q < a.ranges; ++q) {
        Tally* other = list_of(a, n, q).tally;
        other->count = other->todo = 0;
      }
      return;
    }
    for (int32_t i = 0; i < l.tally->count; ++i) s.keys[total++] = lower_key(l.h[i], l.error[i]);
  }
  float floor = 0;
  if (!a.threshold && total >= a.k) {
    const float proven = key_to_float(kth_key<I>(s.keys, total, a.k));
    floor = proven > 0 ? proven : 0;
  }
  int32_t seed = INT32_MIN;
  if (!a.threshold) {
    total = 0;
    for (int64_t r = 0; r < a.ranges; ++r) {
      const List l = list_of(a, n, r);
      l.tally->count = prune<I>(l, l.tally->count, floor);
      for (int32_t i = 0; i < l.tally->count; ++i) s.keys[total++] = order_key(l.h[i]);
    }
    if (first && total > a.k) seed = kth_key<I>(s.keys, total, a.k);
  }
  for (int64_t r = 0; r < a.ranges; ++r) {
    const List l = list_of(a, n, r);
    int32_t todo = 0;
    for (int32_t i = 0; i < l.tally->count; ++i) {
      l.todo[todo] = i;
      todo += l.error[i] != 0 && order_key(l.h[i]) >= seed;  // NaN: an error that is not 0
    }
    l.tally->todo = todo;
  }
}

}  // namespace
}  // namespace fastsae
