// residual_layer_norm in CUDA C++: LayerNorm(x + residual), forward and backward, also of relu(x),
// and with tanh(residual) besides.
//
// A block owns a row of any width and goes over it again for every sum: what it has read stays in
// the caches. Backward adds the parameters' gradients up in chunks of rows, one thread a column,
// then the chunks in order: no atomics.
#include "cuda.h"
#include "simt.h"

namespace lm2::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 128;  // of a block that sums over rows
constexpr int64_t kChunks = 128;

// The sum of term(column) over a row; every thread gets it.
template <class F>
__device__ __forceinline__ float row_sum(int64_t width, const F& term) {
  float sum = 0.0f;
  for (int64_t column = threadIdx.x; column < width; column += kThreads) sum += term(column);
  return block_sum<kThreads>(sum);
}

// What is normalised.
__device__ __forceinline__ float total_of(const ResidualLayerNorm& args, int64_t b, int64_t t,
                                          int64_t column) {
  const float x = load(args.x, b, t, column);
  // NaN is not below 0
  return (args.of_relu && x <= 0.0f ? 0.0f : x) + load(args.residual, b, t, column);
}

__global__ void __launch_bounds__(kThreads) forward_kernel(const ResidualLayerNormForward args) {
  const int64_t row = blockIdx.x, b = row / args.tokens, t = row % args.tokens;
  const float size = static_cast<float>(args.width);
  const auto total = [&](int64_t column) { return total_of(args, b, t, column); };
  const float mean = row_sum(args.width, total) / size;
  const auto square = [&](int64_t column) {
    const float centred = total(column) - mean;
    return centred * centred;
  };
  const float variance = row_sum(args.width, square) / size;
  const float rstd = 1.0f / sqrtf(variance + static_cast<float>(args.eps));
  if (threadIdx.x == 0) {
    static_cast<float*>(args.mean)[row] = mean;
    static_cast<float*>(args.rstd)[row] = rstd;
  }
  for (int64_t column = threadIdx.x; column < args.width; column += kThreads) {
    const float normed = (total(column) - mean) * rstd;
    const float y = fmaf(normed, load(args.weight, args.parameter_dtype, column),
                         load(args.bias, args.parameter_dtype, column));
    store(args.out, args.dtype, row * args.width + column, y);
    if (args.tanh == nullptr) continue;
    store(args.tanh, args.residual.dtype, row * args.width + column,
          tanhf(load(args.residual, b, t, column)));
  }
}

// The same in backward. A large mean has lost digits: what is left of it, `left`, must
// not count as signal.
__device__ __forceinline__ float normalised(const ResidualLayerNormBackward& args, int64_t row,
                                            int64_t column, float left) {
  const int64_t b = row / args.tokens, t = row % args.tokens;
  return ((total_of(args, b, t, column) - static_cast<const float*>(args.mean)[row]) - left) *
         static_cast<const float*>(args.rstd)[row];
}

// Writes dx and dresidual, and each row's `left`.
__global__ void __launch_bounds__(kThreads)
    row_kernel(const ResidualLayerNormBackward args, float* left_of) {
  const int64_t row = blockIdx.x, b = row / args.tokens, t = row % args.tokens;
  const float size = static_cast<float>(args.width);
  const float mean = static_cast<const float*>(args.mean)[row];
  const auto centred = [&](int64_t column) { return total_of(args, b, t, column) - mean; };
  const float left = row_sum(args.width, centred) / size;
  if (threadIdx.x == 0) left_of[row] = left;
  if (args.dx == nullptr) return;
  const auto g = [&](int64_t column) {
    return load(args.dout, b, t, column) * load(args.weight, args.parameter_dtype, column);
  };
  const auto gn = [&](int64_t column) { return g(column) * normalised(args, row, column, left); };
  const float mean_g = row_sum(args.width, g) / size;
  const float mean_gn = row_sum(args.width, gn) / size;
  const float rstd = static_cast<const float*>(args.rstd)[row];
  for (int64_t column = threadIdx.x; column < args.width; column += kThreads) {
    const float n = normalised(args, row, column, left);
    float dx = (g(column) - mean_g - n * mean_gn) * rstd;
    const int64_t index = row * args.width + column;
    if (args.dresidual != nullptr) {
      float dresidual = dx;
      if (args.dtanh) {
        const float u = tanhf(load(args.residual, b, t, column));
        dresidual = fmaf(load(args.dtanh, b, t, column), 1.0f - u * u, dresidual);
      }
      if (args.dresidual_otherwise) dresidual += load(args.dresidual_otherwise, b, t, column);
      store(args.dresidual, args.residual.dtype, index, dresidual);
    }
    if (args.of_relu && load(args.x, b, t, column) <= 0.0f) dx = 0.0f;
    store(args.dx, args.dx_dtype, index, dx);
  }
}

int64_t chunk_rows(const ResidualLayerNormBackward& args) {
  const int64_t rows = args.batch * args.tokens, share = divide_up(rows, kChunks);
  return share < 16 ? 16 : share;
}

int64_t chunk_count(const ResidualLayerNormBackward& args) {
  return divide_up(args.batch * args.tokens, chunk_rows(args));
}

// partials (chunks, 2, D): dweight and dbias of one chunk of rows.
__global__ void __launch_bounds__(kColumns)
    chunk_kernel(const ResidualLayerNormBackward args, const float* left_of, float* partials,
                 int64_t chunk) {
  const int64_t pieces = divide_up(args.width, kColumns);
  const int64_t column = blockIdx.x % pieces * kColumns + threadIdx.x;
  if (column >= args.width) return;
  const int64_t item = blockIdx.x / pieces, rows = args.batch * args.tokens;
  float dweight = 0.0f, dbias = 0.0f;
  for (int64_t row = item * chunk; row < rows && row < (item + 1) * chunk; ++row) {
    const float dout = load(args.dout, row / args.tokens, row % args.tokens, column);
    dweight = fmaf(dout, normalised(args, row, column, left_of[row]), dweight);
    dbias += dout;
  }
  partials[2 * item * args.width + column] = dweight;
  partials[(2 * item + 1) * args.width + column] = dbias;
}

__global__ void __launch_bounds__(kColumns)
    combine_kernel(const ResidualLayerNormBackward args, const float* partials, int64_t chunks) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  if (column >= args.width) return;
  // no long chain of roundings
  double dweight = 0.0, dbias = 0.0;
  for (int64_t item = 0; item < chunks; ++item) {
    dweight += partials[2 * item * args.width + column];
    dbias += partials[(2 * item + 1) * args.width + column];
  }
  store(args.dweight, args.parameter_dtype, column, static_cast<float>(dweight));
  store(args.dbias, args.parameter_dtype, column, static_cast<float>(dbias));
}

}  // namespace

cudaError_t residual_layer_norm_forward(const ResidualLayerNormForward& args, cudaStream_t stream) {
  const int64_t rows = args.batch * args.tokens;
  if (args.dtype == Dtype::float64) return cudaErrorInvalidValue;
  if (!fits_grid(rows)) return cudaErrorInvalidConfiguration;
  LM2_LAUNCH(forward_kernel, dim3(static_cast<unsigned>(rows)), dim3(kThreads), 0, stream, args);
  return cudaGetLastError();
}

cudaError_t residual_layer_norm_backward(const ResidualLayerNormBackward& args,
                                         cudaStream_t stream) {
  const int64_t rows = args.batch * args.tokens, chunks = chunk_count(args);
  const int64_t pieces = divide_up(args.width, kColumns);
  if (args.dtype == Dtype::float64) return cudaErrorInvalidValue;
  if (!fits_grid(rows) || !fits_grid(chunks * pieces)) return cudaErrorInvalidConfiguration;
  float* const left_of = static_cast<float*>(args.workspace);
  float* const partials = left_of + rows;
  LM2_LAUNCH(row_kernel, dim3(static_cast<unsigned>(rows)), dim3(kThreads), 0, stream, args,
             left_of);
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || args.dweight == nullptr) return error;
  LM2_LAUNCH(chunk_kernel, dim3(static_cast<unsigned>(chunks * pieces)), dim3(kColumns), 0, stream,
             args, left_of, partials, chunk_rows(args));
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  LM2_LAUNCH(combine_kernel, dim3(static_cast<unsigned>(pieces)), dim3(kColumns), 0, stream, args,
             partials, chunks);
  return cudaGetLastError();
}

int64_t workspace_bytes(const ResidualLayerNormBackward& args) {
  const int64_t partials = args.dweight == nullptr ? 0 : 2 * chunk_count(args) * args.width;
  return 4 * (args.batch * args.tokens + partials);
}

}  // namespace lm2::cuda
