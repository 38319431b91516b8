// Defines the operators; csrc/cpu/bindings.cpp and csrc/cuda/bindings.cpp implement them.
// `transposed_and_sums`, `tanh` and the layers are of the CPU alone, and of no op:
// lm2_kernels/backends/cpu_products.py, lm2_kernels/tanh.py and lm2_kernels/layers/in_cpp.py call
// them.
#include "schemas.h"

#define LM2_READING \
  "int ways, int heads, bool causal, int slot_offset, float scale, int? top_k, float dropout_p"
#define LM2_KEPT                                                                             \
  "Tensor bank, Tensor query, Tensor key, Tensor value, Tensor by_head, Tensor statistics, " \
  "Tensor? slot_mask, Tensor? seed"

STABLE_TORCH_LIBRARY(lm2_kernels_cpp, m) {
  lm2::define_schemas(m);
  m.def("transposed_and_sums(Tensor matrix, bool needs_sums) -> (Tensor, Tensor)");
  m.def("tanh(Tensor x) -> Tensor");
  m.def(
      "paper_layer_forward(Tensor x, Tensor rows, Tensor bank, Tensor? slot_mask, Tensor? seed, "
      "Tensor?[] parameters, " LM2_READING ", str output, bool keeps) -> Tensor[]");
  m.def(
      "paper_layer_backward(Tensor doutput, Tensor dnew_rows, Tensor x, Tensor rows, Tensor out, "
      "Tensor? candidate, Tensor input_gate, Tensor forget_gate, Tensor output_gate, " LM2_KEPT
      ", Tensor?[] weights, bool[] has_bias, " LM2_READING
      ", str output, "
      "bool needs_drows, bool is_whole) -> Tensor[]");
  m.def(
      "release_layer_forward(Tensor x, Tensor rows, Tensor bank, Tensor? slot_mask, Tensor? seed, "
      "Tensor? pooled_sum, Tensor?[] parameters, " LM2_READING
      ", bool prefix, int num_pooled, "
      "int applications, float first_eps, float second_eps, bool keeps) -> Tensor[]");
  m.def(
      "release_layer_backward(Tensor? doutput, Tensor? dnew_rows, Tensor? dnew_sum, Tensor x, "
      "Tensor rows, Tensor pooled, Tensor rows_tanh, Tensor gates, Tensor gate_bias, "
      "Tensor[] mixed, Tensor candidate, Tensor[] statistics_of_norms, " LM2_KEPT
      ", Tensor?[] weights, bool[] has_bias, Tensor first_norm, Tensor second_norm, "
      "Tensor pool_weight, " LM2_READING
      ", bool prefix, int num_pooled, bool needs_drows, "
      "bool is_whole) "
      "-> Tensor[]");
}
