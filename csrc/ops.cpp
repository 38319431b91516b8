// Defines the operators; csrc/cpu/bindings.cpp and csrc/cuda/bindings.cpp implement them.
#include "schemas.h"

STABLE_TORCH_LIBRARY(lm2_kernels_cpp, m) { lm2::define_schemas(m); }
