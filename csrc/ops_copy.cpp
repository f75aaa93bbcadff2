// Bindings of the copies of weights that screens read; fastsae/ops/screens.py keeps them.
#include <atomic>

#include "binding.h"
#include "rows.h"

namespace fastsae {
namespace {

// The mean of rows of x - b_dec, without outliers; zeros where there is none.
Tensor encode_centre(const Tensor& x, const std::optional<Tensor>& b_dec) {
  check(x, "x", 2);
  CentreArgs c{};
  c.x = x.const_data_ptr();
  c.x_type = dtype_of(x, "x");
  c.D = x.size(1);
  c.b_dec = b_dec ? floats(*b_dec, "b_dec", 1, c.D) : nullptr;
  Tensor mean = make({c.D}, ScalarType::Float);
  double norm;
  if (x.size(0) == 0 || !mean_any_row(c, x.size(0), (float*)mean.mutable_data_ptr(), &norm)) {
    std::fill_n((float*)mean.mutable_data_ptr(), c.D, 0.0f);
  }
  return mean;
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
  const int64_t F = (c.F + 255) / 256 * 256, wide = (c.D + 127) / 128 * 128;
  Tensor data = bytes ? make_large({F, wide}, ScalarType::Char)
                      : make_large({F, (c.D + 31) / 32 * 32}, ScalarType::BFloat16);
  Tensor scales = make({bytes ? F : 0, wide / 128}, ScalarType::Float);
  Tensor norms = make({3, F}, ScalarType::Float);
  c.norms = (float*)norms.mutable_data_ptr();
  std::fill_n(c.norms, 3 * F, 0.0f);
  c.errors = c.norms + F;
  c.products = c.errors + F;
  if (bytes) {
    c.bytes = (int8_t*)data.mutable_data_ptr();
    c.scales = (float*)scales.mutable_data_ptr();
    std::fill_n(c.bytes + c.F * wide, (F - c.F) * wide, 0);
    std::fill_n(c.scales + c.F * (wide / 128), (F - c.F) * (wide / 128), 0.0f);
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
  const int64_t lines = std::max<int64_t>(1, (bytes + 63) / 64);
  const int64_t size = std::min<int64_t>(64, bytes);
  const char* data = (const char*)W.const_data_ptr();
  const auto line_of = [&](int64_t f) {  // the last one of a row ends with the row
    const uint64_t spread = (uint64_t)f * 2654435761u & 0xffffffffu;
    const int64_t line = (int64_t)(spread * (uint64_t)lines >> 32);
    return data + f * bytes + std::min(line * 64, bytes - size);
  };
  std::atomic<uint64_t> total{0};
  parallel(F, 64, [&](int64_t begin, int64_t end) {
    uint64_t sum = 0;
    for (int64_t f = begin; f < end; ++f) {
      __builtin_prefetch(line_of(std::min(f + 64, F - 1)));
      uint64_t words[8] = {0}, hash = (uint64_t)f;
      memcpy(words, line_of(f), (size_t)size);
      for (int i = 0; i < 8; ++i) {
        hash += (words[i] ^ (hash >> 29)) * (0x9e3779b97f4a7c15u + 2u * (unsigned)i);
      }
      sum += hash;
    }
    total += sum;
  });
  return (int64_t)total.load();
}

}  // namespace
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, CPU, m) {
  m.impl("_encode_centre", TORCH_BOX(&fastsae::encode_centre));
  m.impl("_encode_copy", TORCH_BOX(&fastsae::encode_copy));
  m.impl("_encode_digest", TORCH_BOX(&fastsae::encode_digest));
}
