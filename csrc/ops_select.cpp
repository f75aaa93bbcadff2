// Bindings of topk and mi_topk; schemas in fastsae/ops/schema.py.
#include <algorithm>

#include "binding.h"

namespace fastsae {
namespace {

std::tuple<Tensor, Tensor> topk_rows(const Tensor& x, int64_t k) {
  check(x, "x", 2);
  TopkArgs a{};
  const int64_t N = x.size(0);
  a.F = x.size(1);
  a.k = k;
  a.dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(k >= 0 && k <= a.F, "k: got ", k, ", expected 0 to ", a.F);
  Tensor values = make({N, k}, x.scalar_type()), indices = make({N, k}, ScalarType::Int);
  a.x = x.const_data_ptr();
  a.values = values.mutable_data_ptr();
  a.indices = (int32_t*)indices.mutable_data_ptr();
  if (k == 0) return {values, indices};
  parallel(N, a.F, [&](int64_t begin, int64_t end) { kernels().topk_rows(a, begin, end); });
  return {values, indices};
}

MiArgs mi_args(const Tensor& logits, double scale) {
  MiArgs a{};
  check(logits, "logits", 2);
  a.n = logits.size(0);
  a.V = logits.size(1);
  a.logits = floats(logits, "logits", 2, a.V);
  a.scale = (float)scale;
  return a;
}

void mi_columns(const Tensor& logits, double scale, const Tensor& maximum, const Tensor& sum) {
  MiArgs a = mi_args(logits, scale);
  floats(maximum, "maximum", 1, a.V);
  floats(sum, "sum", 1, a.V);
  a.column_max = (float*)maximum.mutable_data_ptr();
  a.column_sum = (float*)sum.mutable_data_ptr();
  parallel((a.V + 255) / 256, 256 * a.n, [&](int64_t begin, int64_t end) {
    kernels().mi_columns(a, begin * 256, std::min(end * 256, a.V));
  });
}

std::tuple<Tensor, Tensor> mi_rows(const Tensor& logits, const Tensor& column_lse, double scale,
                                   int64_t objective, double log_features, int64_t top) {
  MiArgs a = mi_args(logits, scale);
  a.column_lse = floats(column_lse, "column_lse", 1, a.V);
  STD_TORCH_CHECK(objective >= 0 && objective < 4, "objective: expected 0 to 3");
  STD_TORCH_CHECK(top >= 1 && top <= a.V, "top: got ", top, ", expected 1 to ", a.V);
  a.objective = (Objective)objective;
  a.log_features = (float)log_features;
  a.top = top;
  Tensor scores = make({a.n, top}, ScalarType::Float), indices = make({a.n, top}, ScalarType::Int);
  a.scores = (float*)scores.mutable_data_ptr();
  a.indices = (int32_t*)indices.mutable_data_ptr();
  parallel(a.n, 8 * a.V, [&](int64_t begin, int64_t end) { kernels().mi_rows(a, begin, end); });
  return {scores, indices};
}

}  // namespace
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("_topk_rows", TORCH_BOX(&fastsae::topk_rows));
  m.impl("_mi_columns", TORCH_BOX(&fastsae::mi_columns));
  m.impl("_mi_topk", TORCH_BOX(&fastsae::mi_rows));
}
