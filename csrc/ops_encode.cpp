// Bindings of encode_topk and encode_threshold; schemas in fastsae/ops/schema.py.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <numeric>

#include "binding.h"
#include "workspace.h"

namespace fastsae {
namespace {

constexpr int64_t kPanelRoom = 272;       // a list must hold one more panel, see candidates.h
constexpr int64_t kPanelBytes = 512 << 10;  // of bf16 weights: a panel stays in L2, beside the rows
constexpr int64_t kRanges = 8;            // more threads than that share ranges by rows

// Seconds of the last encode of this thread: rows, scan, plan, rescore, write, and the full path.
thread_local double stages[6];

struct Stage {
  double& seconds;
  std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();
  explicit Stage(int i) : seconds(stages[i]) {}
  ~Stage() {
    seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
};

enum class Screen : int64_t { none = 0, tiles = 1, bytes = 2 };

struct Problem {
  const void* x;  // [N, D] of x_type
  const float* b_dec;
  DType x_type;
  bool exact;
  EncodeArgs a;
};

size_t bytes_of(DType type) { return type == DType::f32 ? 4 : 2; }

// How a problem is cut: rows per tile, and the lists of a row.
struct Plan {
  int64_t tile, ranges, groups, capacity, wanted;

  Plan(const Problem& p, Screen screen, int64_t candidates, int64_t workspace) {
    const EncodeArgs& a = p.a;
    const int64_t threads = torch::stable::get_num_threads();
    ranges = std::min({threads, kRanges, (a.F + 255) / 256});
    groups = (threads + ranges - 1) / ranges;
    const int64_t width = (a.F + ranges - 1) / ranges + 256;  // of a range, whole panels
    // Exact lists of a top-k shrink to k; those of a threshold may need every feature.
    wanted = a.threshold ? (screen == Screen::none ? width : candidates) : std::max(candidates, 4 * a.k);
    capacity = (std::min(width, wanted) + kPanelRoom + 15) / 16 * 16;
    const int64_t row = ranges * (capacity * 16 + (int64_t)sizeof(Tally)) + 6 * (a.D + 32) + 144;
    tile = std::max<int64_t>(1, workspace / row);
    if (tile > 32) tile = tile / 32 * 32;
  }
};

template <class T>
void add_rows_to(const T* x, int64_t rows, int64_t D, float* sum) {
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t j = 0; j < D; ++j) sum[j] += to_float(x[n * D + j]);
  }
}

// The mean of rows x - b_dec, about which screens are taken; false where it is not finite.
bool mean_row(const CentreArgs& c, int64_t rows, float* mean, double* norm) {
  std::fill_n(mean, c.D, 0.0f);
  if (c.x_type == DType::f32) add_rows_to((const float*)c.x, rows, c.D, mean);
  if (c.x_type == DType::bf16) add_rows_to((const bf16*)c.x, rows, c.D, mean);
  if (c.x_type == DType::f16) add_rows_to((const f16*)c.x, rows, c.D, mean);
  double square = 0;
  for (int64_t j = 0; j < c.D; ++j) {
    mean[j] = mean[j] / (float)rows - (c.b_dec ? c.b_dec[j] : 0.0f);
    square += (double)mean[j] * mean[j];
  }
  *norm = std::sqrt(square) * (1.0 + 1e-6);
  return *norm < 1e18;
}

// The centre of a screen: that of the copy of the weights, or the mean of these rows.
void set_centre(CentreArgs* c, const float* given, int64_t rows, float* mean) {
  if (given) {
    double square = 0;
    for (int64_t j = 0; j < c->D; ++j) square += (double)given[j] * given[j];
    c->centre = given;
    c->centre_norm = std::sqrt(square) * (1.0 + 1e-6);
  } else if (mean_row(*c, rows, mean, &c->centre_norm)) {
    c->centre = mean;
  }
}

// Encodes rows [first, first + rows) of p; rows with too many candidates are marked in `left`.
void encode_tile(const Problem& p, const Plan& plan, Screen screen, int64_t first, int64_t rows,
                 const int64_t* outputs, uint8_t* left) {
  EncodeArgs a = p.a;
  const int64_t D = a.D, padded = (rows + 31) / 32 * 32, steps = (D + 31) / 32;
  const int64_t lists = rows * plan.ranges;
  Workspace w((size_t)(lists * (plan.capacity * 16 + (int64_t)sizeof(Tally)) +
                       padded * (4 * D + steps * 64 + 144) + 8 * D + 4096));
  a.N = rows;
  a.ranges = plan.ranges;
  a.groups = std::min(plan.groups, (rows + 31) / 32);
  a.capacity = plan.capacity;
  a.panel = std::clamp<int64_t>(kPanelBytes / (steps * 64) / 32 * 32, 32, 256);
  a.left = left;
  a.rows = outputs;
  a.index = w.take<int32_t>((size_t)(lists * a.capacity));
  a.todo = w.take<int32_t>((size_t)(lists * a.capacity));
  a.h = w.take<float>((size_t)(lists * a.capacity));
  a.error = w.take<float>((size_t)(lists * a.capacity));
  a.tally = w.take<Tally>((size_t)lists);
  const int64_t room = a.capacity - kPanelRoom;
  const int64_t limit = a.threshold ? room : std::min(room, std::max<int64_t>(2 * a.k, 256));
  std::fill_n(a.tally, lists, Tally{0, (int32_t)limit, 0, 0.0f});

  CentreArgs c{};
  {
    const Stage stage(0);
    c.x = (const char*)p.x + (size_t)(first * D) * bytes_of(p.x_type);
    c.x_type = p.x_type;
    c.b_dec = p.b_dec;
    // Not a power of two, or many rows would meet in one set of the cache.
    c.stride = (D + 15) / 16 * 16 + 16;
    c.centred = w.take<float>((size_t)(rows * c.stride));
    c.D = D;
    if (screen != Screen::none) {
      c.bounds = w.take<float>((size_t)(2 * rows));
      set_centre(&c, a.centre, rows, w.take<float>((size_t)D));
    }
    if (screen == Screen::tiles) {
      c.tiles = w.take<bf16>((size_t)(padded * steps * 32));
      std::fill_n((uint16_t*)c.tiles + (padded - 32) * steps * 32, 32 * steps * 32, 0);
    }
    if (screen == Screen::bytes) {
      const int64_t width = (D + 63) / 64 * 64;
      c.words = w.take<int16_t>((size_t)((rows + 3) * width));
      std::fill_n(c.words + rows * width, 3 * width, 0);
      c.word_scale = w.take<float>((size_t)rows);
    }
    parallel(rows, 4 * D, [&](int64_t b, int64_t e) { kernels().centre_rows(c, b, e); });
    for (int64_t n = 0; n < (c.bounds ? rows : 0); ++n) {
      // A row without a bound offers nothing and is left to the full path.
      if (c.bounds[2 * n] < 1e18f && c.bounds[2 * n + 1] < 1e18f) continue;
      for (int64_t r = 0; r < a.ranges; ++r) a.tally[n * a.ranges + r].count = -1;
    }
  }
  a.centred = c.centred;
  a.stride = c.stride;
  a.tiles = c.tiles;
  a.words = c.words;
  a.word_scale = c.word_scale;
  a.bounds = c.bounds;
  a.centre = c.centre;
  const int64_t items = a.ranges * a.groups, dots = rows * D * a.F / items;
  {
    const Stage stage(1);
    parallel(items, dots, [&](int64_t b, int64_t e) { kernels().encode_scan(a, b, e); });
  }
  for (int round = 0; screen != Screen::none && p.exact && round < (a.threshold ? 1 : 2); ++round) {
    {
      const Stage stage(2);
      parallel(rows, 4096,
               [&](int64_t b, int64_t e) { kernels().encode_plan(a, b, e, round == 0); });
    }
    const Stage stage(3);
    parallel(items, dots, [&](int64_t b, int64_t e) { kernels().encode_rescore(a, b, e); });
  }
  const Stage stage(4);
  parallel(rows, 4096, [&](int64_t b, int64_t e) { kernels().encode_write(a, b, e); });
}

// Returns false if a value fell outside its bound: the copy is not of these weights.
bool encode(Problem p, Screen screen, int64_t candidates, int64_t workspace) {
  std::fill_n(stages, 6, 0.0);
  const int64_t N = p.a.N;
  uint8_t stale = 0;
  p.a.stale = &stale;
  std::vector<uint8_t> left((size_t)N, 0);
  std::vector<int64_t> outputs((size_t)N);
  std::iota(outputs.begin(), outputs.end(), 0);
  const Plan plan(p, screen, candidates, workspace);
  for (int64_t n = 0; n < N && !stale; n += plan.tile) {
    encode_tile(p, plan, screen, n, std::min(plan.tile, N - n), &outputs[(size_t)n],
                &left[(size_t)n]);
  }
  if (stale) return false;
  std::vector<int64_t> rest;
  for (int64_t n = 0; n < N; ++n) {
    if (left[(size_t)n]) rest.push_back(n);
  }
  if (rest.empty()) return true;
  // Too many candidates, or no bound: every value of these rows, by rescoring dots.
  const double before = std::accumulate(stages, stages + 5, 0.0);
  const size_t row = (size_t)p.a.D * bytes_of(p.x_type);
  const Plan wide(p, Screen::none, candidates, workspace);
  Problem full = p;
  EncodeArgs& a = full.a;
  a.weight_tiles = nullptr;
  a.bytes = nullptr;
  a.centre = a.norms = a.errors = a.products = nullptr;
  for (size_t i = 0; i < rest.size(); i += (size_t)wide.tile) {
    const size_t count = std::min(rest.size() - i, (size_t)wide.tile);
    std::vector<char> rows(count * row);
    for (size_t n = 0; n < count; ++n) {
      std::copy_n((const char*)p.x + (size_t)rest[i + n] * row, row, rows.data() + n * row);
    }
    full.x = rows.data();
    std::vector<uint8_t> none(count, 0);
    encode_tile(full, wide, Screen::none, 0, (int64_t)count, &rest[i], none.data());
    STD_TORCH_CHECK(std::find(none.begin(), none.end(), 1) == none.end(), "a full list overflowed");
  }
  stages[5] = std::accumulate(stages, stages + 5, 0.0) - before;
  return true;
}

// What _encode_copy returned, and the centre it was made with; or nothing.
Screen use_copy(Problem* p, bool screen, const std::vector<Tensor>& copy) {
  EncodeArgs& a = p->a;
  if (copy.empty()) return screen && kernels().tiles ? Screen::tiles : Screen::none;
  STD_TORCH_CHECK(copy.size() == 4, "copy: expected data, scales, norms and centre");
  const int64_t features = copy[2].size(1);
  a.norms = floats(copy[2], "norms", 2, features);
  a.errors = a.norms + features;
  a.products = a.errors + features;
  a.centre = floats(copy[3], "centre", 1, a.D);
  STD_TORCH_CHECK(features >= a.F, "copy: of other weights");
  if (copy[0].scalar_type() == ScalarType::BFloat16) {
    STD_TORCH_CHECK(kernels().tiles, "copy: in tiles, which this processor lacks");
    a.weight_tiles = (const bf16*)copy[0].const_data_ptr();
    return Screen::tiles;
  }
  a.bytes = (const int8_t*)copy[0].const_data_ptr();
  a.scales = (const float*)copy[1].const_data_ptr();
  return Screen::bytes;
}

// The copy of W that screens about `centre` read: bf16 tiles, or int8 with scales. Rows up to a
// whole panel are there and zero.
std::tuple<Tensor, Tensor, Tensor> encode_copy(const Tensor& W, const Tensor& centre, bool bytes) {
  check(W, "W", 2);
  CopyArgs c{};
  c.W = W.const_data_ptr();
  c.weight_type = dtype_of(W, "W");
  c.F = W.size(0);
  c.D = W.size(1);
  c.centre = floats(centre, "centre", 1, c.D);
  STD_TORCH_CHECK(bytes || kernels().tiles, "bytes: this processor has no tiles");
  const int64_t F = (c.F + 255) / 256 * 256, wide = (c.D + 63) / 64 * 64;
  Tensor data = bytes ? make({F, wide}, ScalarType::Char)
                      : make({F, (c.D + 31) / 32 * 32}, ScalarType::BFloat16);
  Tensor scales = make({bytes ? F : 0, wide / 64}, ScalarType::Float);
  Tensor norms = make({3, F}, ScalarType::Float);
  c.norms = (float*)norms.mutable_data_ptr();
  std::fill_n(c.norms, 3 * F, 0.0f);
  c.errors = c.norms + F;
  c.products = c.errors + F;
  if (bytes) {
    c.bytes = (int8_t*)data.mutable_data_ptr();
    c.scales = (float*)scales.mutable_data_ptr();
    std::fill_n(c.bytes + c.F * wide, (F - c.F) * wide, 0);
    std::fill_n(c.scales + c.F * (wide / 64), (F - c.F) * (wide / 64), 0.0f);
  } else {
    c.tiles = (bf16*)data.mutable_data_ptr();
  }
  parallel(F / 16, 64 * c.D, [&](int64_t b, int64_t e) { kernels().copy_rows(c, b * 16, e * 16); });
  return {data, scales, norms};
}

// A digest of one cache line of every row of W: an edit that no version counter saw.
int64_t encode_digest(const Tensor& W) {
  check(W, "W", 2);
  const int64_t F = W.size(0), bytes = W.size(1) * (int64_t)bytes_of(dtype_of(W, "W"));
  const int64_t lines = std::max<int64_t>(1, bytes / 64), size = std::min<int64_t>(64, bytes);
  const char* data = (const char*)W.const_data_ptr();
  std::atomic<uint64_t> total{0};
  parallel(F, 64, [&](int64_t begin, int64_t end) {
    uint64_t sum = 0;
    const auto line_of = [&](int64_t f) {
      return data + f * bytes + (int64_t)((uint64_t)f * 2654435761u % (uint64_t)lines) * 64;
    };
    for (int64_t f = begin; f < end; ++f) {
      __builtin_prefetch(line_of(std::min(f + 32, F - 1)));
      const char* line = line_of(f);
      uint64_t hash = (uint64_t)f, word;
      for (int64_t i = 0; i + 8 <= size; i += 8) {
        memcpy(&word, line + i, 8);
        hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
        hash ^= hash >> 29;
      }
      sum += hash;
    }
    total += sum;
  });
  return (int64_t)total.load();
}

Problem problem(const Tensor& x, const Tensor& W, const Tensor& b_enc,
                const std::optional<Tensor>& b_dec) {
  Problem p{};
  check(x, "x", 2);
  check(W, "W", 2, x.size(1));
  p.x = x.const_data_ptr();
  p.x_type = dtype_of(x, "x");
  p.a.N = x.size(0);
  p.a.F = W.size(0);
  p.a.D = W.size(1);
  p.a.W = W.const_data_ptr();
  p.a.weight_type = dtype_of(W, "W");
  p.a.b_enc = floats(b_enc, "b_enc", 1, p.a.F);
  p.b_dec = b_dec ? floats(*b_dec, "b_dec", 1, p.a.D) : nullptr;
  p.exact = true;
  return p;
}

std::tuple<Tensor, Tensor, bool> encode_topk(const Tensor& x, const Tensor& W, const Tensor& b_enc,
                                             const std::optional<Tensor>& b_dec, int64_t k,
                                             bool exact, bool screen, std::vector<Tensor> copy,
                                             int64_t candidates, int64_t workspace) {
  Problem p = problem(x, W, b_enc, b_dec);
  STD_TORCH_CHECK(k >= 1 && k <= p.a.F, "k: got ", k, ", expected 1 to ", p.a.F);
  Tensor values = make({p.a.N, k}, ScalarType::Float), indices = make({p.a.N, k}, ScalarType::Int);
  p.exact = exact;
  p.a.k = k;
  p.a.values = (float*)values.mutable_data_ptr();
  p.a.indices = (int32_t*)indices.mutable_data_ptr();
  const Screen how = use_copy(&p, screen, copy);
  return {values, indices, encode(p, how, candidates, workspace)};
}

std::tuple<Tensor, Tensor, Tensor, bool> encode_threshold(
    const Tensor& x, const Tensor& W, const Tensor& b_enc, const std::optional<Tensor>& b_dec,
    const Tensor& threshold, bool screen, std::vector<Tensor> copy, int64_t candidates,
    int64_t workspace) {
  Problem p = problem(x, W, b_enc, b_dec);
  EncodeArgs& a = p.a;
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
  const Screen how = use_copy(&p, screen, copy);
  const bool certain = encode(p, how, candidates, workspace);
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
  return {values, indices, offsets, certain};
}

Tensor encode_stages() {
  Tensor seconds = make({6}, ScalarType::Float);
  std::copy_n(stages, 6, (float*)seconds.mutable_data_ptr());
  return seconds;
}

int64_t release() { return (int64_t)release_workspaces(); }

}  // namespace
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("_encode_topk", TORCH_BOX(&fastsae::encode_topk));
  m.impl("_encode_threshold", TORCH_BOX(&fastsae::encode_threshold));
  m.impl("_encode_copy", TORCH_BOX(&fastsae::encode_copy));
  m.impl("_encode_digest", TORCH_BOX(&fastsae::encode_digest));
}

STABLE_TORCH_LIBRARY_IMPL(fastsae, CompositeExplicitAutograd, m) {
  m.impl("_encode_stages", TORCH_BOX(&fastsae::encode_stages));
  m.impl("_release_workspaces", TORCH_BOX(&fastsae::release));
}
