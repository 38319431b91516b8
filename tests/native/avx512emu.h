// The AVX-512 instructions of csrc/cpu/simd.h by loops over lanes, for processors without them.
// Compiled with -include avx512emu.h into copies of level_avx512*.cpp that ask for AVX2 alone.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#pragma GCC diagnostic ignored "-Wpsabi"  // 64-byte vectors: nothing here crosses a library

// a call each: inlined everywhere they compile for a minute under a sanitizer
#define EMULATED static __attribute__((noinline, unused))

namespace avx512emu {

constexpr int kLanes = 16;
typedef int32_t Ints __attribute__((vector_size(64)));

EMULATED Ints ints(__m512i x) { return (Ints)x; }

template <class F>
EMULATED __m512 floats_of(const F& lane) {
  __m512 result;
  for (int i = 0; i < kLanes; ++i) result[i] = lane(i);
  return result;
}

template <class F>
EMULATED __m512i ints_of(const F& lane) {
  Ints result;
  for (int i = 0; i < kLanes; ++i) result[i] = static_cast<int32_t>(lane(i));
  return (__m512i)result;
}

// 16 lanes of 16 bits
template <class F>
EMULATED __m256i shorts_of(const F& lane) {
  uint16_t lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<uint16_t>(lane(i));
  __m256i result;
  std::memcpy(&result, lanes, sizeof result);
  return result;
}

EMULATED uint16_t short_at(__m256i x, int i) {
  uint16_t lanes[kLanes];
  std::memcpy(lanes, &x, sizeof lanes);
  return lanes[i];
}

EMULATED float from_bits(uint32_t bits) {
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

EMULATED uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// what the bfloat16 instructions take a subnormal for
EMULATED float without_subnormal(float x) {
  return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x;
}

// k of a mask's lanes: the mask's bit, lowest first
EMULATED bool is_set(__mmask16 mask, int i) { return mask >> i & 1; }

EMULATED __m512 set1_ps(float x) {
  return floats_of([&](int) { return x; });
}
EMULATED __m512 setzero_ps() { return set1_ps(0.0f); }
EMULATED __m512i set1_epi32(int x) {
  return ints_of([&](int) { return x; });
}
template <class... Int>
EMULATED __m512i setr_epi32(Int... x) {
  const int lanes[kLanes] = {x...};
  return ints_of([&](int i) { return lanes[i]; });
}
EMULATED __m512 loadu_ps(const void* from) {
  __m512 result;
  std::memcpy(&result, from, sizeof result);
  return result;
}
EMULATED void storeu_ps(void* to, __m512 x) { std::memcpy(to, &x, sizeof x); }
EMULATED __m512 maskz_loadu_ps(__mmask16 mask, const float* from) {
  return floats_of([&](int i) { return is_set(mask, i) ? from[i] : 0.0f; });
}
EMULATED void mask_storeu_ps(float* to, __mmask16 mask, __m512 x) {
  for (int i = 0; i < kLanes; ++i) {
    if (is_set(mask, i)) to[i] = x[i];
  }
}
EMULATED __m256i maskz_loadu_epi16(__mmask16 mask, const void* from) {
  const char* const bytes = static_cast<const char*>(from);
  return shorts_of([&](int i) {
    uint16_t x = 0;
    if (is_set(mask, i)) std::memcpy(&x, bytes + 2 * i, 2);
    return x;
  });
}
EMULATED void mask_storeu_epi16(void* to, __mmask16 mask, __m256i x) {
  for (int i = 0; i < kLanes; ++i) {
    const uint16_t lane = short_at(x, i);
    if (is_set(mask, i)) std::memcpy(static_cast<char*>(to) + 2 * i, &lane, 2);
  }
}
EMULATED __m512 i32gather_ps(__m512i index, const void* from, int scale) {
  return floats_of([&](int i) {
    float x;
    std::memcpy(&x, static_cast<const char*>(from) + int64_t{ints(index)[i]} * scale, 4);
    return x;
  });
}

EMULATED __m512 castsi512_ps(__m512i x) { return (__m512)x; }
EMULATED __m512i castps_si512(__m512 x) { return (__m512i)x; }
EMULATED __m512i slli_epi32(__m512i x, int by) {
  return ints_of([&](int i) { return static_cast<uint32_t>(ints(x)[i]) << by; });
}
EMULATED __m512i srli_epi32(__m512i x, int by) {
  return ints_of([&](int i) { return static_cast<uint32_t>(ints(x)[i]) >> by; });
}
EMULATED __m512i add_epi32(__m512i a, __m512i b) {
  return ints_of(
      [&](int i) { return static_cast<uint32_t>(ints(a)[i]) + static_cast<uint32_t>(ints(b)[i]); });
}
EMULATED __m512i mullo_epi32(__m512i a, __m512i b) {
  return ints_of(
      [&](int i) { return static_cast<uint32_t>(ints(a)[i]) * static_cast<uint32_t>(ints(b)[i]); });
}
EMULATED __m512i and_si512(__m512i a, __m512i b) { return a & b; }
EMULATED __m512i or_si512(__m512i a, __m512i b) { return a | b; }
EMULATED __m512i mask_or_epi32(__m512i otherwise, __mmask16 mask, __m512i a, __m512i b) {
  return ints_of(
      [&](int i) { return is_set(mask, i) ? ints(a)[i] | ints(b)[i] : ints(otherwise)[i]; });
}
EMULATED __m512 and_ps(__m512 a, __m512 b) { return (__m512)((__m512i)a & (__m512i)b); }
EMULATED __m512 or_ps(__m512 a, __m512 b) { return (__m512)((__m512i)a | (__m512i)b); }
EMULATED __m512 andnot_ps(__m512 a, __m512 b) { return (__m512)(~(__m512i)a & (__m512i)b); }
EMULATED __m512i cvtepu16_epi32(__m256i x) {
  return ints_of([&](int i) { return short_at(x, i); });
}
EMULATED __m256i cvtepi32_epi16(__m512i x) {
  return shorts_of([&](int i) { return ints(x)[i]; });
}
EMULATED __m512 cvtph_ps(__m256i x) {
  __m256 halves[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(x)),
                      _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
  return loadu_ps(halves);
}
EMULATED __m256i nearest_half(__m512 x) {
  __m256 halves[2];
  storeu_ps(halves, x);
  return _mm256_set_m128i(_mm256_cvtps_ph(halves[1], _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(halves[0], _MM_FROUND_TO_NEAREST_INT));
}

EMULATED __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return floats_of([&](int i) { return std::fma(a[i], b[i], c[i]); });
}
// the second operand where either is NaN
EMULATED __m512 max_ps(__m512 a, __m512 b) {
  return floats_of([&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
}
EMULATED __m512 min_ps(__m512 a, __m512 b) {
  return floats_of([&](int i) { return a[i] < b[i] ? a[i] : b[i]; });
}
EMULATED __m512 abs_ps(__m512 x) {
  return floats_of([&](int i) { return std::fabs(x[i]); });
}
EMULATED __m512 nearest_integer(__m512 x) {
  return floats_of([&](int i) { return std::nearbyint(x[i]); });
}
// x 2^floor(n), rounded once
EMULATED __m512 scalef_ps(__m512 x, __m512 n) {
  return floats_of([&](int i) {
    return n[i] != n[i] ? n[i] : std::ldexp(x[i], static_cast<int>(std::floor(n[i])));
  });
}
template <int kPredicate>
EMULATED __mmask16 cmp_ps_mask(__m512 a, __m512 b) {
  static_assert(kPredicate == _CMP_UNORD_Q || kPredicate == _CMP_LE_OQ ||
                kPredicate == _CMP_NEQ_UQ);
  unsigned mask = 0;
  for (int i = 0; i < kLanes; ++i) {
    bool holds = a[i] != b[i];
    if (kPredicate == _CMP_UNORD_Q) holds = a[i] != a[i] || b[i] != b[i];
    if (kPredicate == _CMP_LE_OQ) holds = a[i] <= b[i];
    mask |= static_cast<unsigned>(holds) << i;
  }
  return static_cast<__mmask16>(mask);
}
EMULATED __m512 mask_mov_ps(__m512 otherwise, __mmask16 mask, __m512 x) {
  return floats_of([&](int i) { return is_set(mask, i) ? x[i] : otherwise[i]; });
}
EMULATED __m512 mask_blend_ps(__mmask16 mask, __m512 a, __m512 b) {
  return floats_of([&](int i) { return is_set(mask, i) ? b[i] : a[i]; });
}
// by halves, as the instruction sequence does
EMULATED float reduce_add_ps(__m512 x) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  }
  return x[0];
}
EMULATED float reduce_max_ps(__m512 x) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x[i] = x[i] > x[i + width] ? x[i] : x[i + width];
  }
  return x[0];
}

// sum + the second term's product, then + the first's, each rounded once
EMULATED __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const Ints x = (Ints)a, y = (Ints)b;
  const auto high = [](int32_t word) __attribute__((always_inline)) {
    return without_subnormal(from_bits(static_cast<uint32_t>(word) & 0xFFFF0000u));
  };
  const auto low = [](int32_t word) __attribute__((always_inline)) {
    return without_subnormal(from_bits(static_cast<uint32_t>(word) << 16));
  };
  return floats_of([&](int i) {
    const float part = std::fma(high(x[i]), high(y[i]), without_subnormal(sum[i]));
    return without_subnormal(std::fma(low(x[i]), low(y[i]), without_subnormal(part)));
  });
}
EMULATED __m256i cvtneps_pbh(__m512 x) {
  return shorts_of([&](int i) {
    const uint32_t bits = to_bits(without_subnormal(x[i]));
    if (x[i] != x[i]) return bits >> 16 | 0x40;
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  });
}

// within each quarter of four lanes; two bits of a mask are a lane
EMULATED __m512 unpacklo_ps(__m512 a, __m512 b) {
  return floats_of([&](int i) { return (i % 2 ? b : a)[i / 4 * 4 + i % 4 / 2]; });
}
EMULATED __m512 unpackhi_ps(__m512 a, __m512 b) {
  return floats_of([&](int i) { return (i % 2 ? b : a)[i / 4 * 4 + 2 + i % 4 / 2]; });
}
template <int kMask>
EMULATED __m512 shuffle_ps(__m512 a, __m512 b) {
  return floats_of(
      [&](int i) { return (i % 4 < 2 ? a : b)[i / 4 * 4 + (kMask >> i % 4 * 2 & 3)]; });
}
// of the quarters
template <int kMask>
EMULATED __m512 shuffle_f32x4(__m512 a, __m512 b) {
  return floats_of([&](int i) { return (i < 8 ? a : b)[(kMask >> i / 4 * 2 & 3) * 4 + i % 4]; });
}

}  // namespace avx512emu

#undef EMULATED
// some of them are macros of the compiler's header where it does not optimise
#undef _mm512_cmp_ps_mask
#undef _mm512_cvtps_ph
#undef _mm512_i32gather_ps
#undef _mm512_roundscale_ps
#undef _mm512_setr_epi32
#undef _mm512_shuffle_f32x4
#undef _mm512_shuffle_ps
#undef _mm512_slli_epi32
#undef _mm512_srli_epi32

#define _mm256_mask_storeu_epi16 avx512emu::mask_storeu_epi16
#define _mm256_maskz_loadu_epi16 avx512emu::maskz_loadu_epi16
#define _mm512_abs_ps avx512emu::abs_ps
#define _mm512_add_epi32 avx512emu::add_epi32
#define _mm512_and_ps avx512emu::and_ps
#define _mm512_and_si512 avx512emu::and_si512
#define _mm512_andnot_ps avx512emu::andnot_ps
#define _mm512_castps_si512 avx512emu::castps_si512
#define _mm512_castsi512_ps avx512emu::castsi512_ps
#define _mm512_cmp_ps_mask(a, b, predicate) avx512emu::cmp_ps_mask<predicate>(a, b)
#define _mm512_cvtepi32_epi16 avx512emu::cvtepi32_epi16
#define _mm512_cvtepu16_epi32 avx512emu::cvtepu16_epi32
#define _mm512_cvtneps_pbh avx512emu::cvtneps_pbh
#define _mm512_cvtph_ps avx512emu::cvtph_ps
#define _mm512_cvtps_ph(x, rounding) avx512emu::nearest_half(x)
#define _mm512_dpbf16_ps avx512emu::dpbf16_ps
#define _mm512_fmadd_ps avx512emu::fmadd_ps
#define _mm512_i32gather_ps avx512emu::i32gather_ps
#define _mm512_loadu_ps avx512emu::loadu_ps
#define _mm512_mask_blend_ps avx512emu::mask_blend_ps
#define _mm512_mask_mov_ps avx512emu::mask_mov_ps
#define _mm512_mask_or_epi32 avx512emu::mask_or_epi32
#define _mm512_mask_storeu_ps avx512emu::mask_storeu_ps
#define _mm512_maskz_loadu_ps avx512emu::maskz_loadu_ps
#define _mm512_max_ps avx512emu::max_ps
#define _mm512_min_ps avx512emu::min_ps
#define _mm512_mullo_epi32 avx512emu::mullo_epi32
#define _mm512_or_ps avx512emu::or_ps
#define _mm512_or_si512 avx512emu::or_si512
#define _mm512_reduce_add_ps avx512emu::reduce_add_ps
#define _mm512_reduce_max_ps avx512emu::reduce_max_ps
#define _mm512_roundscale_ps(x, rounding) avx512emu::nearest_integer(x)
#define _mm512_scalef_ps avx512emu::scalef_ps
#define _mm512_set1_epi32 avx512emu::set1_epi32
#define _mm512_set1_ps avx512emu::set1_ps
#define _mm512_setr_epi32 avx512emu::setr_epi32
#define _mm512_setzero_ps avx512emu::setzero_ps
#define _mm512_shuffle_f32x4(a, b, mask) avx512emu::shuffle_f32x4<mask>(a, b)
#define _mm512_shuffle_ps(a, b, mask) avx512emu::shuffle_ps<mask>(a, b)
#define _mm512_slli_epi32 avx512emu::slli_epi32
#define _mm512_srli_epi32 avx512emu::srli_epi32
#define _mm512_storeu_ps avx512emu::storeu_ps
#define _mm512_unpackhi_ps avx512emu::unpackhi_ps
#define _mm512_unpacklo_ps avx512emu::unpacklo_ps
