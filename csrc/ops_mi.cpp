// Bindings of mi_topk; schemas in fastsae/ops/schema.py.
#include <algorithm>

#include "binding.h"
#include "workspace.h"

namespace fastsae {
namespace {

int64_t split_tiles(int64_t N, int64_t D, int64_t parts) {
  return (N + 31) / 32 * 2 * ((D + 31) / 32) * parts;
}

void split(const Tensor& x, const char* name, int64_t parts, bool columns, bf16* tiles) {
  MiSplitArgs a{};
  check(x, name, 2);
  STD_TORCH_CHECK(kernels().tiles, name, ": tiles need AMX");
  a.x = x.const_data_ptr();
  a.type = dtype_of(x, name);
  a.N = x.size(0);
  a.D = x.size(1);
  a.parts = parts;
  a.columns = columns;
  a.tiles = tiles;
  STD_TORCH_CHECK(parts == 3 || (parts == 1 && a.type == DType::bf16), name,
                  ": one part holds bfloat16 only");
  parallel((a.N + 31) / 32 * 2, 64 * a.D,
           [&](int64_t begin, int64_t end) { kernels().mi_split(a, begin, end); });
}

Tensor mi_words(const Tensor& words, int64_t parts) {
  check(words, "words", 2);
  const int64_t count = split_tiles(words.size(0), words.size(1), parts);
  Tensor tiles = make({count, 512}, ScalarType::BFloat16);
  split(words, "words", parts, true, (bf16*)tiles.mutable_data_ptr());
  return tiles;
}

void mi_product(const Tensor& features, const Tensor& word_tiles, int64_t V, int64_t parts,
                double scale, const std::vector<Tensor>& sums, const std::vector<Tensor>& logits) {
  MiProductArgs a{};
  check(features, "features", 2);
  a.n = features.size(0);
  a.D = features.size(1);
  a.V = V;
  a.parts = parts;
  a.scale = (float)scale;
  check(word_tiles, "word_tiles", 2, 512);
  STD_TORCH_CHECK(word_tiles.scalar_type() == ScalarType::BFloat16 &&
                      word_tiles.size(0) == split_tiles(V, a.D, parts),
                  "word_tiles: not of these words");
  a.words = (const bf16*)word_tiles.const_data_ptr();
  if (!sums.empty()) {
    STD_TORCH_CHECK(sums.size() == 2, "sums: expected maximum and sum");
    floats(sums[0], "maximum", 1, V);
    floats(sums[1], "sum", 1, V);
    a.column_max = (float*)sums[0].mutable_data_ptr();
    a.column_sum = (float*)sums[1].mutable_data_ptr();
  }
  if (!logits.empty()) {
    floats(logits[0], "logits", 2, V);
    STD_TORCH_CHECK(logits[0].size(0) == a.n, "logits: expected ", a.n, " rows");
    a.logits = (float*)logits[0].mutable_data_ptr();
  }
  const size_t tiles = (size_t)split_tiles(a.n, a.D, parts) * 512;
  Workspace w(tiles * sizeof(bf16));
  bf16* rows = w.take<bf16>(tiles);
  split(features, "features", parts, false, rows);
  a.features = rows;
  parallel((V + kMiWords - 1) / kMiWords, kMiWords * a.n * a.D,
           [&](int64_t begin, int64_t end) { kernels().mi_product(a, begin, end); });
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
  m.impl("_mi_words", TORCH_BOX(&fastsae::mi_words));
  m.impl("_mi_product", TORCH_BOX(&fastsae::mi_product));
  m.impl("_mi_columns", TORCH_BOX(&fastsae::mi_columns));
  m.impl("_mi_topk", TORCH_BOX(&fastsae::mi_rows));
}
