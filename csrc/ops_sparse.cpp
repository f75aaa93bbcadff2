// Bindings of the gradients of sparse codes and the training step; schemas in fastsae/ops/schema.py.
#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "binding.h"

namespace fastsae {
namespace {

// The entries with value != 0 sorted by feature, in their old order within a feature.
struct InverseIndex {
  std::vector<int64_t> offsets;
  std::unique_ptr<float[]> values;
  std::unique_ptr<int32_t[]> rows;
};

// Each thread counts, then places, a range of rows; its places come after those of earlier rows, so
// the result does not depend on the number of threads.
InverseIndex invert(const float* values, const int32_t* indices, int64_t N, int64_t K, int64_t F) {
  const int64_t most = std::max<int64_t>(1, N * K / std::max<int64_t>(F, 16384));
  const int64_t parts = std::min<int64_t>(torch::stable::get_num_threads(), most);
  std::vector<int64_t> next((size_t)(parts * F));
  const auto each = [&](auto&& entry) {
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        for (int64_t n = N * part / parts; n < N * (part + 1) / parts; ++n) {
          for (int64_t i = n * K; i < (n + 1) * K; ++i) {
            if (values[i] != 0) entry(n, i, next[(size_t)(part * F + indices[i])]);
          }
        }
      }
    });
  };
  each([](int64_t, int64_t, int64_t& count) { ++count; });
  InverseIndex inverse;
  inverse.offsets.resize((size_t)F + 1);
  int64_t total = 0;
  for (int64_t f = 0; f < F; ++f) {
    inverse.offsets[(size_t)f] = total;
    for (int64_t part = 0; part < parts; ++part) {
      total += std::exchange(next[(size_t)(part * F + f)], total);
    }
  }
  inverse.offsets[(size_t)F] = total;
  inverse.values.reset(new float[(size_t)total]);
  inverse.rows.reset(new int32_t[(size_t)total]);
  each([&](int64_t n, int64_t i, int64_t& at) {
    inverse.values[(size_t)at] = values[i];
    inverse.rows[(size_t)at] = (int32_t)n;
    ++at;
  });
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
  Tensor dW = make_large({F, D}, ScalarType::Float), db = make({F}, ScalarType::Float);
  SparseOuterArgs a{};
  a.values = inverse.values.get();
  a.rows = inverse.rows.get();
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

// [F, D] or [n] parameter and its two moments, written in place.
void parameter(std::vector<Tensor>& state, size_t at, const char* name, int64_t dims, int64_t last,
               float** out) {
  for (size_t i = 0; i < 3; ++i) {
    floats(state[at + i], name, dims, last);
    STD_TORCH_CHECK(state[at + i].numel() == state[at].numel(), name, ": unequal moments");
    out[i] = (float*)state[at + i].mutable_data_ptr();
  }
}

// The batch's entries by feature, as the training kernels read them.
struct Code {
  InverseIndex inverse;
  std::vector<float> slopes;
  CodeArgs args{};

  Code(const Tensor& values, const Tensor& indices, const Tensor& g, const Tensor& x, int64_t F,
       int64_t D) {
    check(values, "values", 2);
    const int64_t N = values.size(0), K = values.size(1);
    const float* value = floats(values, "values", 2, K);
    const int32_t* index = ints(indices, "indices", 2, K);
    args.g = floats(g, "g", 2, D);
    args.x = floats(x, "x", 2, D);
    STD_TORCH_CHECK(indices.size(0) == N && g.size(0) == N && x.size(0) == N,
                    "values, indices, g, x: expected the same number of rows");
    check_range(index, N * K, F, "indices");
    inverse = invert(value, index, N, K, F);
    slopes.resize((size_t)inverse.offsets[(size_t)F]);
    args.values = inverse.values.get();
    args.slopes = slopes.data();
    args.rows = inverse.rows.get();
    args.offsets = inverse.offsets.data();
    args.N = N;
    args.D = D;
  }
};

// Ends of about `shares` ranges of features of equal work; a feature costs as much as `own` entries.
std::vector<int64_t> cut(const int64_t* offsets, int64_t F, int64_t shares, int64_t own) {
  const int64_t share = (offsets[F] + own * F + shares - 1) / shares;
  std::vector<int64_t> cuts{0};
  for (int64_t f = 0; f < F; ++f) {
    const int64_t since = offsets[f + 1] - offsets[cuts.back()] + own * (f + 1 - cuts.back());
    if (since >= share || f + 1 == F) cuts.push_back(f + 1);
  }
  return cuts;
}

std::tuple<Tensor, Tensor, Tensor> code_gradients(const Tensor& values, const Tensor& indices,
                                                  const Tensor& g, const Tensor& x,
                                                  const Tensor& W) {
  check(W, "W", 2);
  const int64_t F = W.size(0), D = W.size(1);
  Code code(values, indices, g, x, F, D);
  Tensor dW_dec = make({F, D}, ScalarType::Float), dW_enc = make({F, D}, ScalarType::Float);
  Tensor db_enc = make({F}, ScalarType::Float);
  CodeGradientArgs a{code.args, floats(W, "W", 2, D), (float*)dW_dec.mutable_data_ptr(),
                     (float*)dW_enc.mutable_data_ptr(), (float*)db_enc.mutable_data_ptr()};
  // Every range reads all of g and x, slice by slice.
  const std::vector<int64_t> cuts = cut(code.args.offsets, F, torch::stable::get_num_threads(), 1);
  torch::stable::parallel_for(0, (int64_t)cuts.size() - 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernels().code_gradients(a, cuts[i], cuts[i + 1]);
  });
  return {dW_dec, dW_enc, db_enc};
}

void train_rows(const Tensor& values, const Tensor& indices, const Tensor& g, const Tensor& x,
                const Tensor& db_dec, const std::optional<Tensor>& extra_slot,
                std::vector<Tensor> extra, std::vector<Tensor> state, double lr, double beta1,
                double beta2, double eps, int64_t t) {
  STD_TORCH_CHECK(state.size() == 12, "state: expected 4 parameters with 2 moments each");
  check(state[0], "W_enc", 2);
  const int64_t F = state[0].size(0), D = state[0].size(1);
  Code code(values, indices, g, x, F, D);
  TrainArgs a{};
  a.code = code.args;
  float* b_dec[3];
  parameter(state, 0, "W_enc", 2, D, a.W_enc);
  parameter(state, 3, "b_enc", 1, F, a.b_enc);
  parameter(state, 6, "W_dec", 2, D, a.W_dec);
  parameter(state, 9, "b_dec", 1, D, b_dec);
  STD_TORCH_CHECK(state[6].size(0) == F, "W_dec: expected the shape of W_enc");
  if (extra_slot) {
    STD_TORCH_CHECK(extra.size() == 3, "extra: expected gradients of W_dec, W_enc and b_enc");
    const int64_t rows = extra[0].size(0);
    a.extra_dec = floats(extra[0], "extra", 2, D);
    a.extra_enc = floats(extra[1], "extra", 2, D);
    a.extra_bias = floats(extra[2], "extra", 1, rows);
    STD_TORCH_CHECK(extra[1].size(0) == rows, "extra: expected equally many rows");
    a.extra_slot = ints(*extra_slot, "extra_slot", 1, F);
    STD_TORCH_CHECK(*std::max_element(a.extra_slot, a.extra_slot + F) < rows,
                    "extra_slot: got values up to ", rows, " or more, expected rows of extra");
  }
  a.adam = {(float)beta1, (float)beta2, (float)eps, (float)(lr / (1 - std::pow(beta1, (double)t))),
            (float)(1 / std::sqrt(1 - std::pow(beta2, (double)t)))};
  // A fixed number of shares, each with its own sum for b_dec: the bits do not depend on the number
  // of threads.
  const std::vector<int64_t> cuts = cut(code.args.offsets, F, 64, 3);
  const int64_t shares = (int64_t)cuts.size() - 1;
  std::vector<float> shifts((size_t)(shares * D));
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels().train_features(a, shifts.data() + i * D, cuts[i], cuts[i + 1]);
    }
  });
  const float* base = floats(db_dec, "db_dec", 1, D);
  std::vector<float> grad(base, base + D);
  for (int64_t i = 0; i < shares; ++i) {
    for (int64_t j = 0; j < D; ++j) grad[j] -= shifts[(size_t)(i * D + j)];
  }
  kernels().adam_vector(a.adam, grad.data(), b_dec, D);
}

int64_t set_isa(const std::string& name) { return use_isa(name.c_str()); }
std::string get_isa() { return kernels().name; }

}  // namespace
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("_sparse_outer", TORCH_BOX(&fastsae::sparse_outer));
  m.impl("_code_gradients", TORCH_BOX(&fastsae::code_gradients));
  m.impl("_train_rows", TORCH_BOX(&fastsae::train_rows));
}

STABLE_TORCH_LIBRARY_IMPL(fastsae, CompositeExplicitAutograd, m) {
  m.impl("_set_isa", TORCH_BOX(&fastsae::set_isa));
  m.impl("_get_isa", TORCH_BOX(&fastsae::get_isa));
}
