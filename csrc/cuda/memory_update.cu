// memory_update in CUDA C++: the gated write and what the layer shows, forward and backward.
//
// Elementwise over (B, T, D): a block owns kThreads columns of a row, a thread one of them.
#include "cuda.h"
#include "simt.h"

namespace lm2::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The place of a thread, and the op's inputs there.
struct Element {
  int64_t b, t, column, index;
  float candidate, memory, input, forget, output;

  // false beyond the row's end
  __device__ bool find(const MemoryUpdate& args) {
    const int64_t pieces = (args.width + kThreads - 1) / kThreads;
    const int64_t row = blockIdx.x / pieces;
    column = blockIdx.x % pieces * kThreads + threadIdx.x;
    b = row / args.tokens;
    t = row % args.tokens;
    index = row * args.width + column;
    return column < args.width;
  }

  __device__ void read(const MemoryUpdate& args) {
    candidate = load(args.candidate, b, t, column);
    memory = load(args.memory, b, t, column);
    float zi = load(args.input_gate, b, t, column), zf = load(args.forget_gate, b, t, column);
    if (args.gate_bias) {
      zi += load(args.gate_bias, b, t, column);
      zf += load(args.gate_bias, b, t, args.width + column);
    }
    input = sigmoid(zi);
    forget = sigmoid(zf);
    output = args.output_gate ? sigmoid(load(args.output_gate, b, t, column)) : 0.0f;
  }
};

__global__ void __launch_bounds__(kThreads) forward_kernel(const MemoryUpdateForward args) {
  Element e;
  if (!e.find(args)) return;
  e.read(args);
  const float written = fmaf(e.forget, e.memory, e.input * tanhf(e.candidate));
  float y = load(args.hidden, e.b, e.t, e.column);
  if (args.output_gate) {
    y = fmaf(e.output, args.shows_memory ? e.memory : e.candidate, y);
  } else {
    y += written;
  }
  store(args.new_memory, args.memory.dtype, e.index, written);
  store(args.output, args.hidden.dtype, e.index, y);
}

__global__ void __launch_bounds__(kThreads) backward_kernel(const MemoryUpdateBackward args) {
  Element e;
  if (!e.find(args)) return;
  e.read(args);
  const bool has_gate = static_cast<bool>(args.output_gate);
  const bool has_dout = static_cast<bool>(args.doutput),
             has_dnew = static_cast<bool>(args.dnew_memory);
  const float dout = has_dout ? load(args.doutput, e.b, e.t, e.column) : 0.0f;
  float dcandidate = 0.0f, dmemory = 0.0f, dinput = 0.0f, dforget = 0.0f, doutgate = 0.0f;
  // a gradient that never arrived is not 0 times something: that is NaN for an infinity
  if (has_dnew || !has_gate) {
    float d = has_dnew ? load(args.dnew_memory, e.b, e.t, e.column) : dout;
    if (has_dnew && has_dout && !has_gate) d += dout;
    const float u = tanhf(e.candidate);
    dcandidate = d * e.input * (1.0f - u * u);
    dmemory = d * e.forget;
    dinput = d * u * e.input * (1.0f - e.input);
    dforget = d * e.memory * e.forget * (1.0f - e.forget);
  }
  if (has_gate && has_dout) {
    const float shown = args.shows_memory ? e.memory : e.candidate;
    doutgate = dout * shown * e.output * (1.0f - e.output);
    (args.shows_memory ? dmemory : dcandidate) += dout * e.output;
  }
  if (args.dcandidate != nullptr) store(args.dcandidate, args.dtype, e.index, dcandidate);
  if (args.dmemory != nullptr) store(args.dmemory, args.memory.dtype, e.index, dmemory);
  if (args.dgates != nullptr) {
    const int64_t gates = has_gate ? 3 : 2;
    const int64_t place = (e.b * args.tokens + e.t) * gates * args.width + e.column;
    store(args.dgates, args.dtype, place, dinput);
    store(args.dgates, args.dtype, place + args.width, dforget);
    if (has_gate) store(args.dgates, args.dtype, place + 2 * args.width, doutgate);
  }
}

template <class Args>
cudaError_t launch(void (*kernel)(Args), const Args& args, cudaStream_t stream) {
  const int64_t blocks = args.batch * args.tokens * ((args.width + kThreads - 1) / kThreads);
  if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
  if (args.dtype == Dtype::float64) return cudaErrorInvalidValue;
  LM2_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, args);
  return cudaGetLastError();
}

}  // namespace

cudaError_t memory_update_forward(const MemoryUpdateForward& args, cudaStream_t stream) {
  return launch<MemoryUpdateForward>(forward_kernel, args, stream);
}

cudaError_t memory_update_backward(const MemoryUpdateBackward& args, cudaStream_t stream) {
  return launch<MemoryUpdateBackward>(backward_kernel, args, stream);
}

}  // namespace lm2::cuda
