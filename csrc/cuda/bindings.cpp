// The operators on CUDA tensors. Host code: no kernel is compiled here.
//
// Links libtorch_cpu alone: the one function of libtorch_cuda it needs is found at run time, so the
// library links and loads wherever torch does. Compiled with LM2_EMULATED_CUDA the same operators
// take CPU tensors and run the kernels in the tests' emulator.
#include "../bindings.h"

#include <cuda_runtime_api.h>

#include "cuda.h"

#ifndef LM2_EMULATED_CUDA
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#else
#include "../schemas.h"

extern "C" void lm2_set_device(int device);
#endif

namespace lm2 {
namespace {

#ifndef LM2_EMULATED_CUDA
using torch::stable::accelerator::DeviceGuard;

cudaStream_t current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Function>(symbol);
  }();
  if (function == nullptr) throw std::runtime_error("this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return static_cast<cudaStream_t>(stream);
}
#else
// As if the tensors were on another device than the current one.
struct DeviceGuard {
  explicit DeviceGuard(int32_t) { lm2_set_device(1); }
  DeviceGuard(const DeviceGuard&) = delete;
  ~DeviceGuard() { lm2_set_device(0); }
};

cudaStream_t current_stream(int32_t) { return nullptr; }
#endif

struct Cuda {
  static constexpr const char* kName = "CUDA";
  static constexpr bool kHasFloat64 = false;
  static constexpr bool kHasTopK = false;
  static constexpr int64_t kMaxHeadWidth = 256;

#ifndef LM2_EMULATED_CUDA
  static bool owns(const Tensor& tensor) { return tensor.is_cuda(); }
#else
  static bool owns(const Tensor& tensor) { return tensor.is_cpu(); }
#endif

  template <class Args>
  static int64_t workspace_bytes(const Args& args, const Tensor& like) {
    const DeviceGuard guard(like.get_device_index());
    return cuda::workspace_bytes(args);
  }

  template <class Args>
  static void launch(cudaError_t (*function)(const Args&, cudaStream_t), const Args& args,
                     const Tensor& like) {
    const int32_t device = like.get_device_index();
    const DeviceGuard guard(device);
    report(function(args, current_stream(device)));
  }

  static void report(cudaError_t error) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string("the kernel could not be launched: ") +
                             cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
  }

  static void run(const MemoryAttentionForward& args, const Tensor& like) {
    launch(cuda::memory_attention_forward, args, like);
  }
  static void run(const MemoryAttentionBackward& args, const Tensor& like) {
    launch(cuda::memory_attention_backward, args, like);
  }
  static void run(const MemoryUpdateForward& args, const Tensor& like) {
    launch(cuda::memory_update_forward, args, like);
  }
  static void run(const MemoryUpdateBackward& args, const Tensor& like) {
    launch(cuda::memory_update_backward, args, like);
  }
  static void run(const ResidualLayerNormForward& args, const Tensor& like) {
    launch(cuda::residual_layer_norm_forward, args, like);
  }
  static void run(const ResidualLayerNormBackward& args, const Tensor& like) {
    launch(cuda::residual_layer_norm_backward, args, like);
  }
  static void run(const PooledGateForward& args, const Tensor& like) {
    launch(cuda::pooled_gate_forward, args, like);
  }
  static void run(const PooledGateBackward& args, const Tensor& like) {
    launch(cuda::pooled_gate_backward, args, like);
  }
};

}  // namespace
}  // namespace lm2

#ifndef LM2_EMULATED_CUDA
STABLE_TORCH_LIBRARY_IMPL(lm2_kernels_cpp, CUDA, m) { lm2::Bindings<lm2::Cuda>::implement(m); }
#else
STABLE_TORCH_LIBRARY(lm2_kernels_emulated, m) { lm2::define_schemas(m); }
STABLE_TORCH_LIBRARY_IMPL(lm2_kernels_emulated, CPU, m) { lm2::Bindings<lm2::Cuda>::implement(m); }
#endif
