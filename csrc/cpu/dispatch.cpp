// Chooses the SIMD level once, and holds what must not be compiled for one: memory and top-k.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "levels.h"
#include "simd.h"

namespace lm2::cpu {
namespace {

// A larger scratch buffer is given back after the call.
constexpr int64_t kKeptBytes = 16 << 20;
constexpr const char* kLevels[] = {"base", "avx2", "avx512", "avx512_bf16"};

int best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const auto has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const auto has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!has_avx2 || !has_avx512) return has_avx2 ? 1 : 0;
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
  return 0;
#endif
}

int level() {
  static const int chosen = [] {
    const int best = best_level();
    const char* const wanted = std::getenv("LM2_KERNELS_CPU_LEVEL");
    if (wanted == nullptr || *wanted == '\0') return best;
    for (int i = 0; i < 4; ++i) {
      // only lowered: what the processor lacks cannot be asked for
      if (std::strcmp(wanted, kLevels[i]) == 0) return std::min(i, best);
    }
    throw std::runtime_error(
        std::string("LM2_KERNELS_CPU_LEVEL must be base, avx2, avx512 or avx512_bf16, got ") +
        wanted);
  }();
  return chosen;
}

const Kernels& kernels(Dtype dtype) {
  [[maybe_unused]] const int chosen = level();  // throws if it is misspelt, whatever the dtype
  if (dtype == Dtype::float64) return kFloat64Kernels;
#if defined(__x86_64__)
  if (chosen >= 2) return kAvx512Kernels;
  if (chosen == 1) return kAvx2Kernels;
#endif
  return kBaseKernels;
}

AttentionKernels attention_kernels(Dtype dtype) {
#if defined(__x86_64__)
  if (level() == 3 && dtype == Dtype::bfloat16) return kAvx512Bf16Kernels;
#endif
  return kernels(dtype).memory_attention;
}

struct Release {
  void operator()(void* memory) const { release(memory); }
};

template <class Scalar>
void keep_largest(const Scalar* scores, Scalar* factor, int64_t count, int64_t k) {
  thread_local std::vector<Scalar> sorted;
  sorted.assign(scores, scores + count);
  // a NaN above everything: a strict order is what nth_element needs
  const auto above = [](Scalar a, Scalar b) { return a != a ? b == b : a > b; };
  std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), above);
  const Scalar threshold = sorted[k - 1];
  int64_t ties = k;
  for (int64_t j = 0; j < count; ++j) ties -= above(scores[j], threshold);
  for (int64_t j = 0; j < count; ++j) {
    bool stays = above(scores[j], threshold);
    if (!stays && ties > 0 && !above(threshold, scores[j])) {
      stays = true;
      --ties;
    }
    factor[j] = stays ? 1 : 0;
  }
}

struct Buffer {
  std::unique_ptr<void, Release> memory;
  int64_t bytes = 0;
};
thread_local Buffer buffers[kScratches];

}  // namespace

void* allocate(int64_t bytes) {
  return ::operator new(static_cast<size_t>(bytes), std::align_val_t(64));
}

void release(void* memory) { ::operator delete(memory, std::align_val_t(64)); }

void* scratch(int which, int64_t bytes) {
  Buffer& buffer = buffers[which];
  if (buffer.bytes < bytes) {
    buffer.memory.reset();
    buffer.bytes = 0;  // allocate can throw
    buffer.memory.reset(allocate(bytes));
    buffer.bytes = bytes;
  }
  return buffer.memory.get();
}

void trim_scratch() {
  for (Buffer& buffer : buffers) {
    if (buffer.bytes > kKeptBytes) buffer = Buffer();
  }
}

void keep_top_k(const float* scores, float* factor, int64_t count, int64_t k) {
  keep_largest(scores, factor, count, k);
}

void keep_top_k(const double* scores, double* factor, int64_t count, int64_t k) {
  keep_largest(scores, factor, count, k);
}

const char* simd_level() { return kLevels[level()]; }

void memory_attention_forward(const MemoryAttentionForward& args) {
  attention_kernels(args.dtype).forward(args);
}
void memory_attention_backward(const MemoryAttentionBackward& args) {
  attention_kernels(args.dtype).backward(args);
}
void memory_update_forward(const MemoryUpdateForward& args) {
  kernels(args.dtype).memory_update_forward(args);
}
void memory_update_backward(const MemoryUpdateBackward& args) {
  kernels(args.dtype).memory_update_backward(args);
}
void residual_layer_norm_forward(const ResidualLayerNormForward& args) {
  kernels(args.dtype).residual_layer_norm_forward(args);
}
void residual_layer_norm_backward(const ResidualLayerNormBackward& args) {
  kernels(args.dtype).residual_layer_norm_backward(args);
}
void pooled_gate_forward(const PooledGateForward& args) {
  kernels(args.dtype).pooled_gate_forward(args);
}
void pooled_gate_backward(const PooledGateBackward& args) {
  kernels(args.dtype).pooled_gate_backward(args);
}
void transpose(const Transpose& args) { kernels(args.dtype).transpose(args); }
void tanh(const Tanh& args) { kernels(args.x.dtype).tanh(args); }
void add(const Add& args) { kernels(args.dtype).add(args); }
void relu_backward(const ReluBackward& args) { kernels(args.dtype).relu_backward(args); }

}  // namespace lm2::cpu
