// Bindings of decode and what else reads its codes; schemas in fastsae/ops/schema.py.
#include <algorithm>
#include <atomic>

#include "binding.h"
#include "workspace.h"

namespace fastsae {
namespace {

ScalarType promoted(DType a, DType b) {
  const DType result = a == b ? a : DType::f32;
  if (result == DType::bf16) return ScalarType::BFloat16;
  return result == DType::f16 ? ScalarType::Half : ScalarType::Float;
}

// Whether rows of W are read so often that it pays to bring blocks of them into L2 first, and how
// large those are. Sums are the same either way.
bool use_blocks(DecodeArgs* a) {
  constexpr int64_t kL2Floats = 1 << 18;  // of all W: it stays there by itself
  constexpr int64_t kBlockBytes = 512 << 10, kRows = 4096;
  constexpr int64_t kReads = 5;  // of a weight, and entries of a row in a block, at least
  const int64_t size = a->weight_type == DType::f32 ? 4 : 2;
  const int64_t threads = torch::stable::get_num_threads();
  a->slices = (a->D + kDecodeColumns - 1) / kDecodeColumns;
  if (a->N == 0 || a->F * a->D <= kL2Floats) return false;
  const int64_t blocks =
      std::max((a->N + kRows - 1) / kRows, (threads + a->slices - 1) / a->slices);
  a->block_rows = (a->N + blocks - 1) / blocks;
  a->block_features = std::min(a->F, kBlockBytes / (kDecodeColumns * size));
  return a->block_rows * a->K > kReads * a->F && a->K * a->block_features > kReads * a->F;
}

void decode_blocks(DecodeArgs a) {
  const int64_t items = a.slices * ((a.N + a.block_rows - 1) / a.block_rows);
  const int64_t parts = std::min<int64_t>(items, torch::stable::get_num_threads());
  const int64_t bytes =
      4 * kDecodeColumns * a.block_features + 4 * (kDecodeColumns + 1) * a.block_rows + 64;
  Workspace w((size_t)(8 * a.N * a.K + 4 * a.N + parts * bytes + 256));
  a.sorted_values = w.take<float>((size_t)(a.N * a.K));
  a.sorted_indices = w.take<int32_t>((size_t)(a.N * a.K));
  a.counts = w.take<int32_t>((size_t)a.N);
  char* scratch = w.take<char>((size_t)(parts * bytes));
  parallel(a.N, 16 * a.K, [&](int64_t b, int64_t e) { kernels().decode_sort(a, b, e); });
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      DecodeArgs own = a;
      own.scratch = scratch + part * bytes / 64 * 64;
      kernels().decode_blocks(own, items * part / parts, items * (part + 1) / parts);
    }
  });
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
  a.N = N;
  a.K = K;
  a.D = D;
  a.F = W.size(0);
  if (use_blocks(&a)) {
    decode_blocks(a);
    return out;
  }
  // Too few rows to occupy every thread: cut their columns, unless there is little to add up.
  const int64_t threads = torch::stable::get_num_threads();
  a.slices = N < threads && K * D > 65536 ? std::min(threads, D / 64 + 1) : 1;
  parallel(N * a.slices, K * D / a.slices,
           [&](int64_t begin, int64_t end) { kernels().decode_rows(a, begin, end); });
  return out;
}

// Whether a row of `dense` has these codes' bits and no other. Codes are few, so most groups of cache
// lines are zero: an OR of them all, and a count only where it is not. Four parts of the row are read
// side by side, as in block_maxima; then the row is in the cache.
template <class Bits>
bool holds_row(const Bits* dense, int64_t F, const Bits* values, const int32_t* indices,
               int64_t K) {
  constexpr int64_t kBlock = 256 / sizeof(Bits), kLine = 64 / sizeof(Bits), kParts = 4;
  constexpr int64_t kAhead = 1024 / sizeof(Bits);
  int64_t left = 0;
  const auto count = [&](int64_t begin, int64_t end) {
    Bits any = 0;
    for (int64_t f = begin; f < end; ++f) any |= dense[f];
    for (int64_t f = begin; any && f < end; ++f) left += dense[f] != 0;
  };
  const int64_t part = F / (kParts * kBlock) * kBlock;
  for (int64_t begin = 0; begin < part; begin += kBlock) {
    for (int64_t p = 0; p < kParts; ++p) {
      const int64_t at = p * part + begin;
      for (int64_t f = at; f < at + kBlock; f += kLine) __builtin_prefetch(dense + f + kAhead);
      count(at, at + kBlock);
    }
  }
  for (int64_t begin = kParts * part; begin < F; begin += kBlock) {
    count(begin, min64(begin + kBlock, F));
  }
  for (int64_t k = 0; k < K; ++k) {
    if ((Bits)(values[k] << 1) == 0) continue;  // zero of either sign
    if (dense[indices[k]] != values[k]) return false;
    --left;
  }
  return left == 0;
}

bool holds_codes(const Tensor& dense, const Tensor& values, const Tensor& indices) {
  check(dense, "dense", 2);
  const int64_t N = dense.size(0), F = dense.size(1), K = values.size(1);
  check(values, "values", 2, K);
  const int32_t* index = ints(indices, "indices", 2, K);
  const DType type = dtype_of(dense, "dense");
  STD_TORCH_CHECK(values.size(0) == N && indices.size(0) == N, "values: expected a row per row");
  STD_TORCH_CHECK(dtype_of(values, "values") == type, "values: expected the dtype of dense");
  check_range(index, N * K, F, "indices");
  std::atomic<bool> all{true};
  parallel(N, F, [&](int64_t begin, int64_t end) {
    const void *rows = dense.const_data_ptr(), *codes = values.const_data_ptr();
    for (int64_t n = begin; n < end && all.load(std::memory_order_relaxed); ++n) {
      const int32_t* at = index + n * K;
      const bool holds =
          type == DType::f32
              ? holds_row((const uint32_t*)rows + n * F, F, (const uint32_t*)codes + n * K, at, K)
              : holds_row((const uint16_t*)rows + n * F, F, (const uint16_t*)codes + n * K, at, K);
      if (!holds) all.store(false, std::memory_order_relaxed);
    }
  });
  return all.load();
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

}  // namespace
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("_decode_rows", TORCH_BOX(&fastsae::decode_rows));
  m.impl("_holds_codes", TORCH_BOX(&fastsae::holds_codes));
  m.impl("_gather_dot", TORCH_BOX(&fastsae::gather_dot));
}
