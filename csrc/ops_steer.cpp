// Binding of steer; schema in fastsae/ops/schema.py.
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

// An empty tensor like x, which is contiguous. torch::stable::empty would ask the dispatcher, at a
// tenth of the cost of an idle call.
Tensor make_like(const Tensor& x) {
  int32_t type;
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      x.dim(), x.sizes().data(), x.strides().data(), type, aoti_torch_device_type_cpu(), 0, &out));
  return Tensor(out);
}

// x [..., D], a slot and a strength for each of its rows. A call for one row must cost little beside
// the row: of the table only what the rows' slots read is checked, nothing if all are in slot 0.
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
  s.x_type = dtype_of(x, "x");
  s.x = x.const_data_ptr();
  s.D = D;
  const int64_t N = slots.numel();
  check_range(s.slots, N, table[4].size(0), "slots");
  if (std::any_of(s.slots, s.slots + N, [](int32_t slot) { return slot != 0; })) {
    s.table = table_args(table, D);
    for (int64_t n = 0; n < N; ++n) {
      if (s.slots[n] != 0 && (n == 0 || s.slots[n] != s.slots[n - 1])) {
        check_slot(s.table, s.slots[n]);
      }
    }
  }
  Tensor out = make_like(x);
  s.out = out.mutable_data_ptr();
  parallel(N, D * 16, [&](int64_t begin, int64_t end) { kernels().steer_rows(s, begin, end); });
  return out;
}

}  // namespace
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("_steer_rows", TORCH_BOX(&fastsae::steer_rows));
}
