// Bindings of decode, its gradients, and steer; schemas in fastsae/ops/schema.py.
#include <algorithm>

#include "binding.h"

namespace fastsae {
namespace {

ScalarType promoted(DType a, DType b) {
  const DType result = a == b ? a : DType::f32;
  if (result == DType::bf16) return ScalarType::BFloat16;
  return result == DType::f16 ? ScalarType::Half : ScalarType::Float;
}

// Small operands are widened here, so that kernels only meet fp32.
Tensor widened(const Tensor& t, const char* name) {
  const DType type = dtype_of(t, name);
  if (type == DType::f32) return t;
  Tensor out = make({t.numel()}, ScalarType::Float);
  float* wide = (float*)out.mutable_data_ptr();
  const void* data = t.const_data_ptr();
  for (int64_t i = 0; i < t.numel(); ++i) {
    wide[i] =
        type == DType::bf16 ? to_float(((const bf16*)data)[i]) : to_float(((const f16*)data)[i]);
  }
  return out;
}

Tensor decode_rows(const Tensor& values, const Tensor& indices, const Tensor& W,
                   const std::optional<Tensor>& bias) {
  check(values, "values", 2);
  check(W, "W", 2);
  const int64_t N = values.size(0), K = values.size(1), D = W.size(1);
  DecodeArgs a{};
  a.indices = ints(indices, "indices", 2, K);
  STD_TORCH_CHECK(indices.size(0) == N, "indices: expected the shape of values");
  check_range(a.indices, N * K, W.size(0), "indices");
  a.value_type = dtype_of(values, "values");
  a.weight_type = dtype_of(W, "W");
  const ScalarType type = promoted(a.value_type, a.weight_type);
  Tensor out = make({N, D}, type);
  std::optional<Tensor> wide;
  if (bias) {
    check(*bias, "b", 1, D);
    wide = widened(*bias, "b");
    a.bias = (const float*)wide->const_data_ptr();
  }
  a.values = values.const_data_ptr();
  a.W = W.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.out_type = dtype_of(out, "out");
  a.K = K;
  a.D = D;
  // Too few rows to occupy every thread: cut their columns, unless there is little to add up.
  const int64_t threads = torch::stable::get_num_threads();
  a.slices = N < threads && K * D > 65536 ? std::min(threads, D / 64 + 1) : 1;
  parallel(N * a.slices, K * D / a.slices,
           [&](int64_t begin, int64_t end) { kernels().decode_rows(a, begin, end); });
  return out;
}

Tensor gather_dot(const Tensor& g, const Tensor& W, const Tensor& indices) {
  check(g, "g", 2);
  check(W, "W", 2, g.size(1));
  GatherDotArgs a{};
  const int64_t N = g.size(0), K = indices.size(1);
  a.indices = ints(indices, "indices", 2, K);
  STD_TORCH_CHECK(indices.size(0) == N, "indices: expected one row per row of g");
  check_range(a.indices, N * K, W.size(0), "indices");
  Tensor out = make({N, K}, ScalarType::Float);
  a.g = g.const_data_ptr();
  a.g_type = dtype_of(g, "g");
  a.W = W.const_data_ptr();
  a.weight_type = dtype_of(W, "W");
  a.out = (float*)out.mutable_data_ptr();
  a.K = K;
  a.D = g.size(1);
  parallel(N, K * a.D,
           [&](int64_t begin, int64_t end) { kernels().gather_dot_rows(a, begin, end); });
  return out;
}

// The entries with value != 0 sorted by feature, in their old order within a feature.
struct InverseIndex {
  std::vector<int64_t> offsets;
  std::vector<float> values;
  std::vector<int32_t> rows;
};

InverseIndex invert(const float* values, const int32_t* indices, int64_t N, int64_t K, int64_t F) {
  InverseIndex inverse;
  inverse.offsets.assign((size_t)F + 2, 0);
  int64_t* next =
      inverse.offsets.data() + 1;  // next[f] is the write position, in the end offsets[f+1]
  for (int64_t i = 0; i < N * K; ++i) {
    if (values[i] != 0) ++next[indices[i] + 1];
  }
  for (int64_t f = 0; f < F; ++f) next[f + 1] += next[f];
  inverse.values.resize((size_t)next[F]);
  inverse.rows.resize((size_t)next[F]);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t i = n * K; i < (n + 1) * K; ++i) {
      if (values[i] == 0) continue;
      const int64_t at = next[indices[i]]++;
      inverse.values[(size_t)at] = values[i];
      inverse.rows[(size_t)at] = (int32_t)n;
    }
  }
  return inverse;
}

std::tuple<Tensor, Tensor> sparse_outer(const Tensor& values, const Tensor& indices,
                                        const Tensor& g, int64_t F) {
  check(values, "values", 2);
  check(g, "g", 2);
  const int64_t N = values.size(0), K = values.size(1), D = g.size(1);
  const int32_t* index = ints(indices, "indices", 2, K);
  STD_TORCH_CHECK(indices.size(0) == N && g.size(0) == N,
                  "values, indices, g: expected the same number of rows");
  check_range(index, N * K, F, "indices");
  const Tensor wide = widened(values, "values");
  const InverseIndex inverse = invert((const float*)wide.const_data_ptr(), index, N, K, F);
  Tensor dW = make({F, D}, ScalarType::Float), db = make({F}, ScalarType::Float);
  SparseOuterArgs a{};
  a.values = inverse.values.data();
  a.rows = inverse.rows.data();
  a.offsets = inverse.offsets.data();
  a.g = g.const_data_ptr();
  a.g_type = dtype_of(g, "g");
  a.dW = (float*)dW.mutable_data_ptr();
  a.db = (float*)db.mutable_data_ptr();
  a.D = D;
  a.column_end = D;
  // Threads own ranges of features with about equal work; a feature that alone exceeds a share is
  // cut by columns afterwards. Neither changes an order of summation.
  const int64_t threads = torch::stable::get_num_threads(), shares = 4 * threads;
  const int64_t total = a.offsets[F] + F, share = (total + shares - 1) / shares;
  std::vector<int64_t> cuts{0}, heavy;
  for (int64_t f = 0; f < F; ++f) {
    const bool alone = threads > 1 && a.offsets[f + 1] - a.offsets[f] > share;
    if (alone) heavy.push_back(f);
    const int64_t since = a.offsets[f + 1] + f + 1 - a.offsets[cuts.back()] - cuts.back();
    if (alone || since >= share || f + 1 == F) cuts.push_back(f + 1);
  }
  torch::stable::parallel_for(0, (int64_t)cuts.size() - 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const bool skip_last = std::binary_search(heavy.begin(), heavy.end(), cuts[i + 1] - 1);
      kernels().sparse_outer_features(a, cuts[i], cuts[i + 1] - (skip_last ? 1 : 0));
    }
  });
  const int64_t slices = (D + 63) / 64;
  torch::stable::parallel_for(0, (int64_t)heavy.size() * slices, 1,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  SparseOuterArgs part = a;
                                  part.column_begin = i % slices * 64;
                                  part.column_end = std::min(D, part.column_begin + 64);
                                  const int64_t f = heavy[(size_t)(i / slices)];
                                  kernels().sparse_outer_features(part, f, f + 1);
                                }
                              });
  return {dW, db};
}

Tensor steer_rows(const Tensor& x, const Tensor& slots, const Tensor& strengths,
                  std::vector<Tensor> table) {
  check(x, "x", 2);
  STD_TORCH_CHECK(table.size() == 14, "table: expected the 14 fields of SteerTable");
  const int64_t N = x.size(0), D = x.size(1), R = table[0].size(0), S = table[4].size(0);
  SteerArgs s{};
  SteerTableArgs& t = s.table;
  t.R = R;
  t.S = S;
  t.P = table[4].size(1);
  t.items = table[8].size(0);
  t.enc = floats(table[0], "enc", 2, D);
  t.bias = floats(table[1], "bias", 1, R);
  t.theta = floats(table[2], "theta", 1, R);
  t.dec = floats(table[3], "dec", 2, D);
  t.op_kind = ints(table[4], "op_kind", 2, t.P);
  t.op_begin = ints(table[5], "op_begin", 2, t.P);
  t.op_end = ints(table[6], "op_end", 2, t.P);
  t.op_scalar = floats(table[7], "op_scalar", 2, t.P);
  t.item_row = ints(table[8], "item_row", 1, t.items);
  t.item_value = floats(table[9], "item_value", 1, t.items);
  t.gate_begin = ints(table[10], "gate_begin", 1, S);
  t.gate_end = ints(table[11], "gate_end", 1, S);
  t.gate_above = floats(table[12], "gate_above", 1, S);
  t.norm_preserve = ints(table[13], "norm_preserve", 1, S);
  s.slots = ints(slots, "slots", 1, N);
  s.strengths = floats(strengths, "strengths", 1, N);
  s.x_type = dtype_of(x, "x");
  s.x = x.const_data_ptr();
  s.D = D;
  check_range(s.slots, N, S, "slots");
  if (std::any_of(s.slots, s.slots + N, [](int32_t slot) { return slot != 0; })) {
    check_range(t.item_row, t.items, R, "item_row");
    check_range(t.op_begin, S * t.P, t.items + 1, "op_begin");
    check_range(t.op_end, S * t.P, t.items + 1, "op_end");
    check_range(t.gate_begin, S, t.items + 1, "gate_begin");
    check_range(t.gate_end, S, t.items + 1, "gate_end");
  }
  Tensor out = make({N, D}, x.scalar_type());
  s.out = out.mutable_data_ptr();
  parallel(N, D * 16, [&](int64_t begin, int64_t end) { kernels().steer_rows(s, begin, end); });
  return out;
}

int64_t set_isa(const std::string& name) { return use_isa(name.c_str()); }
std::string get_isa() { return kernels().name; }

}  // namespace
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("_decode_rows", TORCH_BOX(&fastsae::decode_rows));
  m.impl("_gather_dot", TORCH_BOX(&fastsae::gather_dot));
  m.impl("_sparse_outer", TORCH_BOX(&fastsae::sparse_outer));
  m.impl("_steer_rows", TORCH_BOX(&fastsae::steer_rows));
}

STABLE_TORCH_LIBRARY_IMPL(fastsae, CompositeExplicitAutograd, m) {
  m.impl("_set_isa", TORCH_BOX(&fastsae::set_isa));
  m.impl("_get_isa", TORCH_BOX(&fastsae::get_isa));
}
