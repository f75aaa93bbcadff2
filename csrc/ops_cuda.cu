// CUDA bindings: the leaves of decode and steer, on torch's stable ABI. Built by setup.py with FASTSAE_BUILD=cuda.
// To compile without a CUDA build of torch or a GPU
// (TORCH=.venv/lib/python3.11/site-packages/torch):
//   nvcc -c csrc/ops_cuda.cu -o /dev/null -O3 -std=c++20 -DUSE_CUDA -Xptxas -v
//     -DTORCH_TARGET_VERSION=0x020b000000000000 -I$TORCH/include
//     -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a
// What benchmarks/gpu_compile.py looks for in the code (Li8E, Li4E: 16 bytes of bf16, fp32 a lane):
// expect sm_80 decode_rows_kernelIf13__nv_bfloat16fLi8E: LDG.E.128, !LDG.E.U16, !ATOM
// expect sm_80 decode_rows_kernelIfffLi4E: LDG.E.128, !ATOM
// expect sm_90a decode_rows_kernelIf13__nv_bfloat16fLi8E: LDG.E.128, !LDG.E.U16, !ATOM
// expect sm_90a decode_rows_kernelIfffLi4E: LDG.E.128, !ATOM
// expect sm_80 steer_rows_kernelI13__nv_bfloat16Li4ELb1E: LDG.E.128, !ATOM
// expect sm_90a steer_rows_kernelI13__nv_bfloat16Li1ELb1E: LDG.E.128, UCGABAR, !ATOM
// expect sm_90a steer_rows_kernelI13__nv_bfloat16Li4ELb1E: LDG.E.128, UCGABAR, !ATOM
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "steer.cuh"

namespace fastsae {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Value, class Weight, class Out>
void launch(const Tensor& values, const Tensor& indices, const Tensor& W, const float* bias,
            const Tensor& out) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(W.get_device_index(), &stream));
  decode_rows_cuda<Value, Weight, Out>(
      {(const Value*)values.const_data_ptr(), (const int32_t*)indices.const_data_ptr(),
       (const Weight*)W.const_data_ptr(), bias, (Out*)out.mutable_data_ptr(), values.size(0),
       values.size(1), W.size(0), W.size(1)},
      (cudaStream_t)stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Calls f with a null pointer of the element type.
template <class F>
auto with_type(const Tensor& t, const char* name, F f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f((float*)nullptr);
    case ScalarType::BFloat16:
      return f((__nv_bfloat16*)nullptr);
    case ScalarType::Half:
      return f((__half*)nullptr);
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}

void check(const Tensor& t, const char* name, int64_t dims, int32_t device) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device, name,
                  ": expected a tensor on the device of W");
  STD_TORCH_CHECK(t.dim() == dims && t.is_contiguous(), name, ": expected ", dims,
                  " contiguous dimensions");
}

Tensor decode_rows(const Tensor& values, const Tensor& indices, const Tensor& W,
                   const std::optional<Tensor>& bias) {
  const int32_t device = W.get_device_index();
  check(W, "W", 2, device);
  check(values, "values", 2, device);
  check(indices, "indices", 2, device);
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Int && indices.size(0) == values.size(0) &&
                      indices.size(1) == values.size(1),
                  "indices: expected int32 and the shape of values");
  const torch::stable::accelerator::DeviceGuard guard(device);
  const ScalarType same = values.scalar_type();
  const ScalarType type = same == W.scalar_type() ? same : ScalarType::Float;
  Tensor out = torch::stable::new_empty(values, {values.size(0), W.size(1)}, type);
  std::optional<Tensor> wide;
  if (bias) {
    check(*bias, "b", 1, device);
    STD_TORCH_CHECK(bias->size(0) == W.size(1), "b: expected one entry per column of W");
    wide = torch::stable::to(*bias, ScalarType::Float);
  }
  const float* b = wide ? (const float*)wide->const_data_ptr() : nullptr;
  with_type(values, "values", [&](auto* v) {
    with_type(W, "W", [&](auto* w) {
      using Value = std::remove_pointer_t<decltype(v)>;
      using Weight = std::remove_pointer_t<decltype(w)>;
      // Different types promote to float32.
      using Out = std::conditional_t<std::is_same_v<Value, Weight>, Value, float>;
      launch<Value, Weight, Out>(values, indices, W, b, out);
    });
  });
  return out;
}

template <class T>
const T* table_data(const Tensor& t, const char* name, ScalarType type, int64_t size,
                    int32_t device) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device, name,
                  ": expected a tensor on the device of x");
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() == size, name,
                  ": expected ", size, " contiguous elements of ",
                  type == ScalarType::Int ? "int32" : "float32");
  return (const T*)t.const_data_ptr();
}

template <class T>
cudaError_t steer_typed(const Tensor& x, const Tensor& slots, const Tensor& strengths,
                        const std::vector<Tensor>& table, const Tensor& out, void* stream) {
  const int32_t device = x.get_device_index();
  const int64_t N = x.size(0), D = x.size(1), R = table[0].size(0), items = table[8].numel();
  const int64_t S = table[4].size(0), P = table[4].size(1);
  const auto floats = [&](int i, const char* name, int64_t size) {
    return table_data<float>(table[i], name, ScalarType::Float, size, device);
  };
  const auto ints = [&](int i, const char* name, int64_t size) {
    return table_data<int32_t>(table[i], name, ScalarType::Int, size, device);
  };
  SteerParams<T> p{};
  p.x = (const T*)x.const_data_ptr();
  p.out = (T*)out.mutable_data_ptr();
  p.slots = table_data<int32_t>(slots, "slots", ScalarType::Int, N, device);
  p.strengths = table_data<float>(strengths, "strengths", ScalarType::Float, N, device);
  p.enc = floats(0, "enc", R * D);
  p.bias = floats(1, "bias", R);
  p.theta = floats(2, "theta", R);
  p.dec = floats(3, "dec", R * D);
  p.op_kind = ints(4, "op_kind", S * P);
  p.op_begin = ints(5, "op_begin", S * P);
  p.op_end = ints(6, "op_end", S * P);
  p.op_scalar = floats(7, "op_scalar", S * P);
  p.item_row = ints(8, "item_row", items);
  p.item_value = floats(9, "item_value", items);
  p.gate_begin = ints(10, "gate_begin", S);
  p.gate_end = ints(11, "gate_end", S);
  p.gate_above = floats(12, "gate_above", S);
  p.norm_preserve = ints(13, "norm_preserve", S);
  p.N = N, p.D = D, p.S = (int)S, p.P = (int)P;
  return steer_rows_cuda(p, (cudaStream_t)stream);
}

// As on the CPU, but a slot outside the table is not an error: its row becomes NaN.
Tensor steer_rows_table(const Tensor& x, const Tensor& slots, const Tensor& strengths,
                        const std::vector<Tensor>& table) {
  STD_TORCH_CHECK(table.size() == 14, "table: expected the 14 fields of SteerTable");
  const int32_t device = x.get_device_index();
  check(x, "x", 2, device);
  STD_TORCH_CHECK(table[0].dim() == 2 && table[0].size(1) == x.size(1) && table[4].dim() == 2,
                  "table: expected enc of the width of x, and op_kind of two dimensions");
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor out = torch::stable::empty_like(x);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const cudaError_t error = with_type(x, "x", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return steer_typed<T>(x, slots, strengths, table, out, stream);
  });
  STD_CUDA_CHECK(error);
  return out;
}

}  // namespace
}  // namespace fastsae

STABLE_TORCH_LIBRARY_IMPL(fastsae, CUDA, m) {
  m.impl("_decode_rows", TORCH_BOX(&fastsae::decode_rows));
  m.impl("_steer_rows", TORCH_BOX(&fastsae::steer_rows_table));
}
