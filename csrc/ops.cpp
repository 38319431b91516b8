// Defines the operators; csrc/cpu/bindings.cpp and csrc/cuda/bindings.cpp implement them.
// `transposed_and_sums` and `tanh` are of the CPU alone, and of no op:
// lm2_kernels/backends/cpu_products.py and lm2_kernels/tanh.py call them.
#include "schemas.h"

STABLE_TORCH_LIBRARY(lm2_kernels_cpp, m) {
  lm2::define_schemas(m);
  m.def("transposed_and_sums(Tensor matrix, bool needs_sums) -> (Tensor, Tensor)");
  m.def("tanh(Tensor x) -> Tensor");
}
