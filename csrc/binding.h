// Helpers of the CPU bindings: torch's stable ABI on one side, raw pointers on the other.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <optional>
#include <vector>

#include "kernels.h"

namespace fastsae {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}

inline void check(const Tensor& t, const char* name, int64_t dims, int64_t columns = -1) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(t.dim() == dims, name, ": expected ", dims, " dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
  STD_TORCH_CHECK(columns < 0 || t.size(dims - 1) == columns, name,
                  ": expected a last dimension of ", columns, ", got ", t.size(dims - 1));
}

inline const float* floats(const Tensor& t, const char* name, int64_t dims, int64_t columns) {
  check(t, name, dims, columns);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, ": expected float32");
  return (const float*)t.const_data_ptr();
}

inline const int32_t* ints(const Tensor& t, const char* name, int64_t dims, int64_t columns) {
  check(t, name, dims, columns);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int, name, ": expected int32");
  return (const int32_t*)t.const_data_ptr();
}

// Every entry in [0, limit): the kernels index with them unchecked.
inline void check_range(const int32_t* index, int64_t n, int64_t limit, const char* name) {
  int32_t low = 0, high = 0;
  for (int64_t i = 0; i < n; ++i) {
    low = index[i] < low ? index[i] : low;
    high = index[i] > high ? index[i] : high;
  }
  STD_TORCH_CHECK(n == 0 || (low >= 0 && high < limit), name, ": got values from ", low, " to ",
                  high, ", expected 0 to ", limit - 1);
}

inline int32_t code_of(ScalarType type) {
  switch (type) {
    case ScalarType::Char:
      return aoti_torch_dtype_int8();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    default:
      STD_TORCH_CHECK(false, "no tensor of this type is made here");
  }
}

// An empty tensor, contiguous. torch::stable::empty asks the dispatcher by name, which costs a tenth
// of a call for one row.
inline Tensor make(const int64_t* size, size_t dims, ScalarType type) {
  std::vector<int64_t> strides(dims, 1);
  for (size_t d = dims; d-- > 1;) strides[d - 1] = strides[d] * max64(1, size[d]);
  AtenTensorHandle out;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided((int64_t)dims, size, strides.data(),
                                                  code_of(type), aoti_torch_device_type_cpu(), 0,
                                                  &out));
  return Tensor(out);
}

inline Tensor make(std::initializer_list<int64_t> size, ScalarType type) {
  return make(size.begin(), size.size(), type);
}

// A large tensor that is written once: on small pages half of the time would be page faults. Or one
// that is read at every call: translating its addresses costs a tenth.
inline Tensor make_large(std::initializer_list<int64_t> size, ScalarType type) {
  Tensor out = make(size, type);
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t data = (uintptr_t)out.mutable_data_ptr();
  const uintptr_t begin = (data + kPage - 1) / kPage * kPage;
  const uintptr_t end = (data + (uintptr_t)(out.numel() * out.element_size())) / kPage * kPage;
  // Only advice, so a refusal is no error.
  if (end >= begin + 8 * kPage) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
  return out;
}

// Small operands are widened here, so that kernels only meet fp32.
inline Tensor widened(const Tensor& t, const char* name) {
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

// Rows in parallel, about `work` elementary operations each; small problems stay on this thread.
template <class Function>
void parallel(int64_t n, int64_t work, const Function& function) {
  const int64_t grain = max64(1, 32768 / max64(1, work));
  if (n > 0) torch::stable::parallel_for(0, n, grain, function);
}

}  // namespace fastsae
