// What the kernels use in place of CUDA's own syntax, so that the same .cu files compile with nvcc
// and, in the tests' emulator (tests/native/cuemu.h, which then defines these), with a C++
// compiler.
#pragma once

#ifndef CUEMU
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

template <class T>
using lm2_identity = T;
#define LM2_SHARED(name, ...) __shared__ lm2_identity<__VA_ARGS__> name
#define LM2_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char lm2_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(lm2_dynamic_shared)
#define LM2_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)

#endif

// lm2_mma_m16n8k16 (below) of bfloat16 where tensor cores do not know it (sm_75): the lanes hand
// one another what each needs.
__device__ __forceinline__ void lm2_mma_by_shuffles(float (&d)[4], const uint32_t (&a)[4],
                                                    const uint32_t (&b)[2]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // a loop: unrolled everywhere it is used it takes minutes to compile
#pragma unroll 1
  for (int q = 0; q < 4; ++q) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t top = __shfl_sync(0xffffffffu, a[2 * half], 4 * g + q);
      const uint32_t bottom = __shfl_sync(0xffffffffu, a[2 * half + 1], 4 * g + q);
      const uint32_t left = __shfl_sync(0xffffffffu, b[half], 8 * t + q);
      const uint32_t right = __shfl_sync(0xffffffffu, b[half], 8 * t + 4 + q);
      for (int i = 0; i < 2; ++i) {
        // a bfloat16 is the upper half of a float
        const auto value = [i](uint32_t pair) {
          return __uint_as_float(i == 0 ? pair << 16 : pair & 0xffff0000u);
        };
        d[0] = fmaf(value(top), value(left), d[0]);
        d[1] = fmaf(value(top), value(right), d[1]);
        d[2] = fmaf(value(bottom), value(left), d[2]);
        d[3] = fmaf(value(bottom), value(right), d[3]);
      }
    }
  }
}

#ifndef CUEMU
// A 16-byte vector from global into shared memory, or zeros where it is not `there` (then `from` is
// not read), while the thread goes on: it lies there once lm2_copies_landed says so, for this
// thread, and after a barrier for the others. Code for sm_75 copies at once.
__device__ __forceinline__ void lm2_copy_async(void* to, const void* from, bool there) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from),
                 "r"(there ? 16 : 0)
               : "memory");
#else
  *static_cast<float4*>(to) = there ? *static_cast<const float4*>(from) : float4{};
#endif
}

// What this thread has begun to copy since the last call is one group.
__device__ __forceinline__ void lm2_copies_end() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all but the last kGroups groups of this thread have landed.
template <int kGroups>
__device__ __forceinline__ void lm2_copies_landed() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" : : "n"(kGroups) : "memory");
#endif
}

// Four 8 x 8 matrices of 16-bit elements from shared memory by one warp (PTX's ldmatrix): lane l
// names row l % 8 of matrix l / 8. Of matrix i, `result[i]` gets row lane / 4 at columns
// 2 (lane % 4) and one more; kTransposed, rows 2 (lane % 4) and one more of column lane / 4.
template <bool kTransposed, class T>
__device__ __forceinline__ void lm2_load_matrices(uint32_t (&result)[4], const T* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(address)
                 : "memory");
  }
}

// D (16 x 8, float32) += A (16 x 16) B (16 x 8) by one warp, in the fragment layout of PTX's
// mma.m16n8k16 (row.col). With g = lane / 4 and t = lane % 4, `a` holds rows g and g + 8 at columns
// 2t, 2t + 1, then both at 2t + 8, 2t + 9; `b` rows 2t, 2t + 1, 2t + 8, 2t + 9 of column g; `d`
// rows g and g + 8 at columns 2t, 2t + 1.
template <class T>
__device__ __forceinline__ void lm2_mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  if constexpr (std::is_same_v<T, __half>) {
    // sm_75 has the half of it, twice
    for (int half = 0; half < 2; ++half) {
      asm volatile(
          "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
          "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
    }
  } else {
    lm2_mma_by_shuffles(d, a, b);
  }
#endif
}
#endif

#include "../arguments.h"

namespace lm2::cuda {

// by name: torch's builder switches the 16-bit types' conversions off
template <class T>
__device__ __forceinline__ float to_float(T x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float(x);
  } else {
    return x;
  }
}

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// One element of a tensor whose dtype is known at run time: a branch that all threads take alike.
__device__ __forceinline__ float load(const void* data, Dtype dtype, int64_t index) {
  if (dtype == Dtype::float32) return static_cast<const float*>(data)[index];
  if (dtype == Dtype::float16) return to_float(static_cast<const __half*>(data)[index]);
  return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
}

__device__ __forceinline__ void store(void* data, Dtype dtype, int64_t index, float x) {
  if (dtype == Dtype::float32) {
    static_cast<float*>(data)[index] = x;
  } else if (dtype == Dtype::float16) {
    static_cast<__half*>(data)[index] = from_float<__half>(x);
  } else {
    static_cast<__nv_bfloat16*>(data)[index] = from_float<__nv_bfloat16>(x);
  }
}

// The element of a view's row (b, t), 64-bit throughout.
__device__ __forceinline__ float load(const View& view, int64_t b, int64_t t, int64_t column) {
  return load(view.data, view.dtype, b * view.batch_stride + t * view.row_stride + column);
}

// The sum over a block of kThreads threads, in a fixed order; every thread gets it.
template <int kThreads>
__device__ __forceinline__ float block_sum(float x) {
  LM2_SHARED(partial, float[kThreads / 32]);
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.0f;
  for (int warp = 0; warp < kThreads / 32; ++warp) sum += partial[warp];
  // before the next call writes
  __syncthreads();
  return sum;
}

__host__ __device__ inline int64_t divide_up(int64_t x, int64_t size) {
  return (x + size - 1) / size;
}

inline int64_t round_up(int64_t x, int64_t multiple) { return divide_up(x, multiple) * multiple; }

inline bool fits_grid(int64_t blocks) { return blocks <= 0x7fffffff; }

}  // namespace lm2::cuda
