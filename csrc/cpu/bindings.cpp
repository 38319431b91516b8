// The operators on CPU tensors.
#include "../bindings.h"

#include "cpu.h"

namespace lm2 {
namespace {

struct Cpu {
  static constexpr const char* kName = "CPU";
  static constexpr bool kHasFloat64 = true;
  static constexpr bool kHasTopK = true;
  // far beyond any head; the kernels' index arithmetic needs some bound
  static constexpr int64_t kMaxHeadWidth = 1 << 20;

  static bool owns(const Tensor& tensor) { return tensor.is_cpu(); }

  // scratch is each thread's own
  template <class Args>
  static int64_t workspace_bytes(const Args&, const Tensor&) {
    return 0;
  }

  static void run(const MemoryAttentionForward& args, const Tensor&) {
    cpu::memory_attention_forward(args);
  }
  static void run(const MemoryAttentionBackward& args, const Tensor&) {
    cpu::memory_attention_backward(args);
  }
  static void run(const MemoryUpdateForward& args, const Tensor&) {
    cpu::memory_update_forward(args);
  }
  static void run(const MemoryUpdateBackward& args, const Tensor&) {
    cpu::memory_update_backward(args);
  }
  static void run(const ResidualLayerNormForward& args, const Tensor&) {
    cpu::residual_layer_norm_forward(args);
  }
  static void run(const ResidualLayerNormBackward& args, const Tensor&) {
    cpu::residual_layer_norm_backward(args);
  }
  static void run(const PooledGateForward& args, const Tensor&) { cpu::pooled_gate_forward(args); }
  static void run(const PooledGateBackward& args, const Tensor&) {
    cpu::pooled_gate_backward(args);
  }
  static void run(const cpu::Transpose& args, const Tensor&) { cpu::transpose(args); }
  static void run(const cpu::Tanh& args, const Tensor&) { cpu::tanh(args); }
};

// (I, J) of contiguous rows -> (J, I) contiguous, and (J) the sums of the rows if they are needed
std::tuple<Tensor, Tensor> transposed_and_sums(const Tensor& matrix, bool needs_sums) {
  Call<Cpu> call("transposed_and_sums", matrix);
  call.check(matrix.dim() == 2, "matrix must be (I, J)");
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  const Dtype dtype = call.dtype("matrix", matrix);
  call.check(dtype == accumulation(dtype), "matrix must be float32 or float64");
  call.require("matrix", matrix, {rows, columns}, {scalar_type(dtype)});
  call.check(matrix.stride(1) == 1, "matrix must have contiguous rows");
  Tensor result = call.result({columns, rows}, dtype);
  Tensor sums = call.result({columns}, dtype, needs_sums);
  cpu::Transpose args = {rows,
                         columns,
                         dtype,
                         matrix.data_ptr(),
                         matrix.stride(0),
                         pointer(result),
                         pointer(sums, needs_sums)};
  if (matrix.numel() > 0) {
    call.run(args);
  } else if (needs_sums) {
    Bindings<Cpu>::zero({sums});
  }
  return {result, sums};
}

// (B, R, D) -> the same, contiguous
Tensor tanh(const Tensor& x) {
  Call<Cpu> call("tanh", x);
  call.check(x.dim() == 3, "x must be (B, R, D)");
  cpu::Tanh args;
  args.batch = x.size(0);
  args.rows = x.size(1);
  args.width = x.size(2);
  const Dtype dtype = call.dtype("x", x);
  args.x = call.view("x", x, {args.batch, args.rows, args.width}, {scalar_type(dtype)});
  Tensor result = call.result({args.batch, args.rows, args.width}, dtype);
  args.result = pointer(result);
  if (x.numel() > 0) call.run(args);
  return result;
}

}  // namespace
}  // namespace lm2

#include "layers.h"

STABLE_TORCH_LIBRARY_IMPL(lm2_kernels_cpp, CPU, m) {
  lm2::Bindings<lm2::Cpu>::implement(m);
  m.impl("transposed_and_sums", TORCH_BOX(&lm2::transposed_and_sums));
  m.impl("tanh", TORCH_BOX(&lm2::tanh));
  m.impl("paper_layer_forward", TORCH_BOX(&lm2::paper_layer_forward));
  m.impl("paper_layer_backward", TORCH_BOX(&lm2::paper_layer_backward));
  m.impl("release_layer_forward", TORCH_BOX(&lm2::release_layer_forward));
  m.impl("release_layer_backward", TORCH_BOX(&lm2::release_layer_backward));
}
