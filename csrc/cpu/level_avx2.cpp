// The kernels for x86-64 processors with AVX2, FMA and F16C.
#if defined(__x86_64__)
// shared headers first: their inline functions must not be compiled for AVX2
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "levels.h"

#pragma GCC target("avx2,fma,f16c")
#define LM2_AVX2

#include "kernels.h"

namespace lm2::cpu {

extern const Kernels kAvx2Kernels = kernels_of<Avx2>();

}  // namespace lm2::cpu
#endif
