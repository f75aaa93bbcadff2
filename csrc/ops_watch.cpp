// Binding of watch_; schema in fastsae/ops/schema.py.
#include <algorithm>

#include "binding.h"

namespace fastsae {
namespace {

// x, r [N, D] of one type, slots [N]; the fields of WatchTable, the last two written in the order
// of the rows.
void watch_rows(const Tensor& x, const Tensor& r, const Tensor& slots,
                const std::vector<Tensor>& table, Tensor sums, Tensor maxima) {
  STD_TORCH_CHECK(table.size() == 6, "table: expected the 6 fields of WatchTable that are read");
  WatchArgs w{};
  const int64_t N = x.size(0), D = w.D = x.size(1), J = w.J = table[0].size(1);
  const int64_t S = table[0].size(0);
  check(x, "x", 2);
  check(r, "r", 2, D);
  w.type = dtype_of(x, "x");
  STD_TORCH_CHECK(r.size(0) == N && dtype_of(r, "r") == w.type, "r: expected a tensor like x");
  w.x = x.const_data_ptr();
  w.r = r.const_data_ptr();
  w.slots = ints(slots, "slots", 1, N);
  check_range(w.slots, N, S, "slots");
  w.enc = floats(table[0], "enc", 3, D);
  w.bias = floats(table[1], "bias", 2, J);
  w.floor = floats(table[2], "floor", 2, J);
  w.gate = floats(table[3], "gate", 2, J);
  w.above = floats(table[4], "above", 1, S);
  w.count = ints(table[5], "count", 1, S);
  check_range(w.count, S, J + 1, "count");
  for (int i = 1; i < 4; ++i) {
    STD_TORCH_CHECK(table[i].size(0) == S, "bias, floor, gate: expected the slots of enc");
  }
  check(sums, "sums", 2, 4 + J);
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Double && sums.size(0) == S,
                  "sums: expected float64 for the slots of enc");
  floats(maxima, "maxima", 2, 1 + J);
  STD_TORCH_CHECK(maxima.size(0) == S, "maxima: expected the slots of enc");
  Memory memory(N * (4 + J) * (int64_t)sizeof(double));
  w.values = (double*)memory.data;
  parallel(N, D * 16, [&](int64_t begin, int64_t end) { kernels().watch_rows(w, begin, end); });
  double* sum = (double*)sums.mutable_data_ptr();
  float* most = (float*)maxima.mutable_data_ptr();
  for (int64_t n = 0; n < N; ++n) {
    const int64_t slot = w.slots[n];
    if (slot == 0) continue;
    const double* value = w.values + n * (4 + J);
    const int64_t used = 4 + w.count[slot];
    for (int64_t i = 0; i < used; ++i) sum[slot * (4 + J) + i] += value[i];
    float* highest = most + slot * (1 + J);
    for (int64_t i = 3; i < used; ++i) highest[i - 3] = std::max(highest[i - 3], (float)value[i]);
  }
}

}  // namespace
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("_watch_rows", TORCH_BOX(&fastsae::watch_rows));
}
