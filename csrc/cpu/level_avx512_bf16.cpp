// memory_attention of bfloat16 for x86-64 processors that also have AVX-512 BF16.
#if defined(__x86_64__)
// shared headers first: their inline functions must not be compiled for AVX-512
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "levels.h"

#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq")
#pragma GCC target("avx2,fma,f16c,prefer-vector-width=512")
#define LM2_AVX512
#define LM2_AVX512_BF16
// false alarms of GCC 12 in its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "memory_attention.h"

namespace lm2::cpu {

extern const AttentionKernels kAvx512Bf16Kernels = {&attention_forward<Avx512Bf16, bfloat16>,
                                                    &attention_backward<Avx512Bf16, bfloat16>};

}  // namespace lm2::cpu
#endif
