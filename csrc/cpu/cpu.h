// The CPU kernels as csrc/cpu/bindings.cpp calls them. Torch-free.
#pragma once

#include <cstdint>

#include "../arguments.h"

namespace lm2::cpu {

// All sizes are at least 1.
struct Transpose {
  int64_t rows, columns;
  Dtype dtype;       // float32 or float64
  const void* from;  // rows of contiguous columns, row_stride elements apart
  int64_t row_stride;
  void* to;    // (columns, rows) contiguous
  void* sums;  // (columns), of the rows; null: not needed
};

struct Tanh {
  int64_t batch, rows, width;
  View x;
  void* result;  // (batch, rows, width) contiguous, of x's dtype
};

// to += from, (rows, columns), `to` contiguous; float32 or float64.
struct Add {
  int64_t rows, columns;
  Dtype dtype;
  void* to;
  const void* from;
  int64_t from_stride;  // of its rows; 0: one row for all
};

// to = dy where a ReLU's result is positive, else 0; float32 or float64. `to` may be dy.
struct ReluBackward {
  int64_t count;
  Dtype dtype;
  const void* dy;
  const void* result;
  void* to;
};

void memory_attention_forward(const MemoryAttentionForward& args);
void memory_attention_backward(const MemoryAttentionBackward& args);
void memory_update_forward(const MemoryUpdateForward& args);
void memory_update_backward(const MemoryUpdateBackward& args);
void residual_layer_norm_forward(const ResidualLayerNormForward& args);
void residual_layer_norm_backward(const ResidualLayerNormBackward& args);
void pooled_gate_forward(const PooledGateForward& args);
void pooled_gate_backward(const PooledGateBackward& args);
void transpose(const Transpose& args);
void tanh(const Tanh& args);
void add(const Add& args);
void relu_backward(const ReluBackward& args);

// "avx512_bf16", "avx512", "avx2" or "base": the instructions in use. The best of this processor,
// or what the environment variable LM2_KERNELS_CPU_LEVEL lowers it to.
const char* simd_level();

// The loop that every kernel shares out its work with: calls body(context, begin, end) over
// [0, count) in pieces of at least `grain`, on torch's thread pool (csrc/cpu/parallel.cpp). A
// program without torch, such as the sanitizers' harness, links another definition. What body
// throws is thrown again when all pieces have ended. (Not std::function: its inline members,
// compiled for AVX-512, could be what the linker keeps for every processor.)
using LoopBody = void (*)(void* context, int64_t begin, int64_t end);
void parallel_for(int64_t count, int64_t grain, LoopBody body, void* context);

// Threads of that pool.
int64_t num_threads();

}  // namespace lm2::cpu
