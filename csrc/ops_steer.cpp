// Bindings of steer; schemas in fastsae/ops/schema.py.
#include <algorithm>

#include "binding.h"

namespace fastsae {
namespace {

// Items [begin, end) exist and name rows of the table; the kernels index with them unchecked.
void check_items(const SteerTableArgs& t, int64_t begin, int64_t end, const char* what) {
  if (end <= begin) return;  // reads nothing
  STD_TORCH_CHECK(begin >= 0 && end <= t.items, what, "_begin, ", what, "_end: got ", begin, " to ",
                  end, ", expected a range within the ", t.items, " items");
  check_range(t.item_row + begin, end - begin, t.R, "item_row");
}

void check_slot(const SteerTableArgs& t, int64_t slot) {
  check_items(t, t.gate_begin[slot], t.gate_end[slot], "gate");
  for (int64_t at = slot * t.P; at < (slot + 1) * t.P; ++at) {
    if (t.op_kind[at] != 0) check_items(t, t.op_begin[at], t.op_end[at], "op");
  }
}

SteerTableArgs table_args(const std::vector<Tensor>& table, int64_t D) {
  SteerTableArgs t{};
  const int64_t R = t.R = table[0].size(0), S = t.S = table[4].size(0);
  const int64_t P = t.P = table[4].size(1), items = t.items = table[8].size(0);
  t.enc = floats(table[0], "enc", 2, D);
  t.bias = floats(table[1], "bias", 1, R);
  t.theta = floats(table[2], "theta", 1, R);
  t.dec = floats(table[3], "dec", 2, D);
  t.op_kind = ints(table[4], "op_kind", 2, P);
  t.op_begin = ints(table[5], "op_begin", 2, P);
  t.op_end = ints(table[6], "op_end", 2, P);
  t.op_scalar = floats(table[7], "op_scalar", 2, P);
  t.item_row = ints(table[8], "item_row", 1, items);
  t.item_value = floats(table[9], "item_value", 1, items);
  t.gate_begin = ints(table[10], "gate_begin", 1, S);
  t.gate_end = ints(table[11], "gate_end", 1, S);
  t.gate_above = floats(table[12], "gate_above", 1, S);
  t.norm_preserve = ints(table[13], "norm_preserve", 1, S);
  STD_TORCH_CHECK(table[3].size(0) == R, "dec: expected the rows of enc");
  constexpr const char* kPerSlot[] = {"op_begin", "op_end", "op_scalar"};
  for (int i = 0; i < 3; ++i) {
    STD_TORCH_CHECK(table[5 + i].size(0) == S, kPerSlot[i], ": expected as many slots as op_kind");
  }
  return t;
}

// The n entries of a contiguous tensor of one type.
template <class T>
const T* of(const Tensor& t, const char* name, ScalarType type, int64_t n) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == type && t.numel() == n,
                  name, ": expected ", n, " contiguous entries of its type");
  return (const T*)t.const_data_ptr();
}

// The rest of s for its N rows, whose slots are in the table. A call for one row must cost little
// beside the row: of the table only what the rows' slots read is checked, nothing if all are 0.
void run(SteerArgs& s, int64_t N, const std::vector<Tensor>& table, const Tensor& x, Tensor out) {
  if (std::any_of(s.slots, s.slots + N, [](int32_t slot) { return slot != 0; })) {
    s.table = table_args(table, s.D);
    for (int64_t n = 0; n < N; ++n) {
      if (s.slots[n] != 0 && (n == 0 || s.slots[n] != s.slots[n - 1])) {
        check_slot(s.table, s.slots[n]);
      }
    }
  }
  s.x_type = dtype_of(x, "x");
  s.x = x.const_data_ptr();
  s.out = out.mutable_data_ptr();
  parallel(N, s.D * 16, [&](int64_t begin, int64_t end) { kernels().steer_rows(s, begin, end); });
}

// x [..., D], a slot and a strength for each of its rows.
Tensor steer_rows(const Tensor& x, const Tensor& slots, const Tensor& strengths,
                  const std::vector<Tensor>& table) {
  STD_TORCH_CHECK(table.size() == 14, "table: expected the 14 fields of SteerTable");
  const int64_t dims = x.dim(), D = table[0].size(1);
  check(x, "x", std::max<int64_t>(dims, 1), D);
  SteerArgs s{};
  s.slots = ints(slots, "slots", dims - 1, -1);
  s.strengths = floats(strengths, "strengths", dims - 1, -1);
  for (int64_t i = 0; i + 1 < dims; ++i) {
    STD_TORCH_CHECK(slots.size(i) == x.size(i) && strengths.size(i) == x.size(i),
                    "slots, strengths: expected one entry per row of x");
  }
  s.D = D;
  check_range(s.slots, slots.numel(), table[4].size(0), "slots");
  Tensor out = make(x.sizes().data(), (size_t)x.dim(), x.scalar_type());
  run(s, slots.numel(), table, x, out);
  return out;
}

// Which of a forward's tokens a policy may change, in one pass over its rows; see _steer_tokens.
struct Tokens {
  const Tensor* mask;  // [B, columns], not 0: a token; its last columns before `end` are ours
  const Tensor* ids;   // [B or 1, T] positions, where there is no mask
  int64_t base, end, first;
  const int64_t* lengths;  // [count] of the rows' prompts; null: `phase` says it for all
  int64_t count, phase;
};

inline bool holds(const Tensor& mask, int64_t b, int64_t column) {
  const int64_t at = b * mask.stride(0) + column * mask.stride(1);
  if (mask.scalar_type() == ScalarType::Bool) return ((const bool*)mask.const_data_ptr())[at];
  return ((const int64_t*)mask.const_data_ptr())[at] != 0;
}

// Calls act(t, generated) for every token t of row b that may be steered: a real one, at `first` or
// a later position; generated: from the end of the row's prompt on.
template <class Act>
void each_token(const Tokens& w, int64_t b, int64_t B, int64_t T, const Act& act) {
  const bool generated = w.phase != 0;
  const int64_t length = w.lengths ? w.lengths[b / (B / w.count)] : 0;
  int64_t next = w.base;  // real tokens so far
  for (int64_t c = 0; w.mask && c < w.end - T; ++c) next += holds(*w.mask, b, c);
  for (int64_t t = 0; t < T; ++t) {
    if (w.mask && !holds(*w.mask, b, w.end - T + t)) continue;
    int64_t position = next++;
    if (w.ids) {
      const int64_t at = (w.ids->size(0) == 1 ? 0 : b) * w.ids->stride(0) + t * w.ids->stride(1);
      position = ((const int64_t*)w.ids->const_data_ptr())[at];
    }
    if (position >= w.first) act(t, w.lengths ? position >= length : generated);
  }
}

// A policy's slot and strength for each of R rows; B rows of x, several in turn of each (or all of
// the one). on_prompt, on_generated [R, 1]: the phases of its policy. What a token gets:
// slots[row] if it may be steered and is in a phase of the row's policy, else 0; counts[row] is how
// many got one. Nothing is allocated but a slot and a strength per token.
void steer_tokens(const Tensor& x, const std::optional<Tensor>& mask,
                  const std::optional<Tensor>& ids, int64_t base, int64_t end, int64_t first,
                  const Tensor& slots, const Tensor& strengths, const Tensor& on_prompt,
                  const Tensor& on_generated, const std::optional<Tensor>& lengths, int64_t phase,
                  Tensor counts, Tensor out, const std::vector<Tensor>& table) {
  STD_TORCH_CHECK(table.size() == 14, "table: expected the 14 fields of SteerTable");
  const int64_t R = slots.numel(), D = table[0].size(1);
  check(x, "x", 3, D);
  check(out, "out", 3, D);
  const int64_t B = x.size(0), T = x.size(1), N = B * T;
  STD_TORCH_CHECK(out.size(0) == B && out.size(1) == T && out.scalar_type() == x.scalar_type(),
                  "out: expected a tensor like x");
  const int32_t* slot_of = ints(slots, "slots", 2, 1);
  const float* strength_of = floats(strengths, "strengths", 2, 1);
  STD_TORCH_CHECK(R > 0 && B % R == 0 && strengths.numel() == R,
                  "slots, strengths: expected one entry per row of x");
  check_range(slot_of, R, table[4].size(0), "slots");
  const bool* phases[] = {of<bool>(on_prompt, "on_prompt", ScalarType::Bool, R),
                          of<bool>(on_generated, "on_generated", ScalarType::Bool, R)};
  int64_t* counted = (int64_t*)of<int64_t>(counts, "counts", ScalarType::Long, R);
  Tokens w{mask ? &*mask : nullptr, ids ? &*ids : nullptr, base, end, first, nullptr, 1, phase};
  if (mask) {
    const ScalarType type = mask->scalar_type();
    STD_TORCH_CHECK(mask->is_cpu() && mask->dim() == 2 && mask->size(0) == B &&
                        (type == ScalarType::Long || type == ScalarType::Bool) && end >= T &&
                        end <= mask->size(1),
                    "mask: expected int64 or bool for every row of x, up to its tokens");
  }
  if (ids) {
    STD_TORCH_CHECK(ids->is_cpu() && ids->dim() == 2 && ids->scalar_type() == ScalarType::Long &&
                        (ids->size(0) == B || ids->size(0) == 1) && ids->size(1) == T,
                    "ids: expected an int64 position for every token of x");
  }
  if (lengths) {
    w.count = lengths->numel();
    w.lengths = of<int64_t>(*lengths, "lengths", ScalarType::Long, w.count);
    STD_TORCH_CHECK(w.count > 0 && B % w.count == 0, "lengths: expected one per row of x");
  }
  Memory memory(8 * N);
  int32_t* mine = (int32_t*)memory.data;
  float* strength = (float*)(mine + N);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t row = b / (B / R);
    for (int64_t t = 0; t < T; ++t) mine[b * T + t] = 0, strength[b * T + t] = strength_of[row];
    if (slot_of[row] == 0) continue;
    each_token(w, b, B, T, [&](int64_t t, bool generated) {
      if (phases[generated][row]) mine[b * T + t] = slot_of[row];
    });
  }
  SteerArgs s{};
  s.slots = mine;
  s.strengths = strength;
  s.D = D;
  run(s, N, table, x, out);
  for (int64_t b = 0; b < B; ++b) {
    counted[b / (B / R)] += T - std::count(mine + b * T, mine + (b + 1) * T, 0);
  }
}

}  // namespace
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("_steer_rows", TORCH_BOX(&fastsae::steer_rows));
  m.impl("_steer_tokens", TORCH_BOX(&fastsae::steer_tokens));
}
