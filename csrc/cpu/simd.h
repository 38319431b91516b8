// Vectors of one SIMD level, and what the kernels share. One kernel source serves every level: it
// is a template on a struct S of this file, and each level_*.cpp compiles it for its instructions.
//
// S has: Scalar, V (a vector of kLanes Scalars, with + - * /), kRows (rows of a register tile),
// kHasPairs (whether it multiplies pairs of bfloat16, and has the operations that takes), load and
// store with conversion, fma, max, exp, tanh, sigmoid, and a few selections. A load or store with
// `count` touches that many elements and no more; missing lanes are 0.
//
// Everything here has internal linkage or depends on S: an inline function that two level files
// share would be compiled for AVX-512 in one and kept by the linker for every processor.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu.h"

// that vector types lose their alignment as template arguments does not matter where they are used
#pragma GCC diagnostic ignored "-Wignored-attributes"

#define LM2_INLINE static inline __attribute__((always_inline))

namespace lm2::cpu {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// Per-thread memory that stays allocated between calls unless it is large: `which` names one of
// kScratches buffers. Throws std::bad_alloc.
constexpr int kScratches = 16;
void* scratch(int which, int64_t bytes);
void trim_scratch();            // gives the calling thread's large buffers back
void* allocate(int64_t bytes);  // 64-byte aligned; throws std::bad_alloc
void release(void* memory);

// factor = 1 for the k largest of scores[0, count), ties to the lower index, and 0 for the others.
void keep_top_k(const float* scores, float* factor, int64_t count, int64_t k);
void keep_top_k(const double* scores, double* factor, int64_t count, int64_t k);

namespace {

template <class T>
LM2_INLINE T smaller(T a, T b) {
  return b < a ? b : a;
}

template <class T>
LM2_INLINE T larger(T a, T b) {
  return a < b ? b : a;
}

LM2_INLINE int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

template <class F>
LM2_INLINE void parallel(int64_t count, int64_t grain, const F& body) {
  parallel_for(
      count, grain,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<const F*>(context))(begin, end);
        trim_scratch();
      },
      const_cast<F*>(&body));
}

LM2_INLINE float to_float(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

LM2_INLINE bfloat16 to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  // to nearest, ties to even
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

LM2_INLINE float to_float(float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7FFF;
  // a float whose exponent is too small by 112, set right by a product that is exact for
  // subnormals too; infinities and NaN get the largest exponent
  uint32_t bits = magnitude << 13;
  float result;
  std::memcpy(&result, &bits, 4);
  result *= 0x1p112f;
  std::memcpy(&bits, &result, 4);
  if (magnitude >= 0x7C00) bits |= 0x7F800000;
  bits |= sign;
  std::memcpy(&result, &bits, 4);
  return result;
}

LM2_INLINE float16 to_float16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7FFFFFFF;
  if (bits > 0x7F800000) return {static_cast<uint16_t>(sign | 0x7E00)};
  if (bits >= 0x477FF000) return {static_cast<uint16_t>(sign | 0x7C00)};  // rounds to infinity
  if (bits < 0x38800000) {
    // subnormal: adding 1/2 leaves the rounded value in the low bits
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return {static_cast<uint16_t>(sign | (bits - 0x3F000000))};
  }
  const uint32_t odd = bits >> 13 & 1;
  return {static_cast<uint16_t>(sign | ((bits - 0x38000000 + 0xFFF + odd) >> 13))};
}

LM2_INLINE float from_float(float x, float) { return x; }
LM2_INLINE bfloat16 from_float(float x, bfloat16) { return to_bfloat16(x); }
LM2_INLINE float16 from_float(float x, float16) { return to_float16(x); }
LM2_INLINE float to_float(float x) { return x; }

// exp and what is made of it, for every level of float32.
//
// x = n ln 2 + r with |r| <= ln 2 / 2, and e^r - 1 = r + r^2 / 2 + ... to r^7 / 7!, whose remainder
// is below a tenth of an ulp of 1.
template <class S, class V>
struct FloatMath {
  LM2_INLINE V reduce(V x, V* n) {
    *n = S::round(x * S::set(1.44269504f));
    // ln 2 in two pieces, the first short enough that n times it is exact
    const V r = S::fma(*n, S::set(-0.693359375f), x);
    return S::fma(*n, S::set(2.12194440e-4f), r);
  }

  LM2_INLINE V expm1_reduced(V r) {
    V p = S::set(1.0f / 5040);
    p = S::fma(p, r, S::set(1.0f / 720));
    p = S::fma(p, r, S::set(1.0f / 120));
    p = S::fma(p, r, S::set(1.0f / 24));
    p = S::fma(p, r, S::set(1.0f / 6));
    p = S::fma(p, r, S::set(0.5f));
    return S::fma(p * r, r, r);
  }

  LM2_INLINE V exp(V x) {
    // e^89 overflows and e^-104 rounds to 0; a NaN passes both
    x = S::min(S::set(89.0f), S::max(S::set(-104.0f), x));
    V n;
    const V r = reduce(x, &n);
    return S::scale(S::set(1.0f) + expm1_reduced(r), n);
  }

  // exp of what is at most 0; below e^-87 it may be 0.
  LM2_INLINE V exp_down(V x) { return exp(x); }

  LM2_INLINE V sigmoid(V x) { return S::set(1.0f) / (S::set(1.0f) + exp(S::zero() - x)); }

  // -(e^y - 1) / (e^y + 1) with y = -2 |x|: no digits are lost near 0. *slope is the derivative
  // 4 e^y / (e^y + 1)^2, which 1 - tanh^2 is too, but for what cancels where it is small.
  LM2_INLINE V tanh(V x, V* slope) {
    const V y = S::max(S::set(-104.0f), S::set(-2.0f) * S::abs(x));
    V n;
    const V r = reduce(y, &n);
    const V power = S::scale(S::set(1.0f), n), p = expm1_reduced(r);
    const V expm1 = S::fma(power, p, power - S::set(1.0f));
    const V inverse = S::set(1.0f) / (expm1 + S::set(2.0f));
    *slope = S::set(4.0f) * S::fma(power, p, power) * inverse * inverse;
    return S::copy_sign((S::zero() - expm1) / (expm1 + S::set(2.0f)), x);
  }

  LM2_INLINE V tanh(V x) {
    V slope;
    return tanh(x, &slope);
  }

  // The same with up to 1.95 ulps, 0.4 as a rule, where that has 2.5 and 0.5: what rounding the
  // denominator and the quotient has lost is added again. (2.21 where fma rounds twice.)
  LM2_INLINE V accurate_tanh(V x) {
    const V y = S::max(S::set(-104.0f), S::set(-2.0f) * S::abs(x));
    V n;
    const V p = expm1_reduced(reduce(y, &n)), power = S::scale(S::set(1.0f), n);
    const V expm1 = S::fma(power, p, power - S::set(1.0f));
    const V denominator = expm1 + S::set(2.0f), lost = expm1 - (denominator - S::set(2.0f));
    const V inverse = S::set(1.0f) / denominator, quotient = S::zero() - expm1 * inverse;
    V rest = S::fma(quotient, denominator, expm1);
    rest = S::fma(quotient, lost, rest);
    return S::copy_sign(S::fma(S::zero() - rest, inverse, quotient), x);
  }
};

#if defined(LM2_AVX512)  // by the level file: g++ does not define __AVX512F__ at its pragma
struct Avx512 : FloatMath<Avx512, __m512> {
  using Scalar = float;
  using V = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kRows = 12;
  static constexpr bool kHasPairs = false;

  LM2_INLINE __mmask16 first(int count) {
    return static_cast<__mmask16>((1u << count) - 1);  // count <= 16
  }
  LM2_INLINE V set(float x) { return _mm512_set1_ps(x); }
  LM2_INLINE V zero() { return _mm512_setzero_ps(); }
  LM2_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
  LM2_INLINE V load(const float* p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
  LM2_INLINE V widen(__m256i x, bfloat16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  LM2_INLINE V widen(__m256i x, float16) { return _mm512_cvtph_ps(x); }
  LM2_INLINE __m256i narrow(V x, bfloat16) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
  LM2_INLINE __m256i narrow(V x, float16) {
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  template <class T>
  LM2_INLINE V load(const T* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T());
  }
  template <class T>
  LM2_INLINE V load(const T* p, int count) {
    return widen(_mm256_maskz_loadu_epi16(first(count), p), T());
  }
  LM2_INLINE void store(float* p, V x) { _mm512_storeu_ps(p, x); }
  LM2_INLINE void store(float* p, V x, int count) { _mm512_mask_storeu_ps(p, first(count), x); }
  template <class T>
  LM2_INLINE void store(T* p, V x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, T()));
  }
  template <class T>
  LM2_INLINE void store(T* p, V x, int count) {
    _mm256_mask_storeu_epi16(p, first(count), narrow(x, T()));
  }
  LM2_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  // of the second operand where either is NaN
  LM2_INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }
  LM2_INLINE V min(V a, V b) { return _mm512_min_ps(a, b); }
  LM2_INLINE V abs(V x) { return _mm512_abs_ps(x); }
  LM2_INLINE V copy_sign(V magnitude, V sign) {
    const __m512 bit = _mm512_set1_ps(-0.0f);
    return _mm512_or_ps(_mm512_andnot_ps(bit, magnitude), _mm512_and_ps(bit, sign));
  }
  LM2_INLINE V round(V x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  LM2_INLINE V scale(V x, V n) { return _mm512_scalef_ps(x, n); }
  LM2_INLINE float sum(V x) { return _mm512_reduce_add_ps(x); }
  LM2_INLINE float maximum(V x) { return _mm512_reduce_max_ps(x); }
  // value, or 0 where x <= 0 (so a NaN in x lets value through)
  LM2_INLINE V unless_not_positive(V x, V value) {
    return _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(x, zero(), _CMP_LE_OQ), zero());
  }
  LM2_INLINE V if_nonzero(V x, V a, V b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, zero(), _CMP_NEQ_UQ), b, a);
  }
  // a in the first lanes, b in the others
  LM2_INLINE V first_lanes(int count, V a, V b) { return _mm512_mask_blend_ps(first(count), b, a); }
  LM2_INLINE V gather(const float* p, int64_t stride) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i index = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(stride)));
    return _mm512_i32gather_ps(index, p, 4);
  }
  // to[k][i] = from[i][k]: pairs of rows, then fours, then the fours' quarters
  LM2_INLINE void transpose(const float* from, int64_t stride, float* to, int64_t to_stride) {
    __m512 row[16], pair[16], quad[16];
    for (int i = 0; i < 16; ++i) row[i] = load(from + i * stride);
    for (int i = 0; i < 16; i += 2) {
      pair[i] = _mm512_unpacklo_ps(row[i], row[i + 1]);
      pair[i + 1] = _mm512_unpackhi_ps(row[i], row[i + 1]);
    }
    // quad[i + k] has, in its quarter q, column 4 q + k of rows i to i + 3
    for (int i = 0; i < 16; i += 4) {
      quad[i] = _mm512_shuffle_ps(pair[i], pair[i + 2], 0x44);
      quad[i + 1] = _mm512_shuffle_ps(pair[i], pair[i + 2], 0xEE);
      quad[i + 2] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
      quad[i + 3] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0xEE);
    }
    for (int k = 0; k < 4; ++k) {
      const V low = _mm512_shuffle_f32x4(quad[k], quad[k + 4], 0x44);
      const V high = _mm512_shuffle_f32x4(quad[k], quad[k + 4], 0xEE);
      const V next_low = _mm512_shuffle_f32x4(quad[k + 8], quad[k + 12], 0x44);
      const V next_high = _mm512_shuffle_f32x4(quad[k + 8], quad[k + 12], 0xEE);
      store(to + k * to_stride, _mm512_shuffle_f32x4(low, next_low, 0x88));
      store(to + (k + 4) * to_stride, _mm512_shuffle_f32x4(low, next_low, 0xDD));
      store(to + (k + 8) * to_stride, _mm512_shuffle_f32x4(high, next_high, 0x88));
      store(to + (k + 12) * to_stride, _mm512_shuffle_f32x4(high, next_high, 0xDD));
    }
  }
};
#endif

#if defined(LM2_AVX512_BF16)
// A word is a V's lane holding two bfloat16, the first in its low half. Denormals count as 0.
struct Avx512Bf16 : Avx512 {
  static constexpr bool kHasPairs = true;

  // sum + a.first * b.first + a.second * b.second
  LM2_INLINE V fma_pairs(V a, V b, V sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  LM2_INLINE __m256i round_to_bfloat16(V x) { return (__m256i)_mm512_cvtneps_pbh(x); }
  LM2_INLINE V pairs(V first, V second) {
    const __m512i low = _mm512_cvtepu16_epi32(round_to_bfloat16(first));
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(round_to_bfloat16(second)), 16);
    return _mm512_castsi512_ps(_mm512_or_si512(low, high));
  }
  LM2_INLINE void store_rounded(bfloat16* p, V x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_to_bfloat16(x));
  }
};
#endif

#if defined(LM2_AVX2)
struct Avx2 : FloatMath<Avx2, __m256> {
  using Scalar = float;
  using V = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kRows = 6;
  static constexpr bool kHasPairs = false;

  LM2_INLINE __m256i first(int count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane);
  }
  LM2_INLINE V set(float x) { return _mm256_set1_ps(x); }
  LM2_INLINE V zero() { return _mm256_setzero_ps(); }
  LM2_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
  LM2_INLINE V load(const float* p, int count) { return _mm256_maskload_ps(p, first(count)); }
  LM2_INLINE V widen(__m128i x, bfloat16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  LM2_INLINE V widen(__m128i x, float16) { return _mm256_cvtph_ps(x); }
  LM2_INLINE __m128i narrow(V x, bfloat16) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m256i packed = _mm256_packus_epi32(high, high);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  }
  LM2_INLINE __m128i narrow(V x, float16) {
    return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  template <class T>
  LM2_INLINE V load(const T* p) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T());
  }
  template <class T>
  LM2_INLINE V load(const T* p, int count) {
    alignas(16) T part[8] = {};
    std::memcpy(part, p, static_cast<size_t>(count) * sizeof(T));
    return load(part);
  }
  LM2_INLINE void store(float* p, V x) { _mm256_storeu_ps(p, x); }
  LM2_INLINE void store(float* p, V x, int count) { _mm256_maskstore_ps(p, first(count), x); }
  template <class T>
  LM2_INLINE void store(T* p, V x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x, T()));
  }
  template <class T>
  LM2_INLINE void store(T* p, V x, int count) {
    alignas(16) T part[8];
    store(part, x);
    std::memcpy(p, part, static_cast<size_t>(count) * sizeof(T));
  }
  LM2_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  LM2_INLINE V max(V a, V b) { return _mm256_max_ps(a, b); }
  LM2_INLINE V min(V a, V b) { return _mm256_min_ps(a, b); }
  LM2_INLINE V abs(V x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
  LM2_INLINE V copy_sign(V magnitude, V sign) {
    const __m256 bit = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(bit, magnitude), _mm256_and_ps(bit, sign));
  }
  LM2_INLINE V round(V x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // 2^n in two factors, so that the result may be subnormal or overflow
  LM2_INLINE V scale(V x, V n) {
    const __m256i whole = _mm256_cvtps_epi32(n);
    const __m256i half = _mm256_srai_epi32(whole, 1);
    return x * power(half) * power(_mm256_sub_epi32(whole, half));
  }
  // the power is a normal number: one factor will do
  LM2_INLINE V exp_down(V x) {
    const V least = set(-87.0f);
    V n;
    const V r = reduce(max(least, x), &n);
    const V y = (set(1.0f) + expm1_reduced(r)) * power(_mm256_cvtps_epi32(n));
    return _mm256_and_ps(y, _mm256_cmp_ps(x, least, _CMP_NLT_UQ));
  }
  LM2_INLINE V power(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
  LM2_INLINE float sum(V x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  LM2_INLINE float maximum(V x) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  LM2_INLINE V unless_not_positive(V x, V value) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, zero(), _CMP_LE_OQ), value);
  }
  LM2_INLINE V if_nonzero(V x, V a, V b) {
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, zero(), _CMP_NEQ_UQ));
  }
  LM2_INLINE V first_lanes(int count, V a, V b) {
    return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(first(count)));
  }
  LM2_INLINE V gather(const float* p, int64_t stride) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i index = _mm256_mullo_epi32(lane, _mm256_set1_epi32(static_cast<int>(stride)));
    return _mm256_i32gather_ps(p, index, 4);
  }
  // to[k][i] = from[i][k]: a third of the time of eight gathers
  LM2_INLINE void transpose(const float* from, int64_t stride, float* to, int64_t to_stride) {
    __m256 row[8], pair[8], quad[8];
    for (int i = 0; i < 8; ++i) row[i] = load(from + i * stride);
    for (int i = 0; i < 4; ++i) {
      pair[2 * i] = _mm256_unpacklo_ps(row[2 * i], row[2 * i + 1]);
      pair[2 * i + 1] = _mm256_unpackhi_ps(row[2 * i], row[2 * i + 1]);
    }
    // quad[k] has column k of rows 0 to 3, or 4 to 7, in its low half, and column k + 4 in its high
    for (int i = 0; i < 8; i += 4) {
      quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
      quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xEE);
      quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
      quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xEE);
    }
    for (int k = 0; k < 4; ++k) {
      store(to + k * to_stride, _mm256_permute2f128_ps(quad[k], quad[k + 4], 0x20));
      store(to + (k + 4) * to_stride, _mm256_permute2f128_ps(quad[k], quad[k + 4], 0x31));
    }
  }
};
#endif

// Any processor: four lanes by the compiler's generic vectors.
typedef float FourFloats __attribute__((vector_size(16)));
struct Base : FloatMath<Base, FourFloats> {
  using Scalar = float;
  using V = FourFloats;
  typedef int32_t Int __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static constexpr int kRows = 4;
  static constexpr bool kHasPairs = false;

  LM2_INLINE V set(float x) { return V{x, x, x, x}; }
  LM2_INLINE V zero() { return V{}; }
  LM2_INLINE Int bits(V x) { return reinterpret_cast<Int>(x); }
  LM2_INLINE V select(Int mask, V a, V b) {
    return reinterpret_cast<V>((mask & bits(a)) | (~mask & bits(b)));
  }
  template <class T>
  LM2_INLINE V load(const T* p) {
    return V{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
  }
  template <class T>
  LM2_INLINE V load(const T* p, int count) {
    V x = zero();
    for (int i = 0; i < count; ++i) x[i] = to_float(p[i]);
    return x;
  }
  template <class T>
  LM2_INLINE void store(T* p, V x) {
    for (int i = 0; i < kLanes; ++i) p[i] = from_float(x[i], T());
  }
  template <class T>
  LM2_INLINE void store(T* p, V x, int count) {
    for (int i = 0; i < count; ++i) p[i] = from_float(x[i], T());
  }
  LM2_INLINE V fma(V a, V b, V c) { return a * b + c; }
  LM2_INLINE V max(V a, V b) { return select(a > b, a, b); }
  LM2_INLINE V min(V a, V b) { return select(a < b, a, b); }
  LM2_INLINE V abs(V x) { return reinterpret_cast<V>(bits(x) & 0x7FFFFFFF); }
  LM2_INLINE V copy_sign(V magnitude, V sign) {
    const Int bit = bits(set(-0.0f));
    return reinterpret_cast<V>((bits(magnitude) & ~bit) | (bits(sign) & bit));
  }
  LM2_INLINE V round(V x) {
    // |x| is far below 2^22: the sum has no digits after the point
    const V magic = set(0x1.8p23f);
    return (x + magic) - magic;
  }
  LM2_INLINE V scale(V x, V n) {
    const Int whole = __builtin_convertvector(n, Int);
    const Int half = whole >> 1;
    return x * power(half) * power(whole - half);
  }
  LM2_INLINE V power(Int n) { return reinterpret_cast<V>((n + 127) << 23); }
  LM2_INLINE float sum(V x) { return (x[0] + x[2]) + (x[1] + x[3]); }
  LM2_INLINE float maximum(V x) { return larger(larger(x[0], x[2]), larger(x[1], x[3])); }
  LM2_INLINE V unless_not_positive(V x, V value) { return select(x <= zero(), zero(), value); }
  LM2_INLINE V if_nonzero(V x, V a, V b) { return select(x != zero(), a, b); }
  LM2_INLINE V first_lanes(int count, V a, V b) {
    return select(Int{0, 1, 2, 3} < Int{count, count, count, count}, a, b);
  }
  LM2_INLINE V gather(const float* p, int64_t stride) {
    return V{p[0], p[stride], p[2 * stride], p[3 * stride]};
  }
  LM2_INLINE void transpose(const float* from, int64_t stride, float* to, int64_t to_stride) {
    for (int k = 0; k < 4; ++k) store(to + k * to_stride, gather(from + k, stride));
  }
};

// float64, for gradient checks: plain code, the C library's functions.
struct Double {
  using Scalar = double;
  using V = double;
  static constexpr int kLanes = 1;
  static constexpr int kRows = 4;
  static constexpr bool kHasPairs = false;

  LM2_INLINE V set(double x) { return x; }
  LM2_INLINE V zero() { return 0.0; }
  LM2_INLINE V load(const double* p) { return *p; }
  LM2_INLINE V load(const double* p, int) { return *p; }
  LM2_INLINE void store(double* p, V x) { *p = x; }
  LM2_INLINE void store(double* p, V x, int) { *p = x; }
  LM2_INLINE V fma(V a, V b, V c) { return a * b + c; }
  LM2_INLINE V max(V a, V b) { return a > b ? a : b; }
  LM2_INLINE V exp(V x) { return std::exp(x); }
  LM2_INLINE V exp_down(V x) { return std::exp(x); }
  LM2_INLINE V sigmoid(V x) { return 1.0 / (1.0 + std::exp(-x)); }
  LM2_INLINE V tanh(V x) { return std::tanh(x); }
  LM2_INLINE V accurate_tanh(V x) { return std::tanh(x); }
  LM2_INLINE V tanh(V x, V* slope) {
    const V u = std::tanh(x);
    *slope = 1.0 - u * u;
    return u;
  }
  LM2_INLINE double sum(V x) { return x; }
  LM2_INLINE double maximum(V x) { return x; }
  LM2_INLINE V unless_not_positive(V x, V value) { return x <= 0.0 ? 0.0 : value; }
  LM2_INLINE V if_nonzero(V x, V a, V b) { return x != 0.0 ? a : b; }
  LM2_INLINE V first_lanes(int, V a, V) { return a; }
  LM2_INLINE V gather(const double* p, int64_t) { return *p; }
  LM2_INLINE void transpose(const double* from, int64_t, double* to, int64_t) { *to = *from; }
};

}  // namespace
}  // namespace lm2::cpu
