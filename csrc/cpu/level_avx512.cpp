// The kernels for x86-64 processors with AVX-512 F, BW, VL and DQ.
#if defined(__x86_64__)
// shared headers first: their inline functions must not be compiled for AVX-512
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "levels.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#define LM2_AVX512
// false alarms of GCC 12 in its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "kernels.h"

namespace lm2::cpu {

extern const Kernels kAvx512Kernels = kernels_of<Avx512>();

}  // namespace lm2::cpu
#endif
