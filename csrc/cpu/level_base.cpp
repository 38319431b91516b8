// The kernels for any processor, and those for float64.
#include "kernels.h"

namespace lm2::cpu {

extern const Kernels kBaseKernels = kernels_of<Base>();
extern const Kernels kFloat64Kernels = kernels_of<Double>();

}  // namespace lm2::cpu
