// The dropout mask of lm2_kernels/backends/dropout.py, bit for bit: see there for what it is.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(CUEMU)
#define LM2_HOST_DEVICE __host__ __device__
#else
#define LM2_HOST_DEVICE
#endif

namespace lm2::dropout {

constexpr uint32_t kMultiplier1 = 0x7FEB352Du;
constexpr uint32_t kMultiplier2 = 0x846CA68Bu;
constexpr uint32_t kGolden = 0x9E3779B9u;

LM2_HOST_DEVICE static inline uint32_t half_mix(uint32_t x) {
  x = (x ^ (x >> 16)) * kMultiplier1;
  return x ^ (x >> 15);
}

LM2_HOST_DEVICE static inline uint32_t mix(uint32_t x) {
  x = half_mix(x) * kMultiplier2;
  return x ^ (x >> 16);
}

struct RowKeys {
  uint32_t a, b;
};

// row = (b * H + h) * T + t
LM2_HOST_DEVICE static inline RowKeys row_keys(int64_t seed, int64_t row) {
  const uint32_t key = mix(mix(static_cast<uint32_t>(seed)) ^
                           static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32));
  const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32);
  const uint32_t a = mix(mix(key ^ high) + static_cast<uint32_t>(row));
  return {a, mix(a ^ key)};
}

LM2_HOST_DEVICE static inline uint32_t bits(RowKeys keys, uint32_t slot) {
  return mix(half_mix(slot * kGolden ^ keys.a) + keys.b);
}

}  // namespace lm2::dropout
