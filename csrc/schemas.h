// The operators' schemas: the signatures of lm2_kernels/backends/eager.py in torch's words, with
// which tests/test_operators.py compares them, and those of the optional functions of
// lm2_kernels/backends/contract.py.
#pragma once

#include <torch/csrc/stable/library.h>

namespace lm2 {

template <class Library>
void define_schemas(Library& m) {
  m.def(
      "memory_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? slot_mask, "
      "Tensor? seed, bool causal, SymInt slot_offset, float scale, SymInt? top_k, "
      "float dropout_p) -> (Tensor, Tensor)");
  m.def(
      "memory_attention_backward(Tensor dout, Tensor query, Tensor key, Tensor value, "
      "Tensor? slot_mask, Tensor? seed, Tensor out, Tensor statistics, bool causal, "
      "SymInt slot_offset, float scale, SymInt? top_k, float dropout_p, bool needs_dquery, "
      "bool needs_dkey_value) -> (Tensor, Tensor)");
  m.def(
      "memory_update_forward(Tensor hidden, Tensor candidate, Tensor memory, Tensor input_gate, "
      "Tensor forget_gate, Tensor? output_gate, Tensor? gate_bias, Tensor? read, str output, "
      "SymInt tokens_per_slot) -> (Tensor, Tensor)");
  m.def(
      "memory_update_backward(Tensor? doutput, Tensor? dnew_memory, Tensor candidate, "
      "Tensor memory, Tensor input_gate, Tensor forget_gate, Tensor? output_gate, "
      "Tensor? gate_bias, Tensor? read, str output, SymInt tokens_per_slot, "
      "bool needs_dcandidate, bool needs_dmemory, bool needs_dgates, bool needs_dslot_gates, "
      "bool needs_dread) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "residual_layer_norm_forward(Tensor x, Tensor residual, Tensor weight, Tensor bias, "
      "float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "residual_layer_norm_backward(Tensor dout, Tensor x, Tensor residual, Tensor weight, "
      "Tensor mean, Tensor rstd, bool needs_dx, bool needs_dparams) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "residual_layer_norm_and_tanh_forward(Tensor x, Tensor residual, Tensor weight, "
      "Tensor bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "residual_layer_norm_and_tanh_backward(Tensor dout, Tensor x, Tensor residual, "
      "Tensor weight, Tensor mean, Tensor rstd, Tensor dtanh, Tensor dresidual, "
      "bool needs_dparams) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "residual_layer_norm_of_relu_forward(Tensor x, Tensor residual, Tensor weight, "
      "Tensor bias, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "residual_layer_norm_of_relu_backward(Tensor dout, Tensor x, Tensor residual, "
      "Tensor weight, Tensor mean, Tensor rstd, bool needs_dparams) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "pooled_gate_forward(Tensor x, Tensor weight, Tensor? pooled_sum, bool prefix, "
      "SymInt num_pooled) -> (Tensor, Tensor)");
  m.def(
      "pooled_gate_backward(Tensor? dpooled, Tensor? dnew_sum, Tensor x, Tensor weight, "
      "bool prefix, SymInt num_pooled, bool needs_dx, bool needs_dweight, "
      "bool needs_dpooled_sum) -> (Tensor, Tensor, Tensor)");
}

}  // namespace lm2
