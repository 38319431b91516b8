// Kernels with one bug each, and some without, for the emulator's own tests: the first argument
// names the one to run.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "../../csrc/cuda/simt.h"

namespace {

constexpr int kThreads = 64;

__global__ void much_shared_memory(float* out) {
  LM2_DYNAMIC_SHARED(float, shared);
  shared[threadIdx.x] = 1.0f;
  out[threadIdx.x] = shared[threadIdx.x];
}

// each thread's neighbour's value
__global__ void neighbour(const float* x, float* out, bool has_barrier) {
  LM2_SHARED(shared, float[kThreads]);
  shared[threadIdx.x] = x[threadIdx.x];
  if (has_barrier) __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 1) % kThreads];
}

__global__ void divergent() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void exits_early() {
  if (threadIdx.x == 3) return;
  __syncthreads();
}

// a warp waits for a lane that waits for the block
__global__ void never_reached() {
  if (threadIdx.x > 32) __syncwarp();
  __syncthreads();
}

__global__ void not_in_mask() { __shfl_xor_sync(0x0000ffffu, 1.0f, 1); }

__global__ void accumulates(float* sum, bool is_atomic) {
  if (threadIdx.x != 0) return;
  if (is_atomic) {
    atomicAdd(sum, 1.0f);
  } else {
    *sum += 1.0f;
  }
}

__global__ void reads_past_the_end(const float* x, float* out, int size) {
  out[threadIdx.x] = x[threadIdx.x <= static_cast<unsigned>(size) ? threadIdx.x : 0];
}

__global__ void past_shared_memory(float* out) {
  LM2_SHARED(shared, float[kThreads]);
  float* const start = shared;
  start[threadIdx.x + 1] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void unwritten_shared_memory(float* out) {
  LM2_SHARED(shared, float[kThreads]);
  out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void loads_a_vector(const float* x, float* out) {
  const float4 four = *reinterpret_cast<const float4*>(x + threadIdx.x / 16);
  out[threadIdx.x] = four.x;
}

// every shuffle once: what each lane must find is known
__global__ void shuffles(float* out) {
  const float lane = static_cast<float>(threadIdx.x % 32);
  const unsigned all = 0xffffffffu;
  bool right = __shfl_sync(all, lane, 5) == 5.0f;
  right = right && __shfl_xor_sync(all, lane, 3) == static_cast<float>(threadIdx.x % 32 ^ 3);
  right = right && __shfl_down_sync(all, lane, 1) == (lane < 31.0f ? lane + 1.0f : lane);
  right = right && __shfl_up_sync(all, lane, 1) == (lane > 0.0f ? lane - 1.0f : lane);
  right = right && __ballot_sync(all, lane < 4.0f) == 0xfu;
  out[threadIdx.x] = right ? 1.0f : 0.0f;
}

// C = A B with fragments loaded and stored as PTX documents them
template <class T, bool kByShuffles>
__global__ void product(const T* a, const T* b, float* c) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const auto pair = [](T low, T high) {
    const T both[2] = {low, high};
    uint32_t bits;
    memcpy(&bits, both, 4);
    return bits;
  };
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; ++i) {
    const int row = g + i % 2 * 8, column = 2 * t + i / 2 * 8;
    left[i] = pair(a[row * 16 + column], a[row * 16 + column + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    const int row = 2 * t + 8 * i;
    right[i] = pair(b[row * 8 + g], b[(row + 1) * 8 + g]);
  }
  float sum[4] = {};
  if constexpr (kByShuffles) {
    lm2_mma_by_shuffles(sum, left, right);
  } else {
    lm2_mma_m16n8k16<T>(sum, left, right);
  }
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

enum class Wait { right, none, own, no_end, never };

// each thread's neighbour's four values, in two groups of copies of which the second is not used
__global__ void copied_neighbour(const float* x, float* out, int shift, Wait wait) {
  LM2_SHARED(shared, float[2][4 * kThreads]);
  const int i = threadIdx.x;
  for (int stage = 0; stage < 2; ++stage) {
    lm2_copy_async(&shared[stage][4 * i], x + 4 * i + shift, true);
    if (wait != Wait::no_end) lm2_copies_end();
  }
  if (wait != Wait::none) lm2_copies_landed<1>();
  if (wait != Wait::own) __syncthreads();
  for (int j = 0; j < 4; ++j) out[4 * i + j] = shared[0][4 * ((i + 1) % kThreads) + j];
  if (wait != Wait::never) lm2_copies_landed<0>();
}

enum class Phase { right, no_wait, stale, too_many, early };

// each thread's neighbour's four values, twice: a phase of the barrier each
__global__ void copied_by_phases(const float* x, float* out, Phase how) {
  LM2_SHARED(shared, float[4 * kThreads]);
  LM2_SHARED(barrier, uint64_t[1]);
  const int i = threadIdx.x;
  if (i == kThreads / 2) lm2_mbarrier_init(barrier, kThreads + (how == Phase::too_many));
  if (how != Phase::early) __syncthreads();
  for (int step = 0; step < 2; ++step) {
    lm2_copy_async(&shared[4 * i], x + 4 * (i + step), true);
    lm2_mbarrier_arrive(barrier, true);
    if (how != Phase::no_wait) lm2_mbarrier_wait(barrier, how == Phase::stale ? 1 - step : step);
    for (int j = 0; j < 4; ++j) {
      const float value = shared[4 * ((i + 1) % kThreads) + j];
      out[4 * i + j] = step == 0 ? value : out[4 * i + j] + value;
    }
    // before a tile is written over
    __syncthreads();
  }
}

__global__ void copies_zeros(const float* x, float* out) {
  LM2_SHARED(shared, float[4 * kThreads]);
  lm2_copy_async(&shared[4 * threadIdx.x], x + 4 * threadIdx.x, threadIdx.x % 2 == 0);
  lm2_copies_end();
  lm2_copies_landed<0>();
  for (int j = 0; j < 4; ++j) out[4 * threadIdx.x + j] = shared[4 * threadIdx.x + j];
}

// a product whose fragments are loaded as matrices: of A whole, of B transposed, and of B^T as it
// is
template <class T>
__global__ void product_of_matrices(const T* a, const T* b, float* c, int stride, int shift) {
  LM2_SHARED(shared, T[3 * 16 * 32 + 64]);
  T* const left = shared;
  T* const right = left + 16 * stride;
  T* const right_transposed = right + 16 * stride;
  for (int i = threadIdx.x; i < 256; i += 32) {
    left[i / 16 * stride + i % 16] = a[i];
    right[i / 16 * stride + i % 16] = b[i];
    right_transposed[i % 16 * stride + i / 16] = b[i];
  }
  __syncwarp();
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  uint32_t of_a[4], of_b[4], same[4];
  lm2_load_matrices<false>(of_a, left + lane % 16 * stride + lane / 16 * 8 + shift);
  lm2_load_matrices<true>(of_b, right + lane % 16 * stride + lane / 16 * 8);
  lm2_load_matrices<false>(
      same, right_transposed + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8);
  for (int n = 0; n < 2; ++n) {
    float sum[4] = {};
    lm2_mma_m16n8k16<T>(sum, of_a, {of_b[2 * n], of_b[2 * n + 1]});
    const bool equal = of_b[2 * n] == same[2 * n] && of_b[2 * n + 1] == same[2 * n + 1];
    for (int i = 0; i < 4; ++i) {
      c[(g + i / 2 * 8) * 16 + 8 * n + 2 * t + i % 2] = equal ? sum[i] : NAN;
    }
  }
}

[[noreturn]] void wrong(const char* what) {
  std::printf("wrong: %s\n", what);
  std::exit(3);
}

template <class T, bool kByShuffles>
void check_product() {
  T a_values[16 * 16], b_values[16 * 8];
  float c_values[16 * 8];
  T *const a = a_values, *const b = b_values;
  float* const c = c_values;
  for (int i = 0; i < 256; ++i) a[i] = T(static_cast<float>(i * 37 % 19 - 9));
  for (int i = 0; i < 128; ++i) b[i] = T(static_cast<float>(i * 23 % 17 - 8));
  const auto kernel = product<T, kByShuffles>;
  LM2_LAUNCH(kernel, dim3(1), dim3(32), 0, nullptr, a, b, c);
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += float(a[row * 16 + k]) * float(b[k * 8 + column]);
      // small whole numbers: exact
      if (c[row * 8 + column] != sum) wrong("product");
    }
  }
}

template <class T>
void check_matrices(int stride, int shift) {
  T a_values[256], b_values[256];
  float c_values[256];
  T *const a = a_values, *const b = b_values;
  float* const c = c_values;
  for (int i = 0; i < 256; ++i) {
    a[i] = T(static_cast<float>(i * 37 % 19 - 9));
    b[i] = T(static_cast<float>(i * 23 % 17 - 8));
  }
  const auto kernel = product_of_matrices<T>;
  LM2_LAUNCH(kernel, dim3(1), dim3(32), 0, nullptr, a, b, c, stride, shift);
  for (int i = 0; i < 256; ++i) {
    float sum = 0.0f;
    for (int k = 0; k < 16; ++k) sum += float(a[i / 16 * 16 + k]) * float(b[k * 16 + i % 16]);
    if (c[i] != sum) wrong("product of matrices");
  }
}

void check_copies(int shift, Wait wait) {
  const std::unique_ptr<float[]> x_values(new float[4 * kThreads + 4]);
  const std::unique_ptr<float[]> out_values(new float[4 * kThreads]);
  float *const x = x_values.get(), *const out = out_values.get();
  for (int i = 0; i < 4 * kThreads + 4; ++i) x[i] = static_cast<float>(i);
  LM2_LAUNCH(copied_neighbour, dim3(1), dim3(kThreads), 0, nullptr, x, out, shift, wait);
  for (int i = 0; i < 4 * kThreads; ++i) {
    if (out[i] != out[i]) wrong("not NaN");
    if (out[i] != x[(i + 4) % (4 * kThreads)]) wrong("copies");
  }
}

void check_phases(Phase how) {
  const std::unique_ptr<float[]> x_values(new float[4 * kThreads + 4]);
  const std::unique_ptr<float[]> out_values(new float[4 * kThreads]);
  float *const x = x_values.get(), *const out = out_values.get();
  for (int i = 0; i < 4 * kThreads + 4; ++i) x[i] = static_cast<float>(i);
  LM2_LAUNCH(copied_by_phases, dim3(1), dim3(kThreads), 0, nullptr, x, out, how);
  for (int i = 0; i < 4 * kThreads; ++i) {
    const int from = (i + 4) % (4 * kThreads);
    if (out[i] != out[i]) wrong("not NaN");
    if (out[i] != x[from] + x[from + 4]) wrong("phases");
  }
}

void check_zeros() {
  const std::unique_ptr<float[]> x_values(new float[4 * kThreads]);
  const std::unique_ptr<float[]> out_values(new float[4 * kThreads]);
  float *const x = x_values.get(), *const out = out_values.get();
  for (int i = 0; i < 4 * kThreads; ++i) x[i] = static_cast<float>(i + 1);
  LM2_LAUNCH(copies_zeros, dim3(1), dim3(kThreads), 0, nullptr, x, out);
  for (int i = 0; i < 4 * kThreads; ++i) {
    if (out[i] != (i / 4 % 2 == 0 ? x[i] : 0.0f)) wrong("zeros");
  }
}

}  // namespace

int main(int, char** arguments) {
  const char* const name = arguments[1];
  const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
  const std::unique_ptr<float[]> x_values(new float[kThreads]), out_values(new float[kThreads]);
  float *const x = x_values.get(), *const out = out_values.get();
  for (int i = 0; i < kThreads; ++i) x[i] = static_cast<float>(i);
  const dim3 one(1), many(8), block(kThreads);
  try {
    if (is("barrier") || is("missing barrier")) {
      LM2_LAUNCH(neighbour, one, block, 0, nullptr, x, out, is("barrier"));
      for (int i = 0; i < kThreads; ++i) {
        if (is("barrier") && out[i] != x[(i + 1) % kThreads]) wrong("neighbour");
      }
    } else if (is("divergent barrier")) {
      LM2_LAUNCH(divergent, one, block, 0, nullptr);
    } else if (is("early exit")) {
      LM2_LAUNCH(exits_early, one, block, 0, nullptr);
    } else if (is("deadlock")) {
      LM2_LAUNCH(never_reached, one, block, 0, nullptr);
    } else if (is("not in mask")) {
      LM2_LAUNCH(not_in_mask, one, block, 0, nullptr);
    } else if (is("atomic sum") || is("unsynchronised sum")) {
      out[0] = 0.0f;
      LM2_LAUNCH(accumulates, many, block, 0, nullptr, out, is("atomic sum"));
      if (out[0] != 8.0f) wrong("sum");
    } else if (is("past the end")) {
      LM2_LAUNCH(reads_past_the_end, one, dim3(kThreads + 1), 0, nullptr, x, out, kThreads);
    } else if (is("past shared memory")) {
      LM2_LAUNCH(past_shared_memory, one, block, 0, nullptr, out);
    } else if (is("unwritten shared memory")) {
      LM2_LAUNCH(unwritten_shared_memory, one, block, 0, nullptr, out);
      for (int i = 0; i < kThreads; ++i) {
        if (out[i] == out[i]) wrong("not NaN");
      }
    } else if (is("misaligned vector")) {
      LM2_LAUNCH(loads_a_vector, one, dim3(32), 0, nullptr, x, out);
    } else if (is("shuffles")) {
      LM2_LAUNCH(shuffles, one, block, 0, nullptr, out);
      for (int i = 0; i < kThreads; ++i) {
        if (out[i] != 1.0f) wrong("shuffle");
      }
    } else if (is("product")) {
      check_product<__half, false>();
      check_product<__nv_bfloat16, false>();
      // what sm_75 does, against the definition
      check_product<__nv_bfloat16, true>();
    } else if (is("matrices")) {
      check_matrices<__half>(24, 0);
      check_matrices<__nv_bfloat16>(24, 0);
    } else if (is("shared banks")) {
      check_matrices<__half>(32, 0);
    } else if (is("misaligned matrix")) {
      check_matrices<__half>(24, 1);
    } else if (is("copies")) {
      check_copies(0, Wait::right);
    } else if (is("copies read too early")) {
      check_copies(0, Wait::none);
    } else if (is("copies read by others too early")) {
      check_copies(0, Wait::own);
    } else if (is("copies never ended")) {
      check_copies(0, Wait::no_end);
    } else if (is("copies never waited for")) {
      check_copies(0, Wait::never);
    } else if (is("misaligned copy")) {
      check_copies(1, Wait::right);
    } else if (is("phases")) {
      check_phases(Phase::right);
    } else if (is("phase not waited for")) {
      check_phases(Phase::no_wait);
    } else if (is("phase of the other parity")) {
      check_phases(Phase::stale);
    } else if (is("phase of too many")) {
      check_phases(Phase::too_many);
    } else if (is("phase before its barrier")) {
      check_phases(Phase::early);
    } else if (is("zeros")) {
      check_zeros();
    } else if (is("allowed shared memory") || is("shared memory that nobody allowed")) {
      if (is("allowed shared memory")) {
        cudaFuncSetAttribute(reinterpret_cast<const void*>(much_shared_memory),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, 64 * 1024);
      }
      LM2_LAUNCH(much_shared_memory, one, block, 64 * 1024, nullptr, out);
    } else if (is("grid too large")) {
      LM2_LAUNCH(divergent, dim3(1, 65536), block, 0, nullptr);
    } else {
      wrong("no such kernel");
    }
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 4;
  }
  std::puts("clean");
  return 0;
}
