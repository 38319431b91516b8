// All kernels of one level, in a table. Included by each level_*.cpp with its instructions enabled.
#pragma once

#include "elementwise.h"
#include "levels.h"
#include "memory_attention.h"
#include "memory_update.h"
#include "pooled_gate.h"
#include "residual_layer_norm.h"
#include "tanh.h"
#include "transpose.h"

namespace lm2::cpu {
namespace {

template <class S>
constexpr Kernels kernels_of() {
  return {{&memory_attention_forward<S>, &memory_attention_backward<S>},
          &memory_update_forward<S>,
          &memory_update_backward<S>,
          &residual_layer_norm_forward<S>,
          &residual_layer_norm_backward<S>,
          &pooled_gate_forward<S>,
          &pooled_gate_backward<S>,
          &transpose<S>,
          &tanh<S>,
          &add<S>,
          &relu_backward<S>};
}

}  // namespace
}  // namespace lm2::cpu
