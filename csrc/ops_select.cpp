// Bindings of topk, encode and mi_topk; schemas in fastsae/ops/schema.py. The products that screen
// are torch.mm, called by fastsae/ops/native.py.
#include <algorithm>
#include <numeric>

#include "binding.h"

namespace fastsae {
namespace {

constexpr int64_t kDenseBytes = 64 << 20;  // pre-activations held at once by the full path

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

std::tuple<Tensor, Tensor, Tensor> encode_centre(const Tensor& x,
                                                 const std::optional<Tensor>& b_dec, bool screen) {
  check(x, "x", 2);
  CentreArgs a{};
  const int64_t N = x.size(0), D = x.size(1);
  Tensor centred = make({N, D}, ScalarType::Float), bounds = make({N, 2}, ScalarType::Float);
  Tensor rounded = make({screen ? N : 0, D}, ScalarType::BFloat16);
  a.x = x.const_data_ptr();
  a.x_type = dtype_of(x, "x");
  a.b_dec = b_dec ? floats(*b_dec, "b_dec", 1, D) : nullptr;
  a.centred = (float*)centred.mutable_data_ptr();
  a.bounds = (float*)bounds.mutable_data_ptr();
  a.screen = screen ? (bf16*)rounded.mutable_data_ptr() : nullptr;
  a.D = D;
  parallel(N, 4 * D, [&](int64_t begin, int64_t end) { kernels().centre_rows(a, begin, end); });
  return {centred, rounded, bounds};
}

std::tuple<Tensor, Tensor> encode_weights(const Tensor& W, bool screen) {
  check(W, "W", 2);
  WeightArgs a{};
  const int64_t F = W.size(0), D = W.size(1);
  Tensor norms = make({2, F}, ScalarType::Float);
  Tensor rounded = make({screen ? F : 0, D}, ScalarType::BFloat16);
  a.W = W.const_data_ptr();
  a.weight_type = dtype_of(W, "W");
  a.screen = screen ? (bf16*)rounded.mutable_data_ptr() : nullptr;
  a.norms = (float*)norms.mutable_data_ptr();
  a.errors = a.norms + F;
  a.D = D;
  parallel(F, 2 * D, [&](int64_t begin, int64_t end) { kernels().weight_rows(a, begin, end); });
  return {rounded, norms};
}

// What encode_topk and encode_threshold share: the screen pass, then the rows it left over.
struct Encode {
  EncodeArgs a{};
  std::vector<float> group_bounds;
  std::vector<uint8_t> left;
  std::vector<int64_t> rows;

  Encode(const Tensor& screen, const Tensor& centred, const Tensor& bounds, const Tensor& W,
         const Tensor& b_enc, const Tensor& norms, int64_t tile, int64_t capacity) {
    check(centred, "centred", 2);
    check(W, "W", 2, centred.size(1));
    a.N = centred.size(0);
    a.F = W.size(0);
    a.D = W.size(1);
    a.centred = floats(centred, "centred", 2, a.D);
    a.W = W.const_data_ptr();
    a.weight_type = dtype_of(W, "W");
    a.b_enc = floats(b_enc, "b_enc", 1, a.F);
    a.capacity = capacity;
    a.tile = tile;
    rows.resize((size_t)a.N);
    std::iota(rows.begin(), rows.end(), 0);
    a.rows = rows.data();
    if (screen.numel() == 0) {
      left.assign((size_t)a.N, 1);
      return;
    }
    STD_TORCH_CHECK(screen.numel() == a.N * a.F && tile > 0 && tile % 256 == 0,
                    "screen: expected N * F elements in tiles of a multiple of 256 columns");
    left.assign((size_t)a.N, 0);
    a.left = left.data();
    a.screen = screen.const_data_ptr();
    a.screen_type = dtype_of(screen, "screen");
    a.bounds = floats(bounds, "bounds", 2, 2);
    a.norms = floats(norms, "norms", 2, a.F);
    a.errors = a.norms + a.F;
    group_bounds.resize((size_t)((a.F + 255) / 256 * 48));
    kernels().group_bounds(a, group_bounds.data());
    a.group_bounds = group_bounds.data();
  }

  // Runs `kernel` on the screened rows, then on full rows of rescoring dots for what was left.
  void run(void (*kernel)(const EncodeArgs&, int64_t, int64_t)) {
    if (a.screen) {
      parallel(a.N, 4 * a.F, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
    }
    std::vector<int64_t> todo;
    for (int64_t n = 0; n < a.N; ++n) {
      if (left[(size_t)n]) todo.push_back(n);
    }
    // Rows share one pass over W; 32 of them stay in L2.
    const int64_t batch = std::min<int64_t>(32, std::max<int64_t>(1, kDenseBytes / (4 * a.F)));
    for (int64_t i = 0; i < (int64_t)todo.size(); i += batch) {
      run_dense(kernel, todo.data() + i, std::min(batch, (int64_t)todo.size() - i));
    }
  }

  void run_dense(void (*kernel)(const EncodeArgs&, int64_t, int64_t), const int64_t* which,
                 int64_t count) const {
    Memory memory(4 * count * (a.D + a.F));
    float* x = (float*)memory.data;
    for (int64_t i = 0; i < count; ++i) {
      std::copy_n(a.centred + which[i] * a.D, a.D, x + i * a.D);
    }
    DenseArgs dense{x, a.W, a.b_enc, x + count * a.D, a.weight_type, count, a.F, a.D};
    parallel(a.F, count * a.D,
             [&](int64_t begin, int64_t end) { kernels().dense_features(dense, begin, end); });
    EncodeArgs exact = a;
    exact.screen = dense.h;
    exact.screen_is_exact = true;
    exact.rows = which;
    parallel(count, a.F, [&](int64_t begin, int64_t end) { kernel(exact, begin, end); });
  }
};

std::tuple<Tensor, Tensor> encode_topk_rows(const Tensor& screen, const Tensor& centred,
                                            const Tensor& bounds, const Tensor& W,
                                            const Tensor& b_enc, const Tensor& norms, int64_t k,
                                            int64_t tile, int64_t capacity, bool exact) {
  Encode encode(screen, centred, bounds, W, b_enc, norms, tile, capacity);
  EncodeArgs& a = encode.a;
  STD_TORCH_CHECK(k >= 1 && k <= a.F, "k: got ", k, ", expected 1 to ", a.F);
  Tensor values = make({a.N, k}, ScalarType::Float), indices = make({a.N, k}, ScalarType::Int);
  a.k = k;
  a.exact = exact;
  a.values = (float*)values.mutable_data_ptr();
  a.indices = (int32_t*)indices.mutable_data_ptr();
  encode.run(kernels().encode_topk_rows);
  return {values, indices};
}

std::tuple<Tensor, Tensor, Tensor> encode_threshold_rows(const Tensor& screen,
                                                         const Tensor& centred,
                                                         const Tensor& bounds, const Tensor& W,
                                                         const Tensor& b_enc, const Tensor& norms,
                                                         const Tensor& threshold, int64_t tile,
                                                         int64_t capacity) {
  Encode encode(screen, centred, bounds, W, b_enc, norms, tile, capacity);
  EncodeArgs& a = encode.a;
  a.threshold = floats(threshold, "threshold", 1, a.F);
  struct Entries {  // frees the rows' buffers whatever happens
    std::vector<int32_t*> rows;
    ~Entries() {
      for (int32_t* row : rows) free(row);
    }
  } entries{std::vector<int32_t*>((size_t)a.N, nullptr)};
  Tensor offsets = make({a.N + 1}, ScalarType::Long);
  int64_t* offset = (int64_t*)offsets.mutable_data_ptr();
  offset[0] = 0;
  a.entries = entries.rows.data();
  a.counts = offset + 1;
  encode.run(kernels().encode_threshold_rows);
  for (int64_t n = 0; n < a.N; ++n) offset[n + 1] += offset[n];
  Tensor values = make({offset[a.N]}, ScalarType::Float);
  Tensor indices = make({offset[a.N]}, ScalarType::Int);
  float* value = (float*)values.mutable_data_ptr();
  int32_t* index = (int32_t*)indices.mutable_data_ptr();
  for (int64_t n = 0; n < a.N; ++n) {
    const size_t count = (size_t)(offset[n + 1] - offset[n]);
    if (count == 0) continue;
    memcpy(index + offset[n], entries.rows[(size_t)n], count * 4);
    memcpy(value + offset[n], entries.rows[(size_t)n] + count, count * 4);
  }
  return {values, indices, offsets};
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
  m.impl("_encode_centre", TORCH_BOX(&fastsae::encode_centre));
  m.impl("_encode_weights", TORCH_BOX(&fastsae::encode_weights));
  m.impl("_encode_topk_rows", TORCH_BOX(&fastsae::encode_topk_rows));
  m.impl("_encode_threshold_rows", TORCH_BOX(&fastsae::encode_threshold_rows));
  m.impl("_mi_columns", TORCH_BOX(&fastsae::mi_columns));
  m.impl("_mi_topk", TORCH_BOX(&fastsae::mi_rows));
}
