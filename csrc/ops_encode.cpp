// Bindings of encode_topk and encode_threshold; schemas in fastsae/ops/schema.py.
#include <chrono>

#include "binding.h"
#include "rows.h"
#include "workspace.h"

namespace fastsae {
namespace {

constexpr int64_t kMostFeatures = 256;    // kPanel of panel.h
constexpr int64_t kPanelRoom = kMostFeatures + 16;  // a list must hold one more panel
// Of bf16 weights: a panel stays in L2 beside the rows, and one of a copy also beside the next.
constexpr int64_t kPanelBytes = 512 << 10, kCopyBytes = 256 << 10;
constexpr int64_t kMoreRows = 12;           // that product.h may read: a block, at most
constexpr int64_t kRanges = 8, kFewRows = 64;  // beyond either, threads share ranges by rows

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

enum class Screen { none, floats, tiles, bytes };

struct Problem {
  const void* x;  // [N, D] of x_type
  const float* b_dec;
  DType x_type;
  bool exact;
  EncodeArgs a;
};

// Rows that stay in L2 while weights pass by.
int64_t kept_rows(int64_t D) { return std::max<int64_t>(64, (1 << 20) / (2 * D) / 32 * 32); }

// How a problem is cut: rows per tile, and the lists of a row.
struct Plan {
  int64_t tile, ranges, groups, capacity, wanted;

  Plan(const Problem& p, Screen screen, int64_t candidates, int64_t workspace) {
    const EncodeArgs& a = p.a;
    const int64_t threads = torch::stable::get_num_threads();
    ranges = std::min({threads, a.N > kFewRows ? kRanges : threads, (a.F + 255) / 256});
    // Enough rows for every thread, and weights that are read again at no cost: lists of whole rows,
    // as long together, are cut down to k sooner.
    const int64_t shared = ranges;
    const bool copied = screen == Screen::tiles && a.weight_tiles;
    if (copied && a.N >= threads * kept_rows(a.D)) ranges = 1;
    groups = (threads + ranges - 1) / ranges;
    const int64_t width = (a.F + ranges - 1) / ranges + 256;  // of a range, whole panels
    // Exact lists of a top-k shrink to k; those of a threshold may need every feature.
    wanted = a.threshold ? (screen == Screen::none ? width : candidates)
                         : std::max(candidates, 4 * a.k);
    if (ranges == 1) wanted *= shared;
    capacity = (std::min(width, wanted) + kPanelRoom + 15) / 16 * 16;
    // Lists, what rescoring and writing add to them, and the row itself.
    const int64_t entry = a.threshold ? 36 : 20;
    const int64_t row = ranges * (capacity * entry + (int64_t)sizeof(Tally)) + 8 * (a.D + 64) + 160;
    const int64_t scratch = threads * (capacity * 64 + 44 * kMostFeatures * 4 + 2 * kPanelBytes);
    workspace = std::max(workspace - scratch, workspace / 4);
    tile = std::max<int64_t>(1, workspace / row);
    if (tile > 32) tile = tile / 32 * 32;
    const int64_t tiles = (a.N + tile - 1) / tile;  // as many, of about the same size
    if (tiles > 1) tile = std::min(tile, ((a.N + tiles - 1) / tiles + 31) / 32 * 32);
  }
};

// The centre of a screen: that of the copy of the weights, or the mean of these rows.
void set_centre(CentreArgs* c, const float* given, int64_t rows, float* mean) {
  if (given) {
    double square = 0;
    for (int64_t j = 0; j < c->D; ++j) square += (double)given[j] * given[j];
    c->centre = given;
    c->centre_norm = std::sqrt(square) * (1.0 + 1e-6);
  } else if (mean_any_row(*c, rows, mean, &c->centre_norm)) {
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
                       (padded + kMoreRows) * (4 * D + steps * 64 + 288) + 8 * D + 8192));
  a.N = rows;
  a.ranges = plan.ranges;
  a.groups = std::min(plan.groups, (rows + 31) / 32);
  a.capacity = plan.capacity;
  const int64_t most = a.weight_tiles ? kCopyBytes : kPanelBytes;
  const int64_t share = (16 << 20) / torch::stable::get_num_threads();
  const int64_t feature = screen == Screen::floats ? 4 * D : steps * 64;
  a.panel =
      std::clamp<int64_t>(std::min(most, share) / feature / 32 * 32, 32, kMostFeatures);
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
    c.centred = w.take<float>((size_t)((rows + kMoreRows) * c.stride));
    std::fill_n(c.centred + rows * c.stride, kMoreRows * c.stride, 0.0f);
    c.D = D;
    if (screen != Screen::none) {
      c.bounds = w.take<float>((size_t)(2 * rows));
      c.floats = screen == Screen::floats;
      if (!c.floats) set_centre(&c, a.centre, rows, w.take<float>((size_t)D));
    }
    if (screen == Screen::tiles) {
      c.tiles = w.take<bf16>((size_t)(padded * steps * 32));
      std::fill_n((uint16_t*)c.tiles + (padded - 32) * steps * 32, 32 * steps * 32, 0);
    }
    if (screen == Screen::bytes) {
      const int64_t width = (D + 127) / 128 * 128;
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
  a.floats = c.floats;
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

// Every value of listed rows, by rescoring dots: too many candidates, or no bound. Calls
// done(row) when everything before `row` is there.
template <class Done>
void encode_fully(const Problem& p, const std::vector<int64_t>& rest, int64_t candidates,
                  int64_t workspace, const Done& done) {
  const double before = std::accumulate(stages, stages + 5, 0.0);
  const size_t row = (size_t)p.a.D * bytes_of(p.x_type);
  const Plan plan(p, Screen::none, candidates, workspace);
  Problem full = p;
  EncodeArgs& a = full.a;
  a.weight_tiles = nullptr;
  a.bytes = nullptr;
  a.centre = a.norms = a.errors = a.products = nullptr;
  for (size_t i = 0; i < rest.size(); i += (size_t)plan.tile) {
    const size_t count = std::min(rest.size() - i, (size_t)plan.tile);
    Workspace rows(count * row);
    char* x = rows.take<char>(count * row);
    for (size_t n = 0; n < count; ++n) {
      std::copy_n((const char*)p.x + (size_t)rest[i + n] * row, row, x + n * row);
    }
    full.x = x;
    std::vector<uint8_t> left(count, 0);
    encode_tile(full, plan, Screen::none, 0, (int64_t)count, &rest[i], left.data());
    STD_TORCH_CHECK(std::find(left.begin(), left.end(), 1) == left.end(), "a full list overflowed");
    if (i + count < rest.size()) done(rest[i + count]);
  }
  stages[5] += std::accumulate(stages, stages + 5, 0.0) - before;
}

// Encodes tile by tile and calls done(row) when everything before `row` is there. Returns how many
// rows took the full path, or -1: a value fell outside its bound, so the copy is not of these
// weights, and the outputs are worth nothing.
template <class Done>
int64_t encode(Problem p, Screen screen, int64_t candidates, int64_t workspace, const Done& done) {
  std::fill_n(stages, 6, 0.0);
  uint8_t stale = 0;
  p.a.stale = &stale;
  const Plan plan(p, screen, candidates, workspace);
  std::vector<uint8_t> left;
  std::vector<int64_t> outputs, rest;
  int64_t total = 0;
  for (int64_t n = 0; n < p.a.N; n += plan.tile) {
    const int64_t rows = std::min(plan.tile, p.a.N - n);
    left.assign((size_t)rows, 0);
    outputs.resize((size_t)rows);
    std::iota(outputs.begin(), outputs.end(), n);
    encode_tile(p, plan, screen, n, rows, outputs.data(), left.data());
    if (stale) return -1;
    rest.clear();
    for (int64_t i = 0; i < rows; ++i) {
      if (left[(size_t)i]) rest.push_back(n + i);
    }
    if (!rest.empty()) encode_fully(p, rest, candidates, workspace, done);
    total += (int64_t)rest.size();
    done(n + rows);
  }
  return total;
}

// What _encode_copy returned, and the centre it was made with; or nothing.
Screen use_copy(Problem* p, bool screen, const std::vector<Tensor>& copy) {
  EncodeArgs& a = p->a;
  if (copy.empty()) {
    return !screen ? Screen::none : kernels().tiles ? Screen::tiles : Screen::floats;
  }
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

std::tuple<Tensor, Tensor, int64_t> encode_topk(
    const Tensor& x, const Tensor& W, const Tensor& b_enc, const std::optional<Tensor>& b_dec,
    int64_t k, bool exact, bool screen, std::vector<Tensor> copy, int64_t candidates,
    int64_t workspace) {
  Problem p = problem(x, W, b_enc, b_dec);
  STD_TORCH_CHECK(k >= 1 && k <= p.a.F, "k: got ", k, ", expected 1 to ", p.a.F);
  Tensor values = make({p.a.N, k}, ScalarType::Float), indices = make({p.a.N, k}, ScalarType::Int);
  p.exact = exact;
  p.a.k = k;
  p.a.values = (float*)values.mutable_data_ptr();
  p.a.indices = (int32_t*)indices.mutable_data_ptr();
  const Screen how = use_copy(&p, screen, copy);
  const int64_t full = encode(p, how, candidates, workspace, [](int64_t) {});
  return {values, indices, full};
}

// The entries of all rows so far, one behind the other; becomes an output without a copy.
struct Column {
  char* data = nullptr;
  int64_t count = 0, room = 0;

  Column() = default;
  Column(const Column&) = delete;
  Column& operator=(const Column&) = delete;
  ~Column() { free(data); }

  void add(const void* entries, int64_t n) {
    if (count + n > room) {
      room = std::max(count + n, room + room / 2);
      char* larger = (char*)realloc(data, (size_t)room * 4);
      if (!larger) out_of_memory();
      data = larger;
    }
    if (n > 0) memcpy(data + count * 4, entries, (size_t)n * 4);
    count += n;
  }

  Tensor release(ScalarType type) {
    if (count == 0) return make({0}, type);
    char* fitting = (char*)realloc(data, (size_t)count * 4);
    data = nullptr;
    const int64_t size[1] = {count}, stride[1] = {1};
    const torch::headeronly::IntHeaderOnlyArrayRef sizes(size, 1), strides(stride, 1);
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    return torch::stable::from_blob(fitting, sizes, strides, cpu, type, [](void* p) { free(p); });
  }
};

std::tuple<Tensor, Tensor, Tensor, int64_t> encode_threshold(
    const Tensor& x, const Tensor& W, const Tensor& b_enc, const std::optional<Tensor>& b_dec,
    const Tensor& threshold, bool screen, std::vector<Tensor> copy, int64_t candidates,
    int64_t workspace) {
  Problem p = problem(x, W, b_enc, b_dec);
  EncodeArgs& a = p.a;
  a.threshold = floats(threshold, "threshold", 1, a.F);
  struct Rows {  // frees their buffers whatever happens
    std::vector<int32_t*> data;
    ~Rows() {
      for (int32_t* row : data) free(row);
    }
  } rows{std::vector<int32_t*>((size_t)a.N, nullptr)};
  Tensor offsets = make({a.N + 1}, ScalarType::Long);
  int64_t* offset = (int64_t*)offsets.mutable_data_ptr();
  std::fill_n(offset, a.N + 1, 0);
  a.entries = rows.data.data();
  a.counts = offset + 1;
  Column values, indices;
  const Screen how = use_copy(&p, screen, copy);
  int64_t n = 0;
  const int64_t full = encode(p, how, candidates, workspace, [&](int64_t before) {
    for (; n < before; ++n) {
      int32_t*& row = rows.data[(size_t)n];
      indices.add(row, offset[n + 1]);
      values.add(row + offset[n + 1], offset[n + 1]);
      free(row);
      row = nullptr;
      offset[n + 1] += offset[n];
    }
  });
  return {values.release(ScalarType::Float), indices.release(ScalarType::Int), offsets, full};
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
}

STABLE_TORCH_LIBRARY_IMPL(fastsae, CompositeExplicitAutograd, m) {
  m.impl("_encode_stages", TORCH_BOX(&fastsae::encode_stages));
  m.impl("_release_workspaces", TORCH_BOX(&fastsae::release));
}
