// The kernels of one SIMD level, as dispatch.cpp chooses among them.
#pragma once

#include "cpu.h"

namespace lm2::cpu {

struct Kernels {
  void (*memory_attention_forward)(const MemoryAttentionForward&);
  void (*memory_attention_backward)(const MemoryAttentionBackward&);
  void (*memory_update_forward)(const MemoryUpdateForward&);
  void (*memory_update_backward)(const MemoryUpdateBackward&);
  void (*residual_layer_norm_forward)(const ResidualLayerNormForward&);
  void (*residual_layer_norm_backward)(const ResidualLayerNormBackward&);
  void (*pooled_gate_forward)(const PooledGateForward&);
  void (*pooled_gate_backward)(const PooledGateBackward&);
};

extern const Kernels kFloat64Kernels;  // of the base level's file
extern const Kernels kBaseKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

}  // namespace lm2::cpu
