// The kernels of one SIMD level, as dispatch.cpp chooses among them.
#pragma once

#include "cpu.h"

namespace lm2::cpu {

struct AttentionKernels {
  void (*forward)(const MemoryAttentionForward&);
  void (*backward)(const MemoryAttentionBackward&);
};

struct Kernels {
  AttentionKernels memory_attention;
  void (*memory_update_forward)(const MemoryUpdateForward&);
  void (*memory_update_backward)(const MemoryUpdateBackward&);
  void (*residual_layer_norm_forward)(const ResidualLayerNormForward&);
  void (*residual_layer_norm_backward)(const ResidualLayerNormBackward&);
  void (*pooled_gate_forward)(const PooledGateForward&);
  void (*pooled_gate_backward)(const PooledGateBackward&);
  void (*transpose)(const Transpose&);
  void (*tanh)(const Tanh&);
  void (*add)(const Add&);
  void (*relu_backward)(const ReluBackward&);
};

extern const Kernels kFloat64Kernels;  // of the base level's file
extern const Kernels kBaseKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const AttentionKernels kAvx512Bf16Kernels;  // of bfloat16 tensors

}  // namespace lm2::cpu
