// Binding of topk; schema in fastsae/ops/schema.py.
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
  constexpr int64_t kMost = (1LL << 31) - (1 << 15);  // MOST_COLUMNS in fastsae/ops/topk.py
  STD_TORCH_CHECK(a.F <= kMost, "x: got rows of ", a.F, ", expected at most ", kMost);
  STD_TORCH_CHECK(k >= 0 && k <= a.F, "k: got ", k, ", expected 0 to ", a.F);
  Tensor values = make({N, k}, x.scalar_type()), indices = make({N, k}, ScalarType::Int);
  a.x = x.const_data_ptr();
  a.values = values.mutable_data_ptr();
  a.indices = (int32_t*)indices.mutable_data_ptr();
  if (k == 0) return {values, indices};
  parallel(N, a.F, [&](int64_t begin, int64_t end) { kernels().topk_rows(a, begin, end); });
  return {values, indices};
}

}  // namespace
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("_topk_rows", TORCH_BOX(&fastsae::topk_rows));
}
