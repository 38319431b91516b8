// pooled_gate in CUDA C++: the (running) mean over tokens of relu(weight * x), and its backward.
//
// Tokens are cut into chunks. One kernel adds each chunk up, a thread a column; one turns the
// chunks' sums into what precedes (backward: follows) each chunk; one goes through the chunks from
// there. All sums in a fixed order, no atomics.
#include "cuda.h"
#include "simt.h"

namespace lm2::cuda {
namespace {

constexpr int kColumns = 128;

int64_t chunk_tokens(const PooledGate& args) {
  const int64_t share = divide_up(args.tokens, 64);
  return share < 16 ? 16 : share;
}

int64_t chunk_count(const PooledGate& args) { return divide_up(args.tokens, chunk_tokens(args)); }

// Where a thread of a (batch, chunk, column) grid stands.
struct Place {
  int64_t b, chunk, column, item, first, end;

  // false beyond the row's end
  __device__ bool find(const PooledGate& args, int64_t chunk_size, int64_t chunks) {
    const int64_t pieces = divide_up(args.width, kColumns);
    column = blockIdx.x % pieces * kColumns + threadIdx.x;
    item = blockIdx.x / pieces;
    b = item / chunks;
    chunk = item % chunks;
    first = chunk * chunk_size;
    end = first + chunk_size < args.tokens ? first + chunk_size : args.tokens;
    return column < args.width;
  }
};

__device__ __forceinline__ float active(const PooledGate& args, float weight, int64_t b, int64_t t,
                                        int64_t column) {
  const float product = weight * load(args.x, b, t, column);
  return product <= 0.0f ? 0.0f : product;
}

__global__ void __launch_bounds__(kColumns)
    sum_kernel(const PooledGateForward args, float* sums, int64_t chunk_size, int64_t chunks) {
  Place place;
  if (!place.find(args, chunk_size, chunks)) return;
  const float weight = load(args.weight, args.parameter_dtype, place.column);
  float sum = 0.0f;
  for (int64_t t = place.first; t < place.end; ++t) {
    sum += active(args, weight, place.b, t, place.column);
  }
  sums[place.item * args.width + place.column] = sum;
}

// Each chunk's sum becomes that of everything before it. One "chunk" per batch row here.
__global__ void __launch_bounds__(kColumns)
    scan_kernel(const PooledGateForward args, float* sums, int64_t chunks) {
  Place place;
  if (!place.find(args, args.tokens, 1)) return;
  // a sum of sums: all of its rounding would go into every mean
  double running = 0.0;
  if (args.pooled_sum) {
    running = static_cast<const float*>(
        args.pooled_sum.data)[place.b * args.pooled_sum.batch_stride + place.column];
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    float& sum = sums[(place.b * chunks + chunk) * args.width + place.column];
    const float own = sum;
    sum = static_cast<float>(running);
    running += own;
  }
  const int64_t index = place.b * args.width + place.column;
  static_cast<float*>(args.new_sum)[index] = static_cast<float>(running);
  if (!args.prefix) {
    store(args.pooled, args.dtype, index,
          static_cast<float>(running / static_cast<double>(args.tokens)));
  }
}

__global__ void __launch_bounds__(kColumns)
    prefix_kernel(const PooledGateForward args, const float* sums, int64_t chunk_size,
                  int64_t chunks) {
  Place place;
  if (!place.find(args, chunk_size, chunks)) return;
  const float weight = load(args.weight, args.parameter_dtype, place.column);
  float running = sums[place.item * args.width + place.column];
  for (int64_t t = place.first; t < place.end; ++t) {
    running += active(args, weight, place.b, t, place.column);
    const float count = static_cast<float>(args.num_pooled + t + 1);
    store(args.pooled, args.dtype, (place.b * args.tokens + t) * args.width + place.column,
          running / count);
  }
}

// What a token's dpooled adds to the gradient of its own and all earlier terms.
__device__ __forceinline__ float share(const PooledGateBackward& args, int64_t b, int64_t t,
                                       int64_t column) {
  const int64_t count = args.prefix ? args.num_pooled + t + 1 : args.tokens;
  return load(args.dpooled, b, t, column) / static_cast<float>(count);
}

__global__ void __launch_bounds__(kColumns)
    share_kernel(const PooledGateBackward args, float* sums, int64_t chunk_size, int64_t chunks) {
  Place place;
  if (!place.find(args, chunk_size, chunks)) return;
  float sum = 0.0f;
  for (int64_t t = place.end - 1; t >= place.first; --t) {
    sum += share(args, place.b, t, place.column);
  }
  sums[place.item * args.width + place.column] = sum;
}

// Each chunk's sum becomes that of everything after it, and of what reaches every token.
__global__ void __launch_bounds__(kColumns)
    suffix_kernel(const PooledGateBackward args, float* sums, int64_t chunks) {
  Place place;
  if (!place.find(args, args.tokens, 1)) return;
  const bool scans = args.prefix && args.dpooled;
  float running = 0.0f;
  if (args.dnew_sum) {
    running = static_cast<const float*>(
        args.dnew_sum.data)[place.b * args.dnew_sum.batch_stride + place.column];
  }
  if (!args.prefix && args.dpooled) running += share(args, place.b, 0, place.column);
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    float& sum = sums[(place.b * chunks + chunk) * args.width + place.column];
    const float own = scans ? sum : 0.0f;
    sum = running;
    running += own;
  }
  if (args.dpooled_sum != nullptr) {
    static_cast<float*>(args.dpooled_sum)[place.b * args.width + place.column] = running;
  }
}

// dx, and each chunk's part of dweight in the place of its sum.
__global__ void __launch_bounds__(kColumns)
    backward_kernel(const PooledGateBackward args, float* sums, int64_t chunk_size,
                    int64_t chunks) {
  Place place;
  if (!place.find(args, chunk_size, chunks)) return;
  const bool scans = args.prefix && args.dpooled;
  const float weight = load(args.weight, args.parameter_dtype, place.column);
  float dactive = sums[place.item * args.width + place.column], dweight = 0.0f;
  for (int64_t t = place.end - 1; t >= place.first; --t) {
    if (scans) dactive += share(args, place.b, t, place.column);
    const float x = load(args.x, place.b, t, place.column);
    const float d = weight * x <= 0.0f ? 0.0f : dactive;
    dweight = fmaf(d, x, dweight);
    if (args.dx != nullptr) {
      store(args.dx, args.dtype, (place.b * args.tokens + t) * args.width + place.column,
            d * weight);
    }
  }
  sums[place.item * args.width + place.column] = dweight;
}

__global__ void __launch_bounds__(kColumns)
    combine_kernel(const PooledGateBackward args, const float* sums, int64_t items) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  if (column >= args.width) return;
  // no long chain of roundings
  double sum = 0.0;
  for (int64_t item = 0; item < items; ++item) sum += sums[item * args.width + column];
  store(args.dweight, args.parameter_dtype, column, static_cast<float>(sum));
}

// The grids over (batch, chunk, column) and over (batch, column).
struct Grids {
  dim3 chunked, whole, columns;
  bool fit;

  explicit Grids(const PooledGate& args) {
    const int64_t pieces = divide_up(args.width, kColumns);
    const int64_t all = args.batch * chunk_count(args) * pieces;
    fit = fits_grid(all);
    chunked = dim3(static_cast<unsigned>(all));
    whole = dim3(static_cast<unsigned>(args.batch * pieces));
    columns = dim3(static_cast<unsigned>(pieces));
  }
};

}  // namespace

cudaError_t pooled_gate_forward(const PooledGateForward& args, cudaStream_t stream) {
  if (args.dtype == Dtype::float64) return cudaErrorInvalidValue;
  const Grids grids(args);
  if (!grids.fit) return cudaErrorInvalidConfiguration;
  const int64_t size = chunk_tokens(args), chunks = chunk_count(args);
  float* const sums = static_cast<float*>(args.workspace);
  LM2_LAUNCH(sum_kernel, grids.chunked, dim3(kColumns), 0, stream, args, sums, size, chunks);
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  LM2_LAUNCH(scan_kernel, grids.whole, dim3(kColumns), 0, stream, args, sums, chunks);
  error = cudaGetLastError();
  if (error != cudaSuccess || !args.prefix) return error;
  LM2_LAUNCH(prefix_kernel, grids.chunked, dim3(kColumns), 0, stream, args, sums, size, chunks);
  return cudaGetLastError();
}

cudaError_t pooled_gate_backward(const PooledGateBackward& args, cudaStream_t stream) {
  if (args.dtype == Dtype::float64) return cudaErrorInvalidValue;
  const Grids grids(args);
  if (!grids.fit) return cudaErrorInvalidConfiguration;
  const int64_t size = chunk_tokens(args), chunks = chunk_count(args);
  float* const sums = static_cast<float*>(args.workspace);
  cudaError_t error = cudaSuccess;
  if (args.prefix && args.dpooled) {
    LM2_LAUNCH(share_kernel, grids.chunked, dim3(kColumns), 0, stream, args, sums, size, chunks);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  LM2_LAUNCH(suffix_kernel, grids.whole, dim3(kColumns), 0, stream, args, sums, chunks);
  error = cudaGetLastError();
  if (error != cudaSuccess || (args.dx == nullptr && args.dweight == nullptr)) return error;
  LM2_LAUNCH(backward_kernel, grids.chunked, dim3(kColumns), 0, stream, args, sums, size, chunks);
  error = cudaGetLastError();
  if (error != cudaSuccess || args.dweight == nullptr) return error;
  LM2_LAUNCH(combine_kernel, grids.columns, dim3(kColumns), 0, stream, args, sums,
             args.batch * chunks);
  return cudaGetLastError();
}

// One sum a chunk and column.
int64_t workspace_bytes(const PooledGateForward& args) {
  return 4 * args.batch * chunk_count(args) * args.width;
}

int64_t workspace_bytes(const PooledGateBackward& args) {
  return 4 * args.batch * chunk_count(args) * args.width;
}

}  // namespace lm2::cuda
