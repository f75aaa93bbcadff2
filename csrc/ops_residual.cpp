// Bindings of steer_residual_'s work around steer on a CPU; schema in fastsae/ops/schema.py.
#include <algorithm>
#include <tuple>

#include "binding.h"

namespace fastsae {
namespace {

ResidualArgs residual_args(const Tensor& hidden, const std::optional<Tensor>& residual) {
  ResidualArgs a{};
  const int64_t dims = hidden.dim();
  STD_TORCH_CHECK(dims > 0, "hidden: expected [..., D]");
  check(hidden, "hidden", dims);
  a.D = hidden.size(dims - 1);
  a.type = dtype_of(hidden, "hidden");
  a.hidden = hidden.mutable_data_ptr();
  if (residual) {
    check(*residual, "residual", residual->dim());
    STD_TORCH_CHECK(
        residual->numel() == hidden.numel() && dtype_of(*residual, "residual") == a.type,
        "residual: expected a tensor like hidden");
    a.residual = residual->mutable_data_ptr();
  }
  return a;
}

// slots, strengths, finish and watched hold an entry for each row of hidden and may hold more. Of
// the rows that have a slot or a finish: x, which they are, and their entries of the other three.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_rows(
    const Tensor& hidden, const std::optional<Tensor>& residual, const Tensor& slots,
    const Tensor& strengths, const std::optional<Tensor>& finish,
    const std::optional<Tensor>& watched) {
  ResidualArgs a = residual_args(hidden, residual);
  const int64_t N = a.D ? hidden.numel() / a.D : 0;
  const int32_t* slot = ints(slots, "slots", 1, -1);
  const float* strength = floats(strengths, "strengths", 1, slots.size(0));
  const int32_t* last = finish ? ints(*finish, "finish", 1, slots.size(0)) : nullptr;
  const int32_t* watch = watched ? ints(*watched, "watched", 1, slots.size(0)) : nullptr;
  STD_TORCH_CHECK(N <= slots.size(0), "hidden: got ", N, " rows, the buffers hold ",
                  slots.size(0));
  const auto chosen = [&](int64_t n) { return slot[n] != 0 || (last && last[n] != 0); };
  int64_t rows = 0;
  for (int64_t n = 0; n < N; ++n) rows += chosen(n);
  Tensor x = make({rows, a.D}, hidden.scalar_type());
  Tensor index = make({rows}, ScalarType::Long);
  Tensor my_slots = make({rows}, ScalarType::Int);
  Tensor my_watch = make({rows}, ScalarType::Int);
  Tensor my_strengths = make({rows}, ScalarType::Float);
  int64_t* at = (int64_t*)index.mutable_data_ptr();
  int32_t* to_slot = (int32_t*)my_slots.mutable_data_ptr();
  int32_t* to_watch = (int32_t*)my_watch.mutable_data_ptr();
  float* to_strength = (float*)my_strengths.mutable_data_ptr();
  for (int64_t n = 0, i = 0; n < N; ++n) {
    if (!chosen(n)) continue;
    at[i] = n;
    to_slot[i] = slot[n];
    to_watch[i] = watch ? watch[n] : 0;
    to_strength[i++] = strength[n];
  }
  a.index = at;
  a.x = x.mutable_data_ptr();
  parallel(rows, 2 * a.D,
           [&](int64_t begin, int64_t end) { kernels().residual_take(a, begin, end); });
  return {x, index, my_slots, my_strengths, my_watch};
}

// y [n, D] into the rows that x [n, D] came from; `took` seconds by the slots they are watched in.
void residual_put(Tensor hidden, const std::optional<Tensor>& residual, const Tensor& x,
                  const Tensor& y, const Tensor& index, const Tensor& watched,
                  const std::optional<Tensor>& seconds, double took) {
  ResidualArgs a = residual_args(hidden, residual);
  const int64_t n = index.numel(), N = a.D ? hidden.numel() / a.D : 0;
  for (const Tensor* each : {&x, &y}) {
    check(*each, "x, y", 2, a.D);
    STD_TORCH_CHECK(each->size(0) == n && dtype_of(*each, "x, y") == a.type,
                    "x, y: expected a row like hidden's for each index");
  }
  check(index, "index", 1, n);
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long, "index: expected int64");
  a.index = (const int64_t*)index.const_data_ptr();
  STD_TORCH_CHECK(std::all_of(a.index, a.index + n, [&](int64_t i) { return i >= 0 && i < N; }),
                  "index: expected rows of hidden");
  a.x = x.mutable_data_ptr();
  a.y = y.const_data_ptr();
  parallel(n, 2 * a.D,
           [&](int64_t begin, int64_t end) { kernels().residual_put(a, begin, end); });
  if (!seconds) return;
  const int32_t* slot = ints(watched, "watched", 1, n);
  check(*seconds, "seconds", 1);
  STD_TORCH_CHECK(seconds->scalar_type() == ScalarType::Double, "seconds: expected float64");
  check_range(slot, n, seconds->size(0), "watched");
  double* sum = (double*)seconds->mutable_data_ptr();
  for (int64_t i = 0; i < n; ++i) sum[slot[i]] += took / (double)n;
}

}  // namespace
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("_residual_rows", TORCH_BOX(&fastsae::residual_rows));
  m.impl("_residual_put", TORCH_BOX(&fastsae::residual_put));
}
