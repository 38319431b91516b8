// memory_update in CUDA C++: the gated write and what the layer shows, forward and backward.
//
// A thread owns a column of one slot's row, reads it once and goes through the slot's tokens. Where
// these are several, some threads share the column: each goes through every so many-th token, and
// what they have for the one new row is added up in shared memory, in their order.
#include "cuda.h"
#include "simt.h"

namespace lm2::cuda {
namespace {

constexpr int kThreads = 256;
// The most threads that share a column. The 32 columns that are left are whole sectors of memory.
constexpr int kMostLanes = 8;
// Of several tokens, how many a thread loads before it computes: what it waits for is memory.
constexpr int kTogether = 4;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// How many threads share a column, a power of 2: no more than have tokens to load together.
__host__ __device__ __forceinline__ int lanes_of(const MemoryUpdate& args) {
  int lanes = 1;
  while (lanes < kMostLanes && lanes * kTogether < args.tokens_per_slot) lanes *= 2;
  return lanes;
}

// A thread's column of a slot's row, and which of the slot's tokens are its: lane, lane + lanes, ..
// kMany, here and below, is how many tokens are loaded at a time; 1 where slots have one token.
template <int kMany>
struct Share {
  int64_t b, slot, column;
  bool is_there;  // false past the row's end
  int64_t first_token, tokens = 1;
  int lane = 0, lanes = 1;

  __device__ explicit Share(const MemoryUpdate& args) {
    if constexpr (kMany > 1) lanes = lanes_of(args);
    const int columns = kThreads / lanes;
    const int64_t pieces = divide_up(args.width, columns);
    const int64_t row = blockIdx.x / pieces;
    column = blockIdx.x % pieces * columns + threadIdx.x % columns;
    is_there = column < args.width;
    b = row / args.slots;
    slot = row % args.slots;
    first_token = slot;
    if constexpr (kMany > 1) {
      lane = threadIdx.x / columns;
      first_token = slot * args.tokens_per_slot;
      tokens = args.tokens - first_token;
      if (tokens > args.tokens_per_slot) tokens = args.tokens_per_slot;
    }
  }

  // Its place in a contiguous (B, R, D), and that of the slot's token k in a contiguous (B, T, D).
  __device__ int64_t row_index(const MemoryUpdate& args) const {
    return (b * args.slots + slot) * args.width + column;
  }
  __device__ int64_t token_index(const MemoryUpdate& args, int64_t k) const {
    return (b * args.tokens + first_token + k) * args.width + column;
  }

  // The sums over the threads of a column; the first of them gets them. All threads of a block
  // call.
  template <int kSums>
  __device__ void add_up(float (&x)[kSums]) const {
    LM2_SHARED(parts, float[kSums][kThreads]);
#pragma unroll
    for (int s = 0; s < kSums; ++s) parts[s][threadIdx.x] = x[s];
    __syncthreads();
    const int columns = kThreads / lanes;
    if (lane != 0) return;
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      for (int i = 1; i < lanes; ++i) x[s] += parts[s][i * columns + threadIdx.x];
    }
  }
};

template <class T>
__device__ __forceinline__ float get(const View& view, int64_t index) {
  return to_float(static_cast<const T*>(view.data)[index]);
}

template <class T>
__device__ __forceinline__ void put(void* data, int64_t index, float x) {
  static_cast<T*>(data)[index] = from_float<T>(x);
}

// What a slot's token has in a column.
template <class T, int kMany>
struct Token {
  float candidate, shown, input, forget, output;
  float flow;  // hidden, or its gradient

  __device__ __forceinline__ void read(const MemoryUpdate& args, const Share<kMany>& share,
                                       int64_t k, float memory, const View& stream) {
    const int64_t t = share.first_token + k;
    const auto activation = [&](const View& view) {
      return get<T>(view, share.b * view.batch_stride + t * view.row_stride + share.column);
    };
    const auto gate = [&](const GateView& view, int64_t column) {
      return get<T>(view, share.b * view.batch_stride + share.slot * view.slot_stride +
                              k * view.row_stride + column);
    };
    candidate = activation(args.candidate);
    input = gate(args.input_gate, share.column);
    forget = gate(args.forget_gate, share.column);
    output = args.output_gate ? gate(args.output_gate, share.column) : 0.0f;
    flow = stream ? load(stream, share.b, t, share.column) : 0.0f;
    shown = args.read ? activation(args.read) : args.shows_memory ? memory : candidate;
    if (args.gate_bias) {
      input += gate(args.gate_bias, share.column);
      forget += gate(args.gate_bias, args.width + share.column);
    }
  }

  __device__ __forceinline__ void open_gates(bool has_output_gate) {
    input = sigmoid(input);
    forget = sigmoid(forget);
    if (has_output_gate) output = sigmoid(output);
  }
};

// Calls body(token, k, own) for each of a thread's tokens, and gives the sums of what is put in
// own. What is rounded off on the way is kept, and added at the end: no sum is one long chain.
template <class T, int kMany, int kSums, class F>
__device__ __forceinline__ void sum_over_tokens(float (&sum)[kSums], const MemoryUpdate& args,
                                                const Share<kMany>& share, float memory,
                                                const View& stream, const F& body) {
  float lost[kSums] = {};
  for (int64_t first = share.lane; first < share.tokens; first += kMany * share.lanes) {
    Token<T, kMany> tokens[kMany];
#pragma unroll
    for (int j = 0; j < kMany; ++j) {
      const int64_t k = first + j * share.lanes;
      // past the end the last one, unused: no branch stands between the loads
      tokens[j].read(args, share, k < share.tokens ? k : share.tokens - 1, memory, stream);
    }
    float part[kSums] = {};
#pragma unroll
    for (int j = 0; j < kMany; ++j) {
      const int64_t k = first + j * share.lanes;
      if (k >= share.tokens) break;
      float own[kSums];
      body(tokens[j], k, own);
#pragma unroll
      for (int s = 0; s < kSums; ++s) part[s] = j == 0 ? own[s] : part[s] + own[s];
    }
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      if (first == share.lane) {
        sum[s] = part[s];
      } else {
        const float total = sum[s] + part[s];
        const float of_part = total - sum[s];
        lost[s] += (sum[s] - (total - of_part)) + (part[s] - of_part);
        sum[s] = total;
      }
    }
  }
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    // of an infinity it is NaN; of a single part it is 0, which would turn -0 into 0
    if (lost[s] != 0.0f && sum[s] - sum[s] == 0.0f) sum[s] += lost[s];
  }
}

template <class T, int kMany>
__global__ void __launch_bounds__(kThreads) forward_kernel(const MemoryUpdateForward args) {
  const Share<kMany> share(args);
  float row[1] = {};
  if (share.is_there) {
    const float memory = load(args.memory, share.b, share.slot, share.column);
    const bool has_gate = static_cast<bool>(args.output_gate);
    sum_over_tokens<T>(
        row, args, share, memory, args.hidden, [&](Token<T, kMany>& token, int64_t k, float* own) {
          token.open_gates(has_gate);
          const float written = fmaf(token.forget, memory, token.input * tanhf(token.candidate));
          const float y =
              has_gate ? fmaf(token.output, token.shown, token.flow) : token.flow + written;
          store(args.output, args.hidden.dtype, share.token_index(args, k), y);
          own[0] = written;
        });
  }
  if constexpr (kMany > 1) {
    share.add_up(row);
    row[0] /= static_cast<float>(share.tokens);
  }
  if (share.is_there && share.lane == 0) {
    store(args.new_memory, args.memory.dtype, share.row_index(args), row[0]);
  }
}

// kSums: of the row of memory, and of the gates that tokens share if these are wanted.
template <class T, int kMany, int kSums>
__global__ void __launch_bounds__(kThreads) backward_kernel(const MemoryUpdateBackward args) {
  const Share<kMany> share(args);
  const bool has_gate = static_cast<bool>(args.output_gate);
  const int64_t gates = has_gate ? 3 : 2;
  float sums[kSums] = {};
  if (share.is_there) {
    const float memory = load(args.memory, share.b, share.slot, share.column);
    const bool has_dout = static_cast<bool>(args.doutput),
               has_dnew = static_cast<bool>(args.dnew_memory);
    float dnew = has_dnew ? load(args.dnew_memory, share.b, share.slot, share.column) : 0.0f;
    if constexpr (kMany > 1) dnew /= static_cast<float>(share.tokens);
    sum_over_tokens<T>(
        sums, args, share, memory, args.doutput,
        [&](Token<T, kMany>& token, int64_t k, float* own) {
          token.open_gates(has_gate);
          const float dout = token.flow;
          float dcandidate = 0.0f, dmemory = 0.0f, dread = 0.0f;
          float dinput = 0.0f, dforget = 0.0f, doutgate = 0.0f;
          // a gradient that never arrived is not 0 times something: that is NaN for an infinity
          if (has_dnew || !has_gate) {
            float d = has_dnew ? dnew : dout;
            if (has_dnew && has_dout && !has_gate) d += dout;
            const float u = tanhf(token.candidate);
            dcandidate = d * token.input * (1.0f - u * u);
            dmemory = d * token.forget;
            dinput = d * u * token.input * (1.0f - token.input);
            dforget = d * memory * token.forget * (1.0f - token.forget);
          }
          if (has_gate && has_dout) {
            doutgate = dout * token.shown * token.output * (1.0f - token.output);
            (args.shows_memory ? dmemory : args.read ? dread : dcandidate) += dout * token.output;
          }
          const int64_t index = share.token_index(args, k);
          if (args.dcandidate != nullptr) put<T>(args.dcandidate, index, dcandidate);
          if (args.dread != nullptr) put<T>(args.dread, index, dread);
          if (args.dgates != nullptr) {
            const int64_t place = (index - share.column) * gates + share.column;
            put<T>(args.dgates, place, dinput);
            put<T>(args.dgates, place + args.width, dforget);
            if (has_gate) put<T>(args.dgates, place + 2 * args.width, doutgate);
          }
          own[0] = dmemory;
          if constexpr (kSums > 1) {
            own[1] = dinput;
            own[2] = dforget;
            own[3] = doutgate;
          }
        });
  }
  if constexpr (kMany > 1) share.add_up(sums);
  if (!share.is_there || share.lane != 0) return;
  const int64_t index = share.row_index(args);
  if (args.dmemory != nullptr) store(args.dmemory, args.memory.dtype, index, sums[0]);
  if constexpr (kSums > 1) {
    float* const row =
        static_cast<float*>(args.dslot_gates) + (index - share.column) * gates + share.column;
#pragma unroll
    for (int gate = 0; gate < 3; ++gate) {
      if (gate < gates) row[gate * args.width] = sums[1 + gate];
    }
  }
}

template <class Args>
cudaError_t launch(void (*kernel)(Args), const Args& args, cudaStream_t stream) {
  const int64_t columns = kThreads / lanes_of(args);
  const int64_t blocks = args.batch * args.slots * divide_up(args.width, columns);
  if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
  LM2_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, args);
  return cudaGetLastError();
}

template <class T>
cudaError_t forward(const MemoryUpdateForward& args, cudaStream_t stream) {
  const bool many = args.tokens_per_slot > 1;
  return launch(many ? forward_kernel<T, kTogether> : forward_kernel<T, 1>, args, stream);
}

template <class T>
cudaError_t backward(const MemoryUpdateBackward& args, cudaStream_t stream) {
  if (args.tokens_per_slot == 1) return launch(backward_kernel<T, 1, 1>, args, stream);
  const bool sums_gates = args.dslot_gates != nullptr;
  return launch(sums_gates ? backward_kernel<T, kTogether, 4> : backward_kernel<T, kTogether, 1>,
                args, stream);
}

}  // namespace

cudaError_t memory_update_forward(const MemoryUpdateForward& args, cudaStream_t stream) {
  if (args.dtype == Dtype::float64) return cudaErrorInvalidValue;
  if (args.dtype == Dtype::float32) return forward<float>(args, stream);
  if (args.dtype == Dtype::float16) return forward<__half>(args, stream);
  return forward<__nv_bfloat16>(args, stream);
}

cudaError_t memory_update_backward(const MemoryUpdateBackward& args, cudaStream_t stream) {
  if (args.dtype == Dtype::float64) return cudaErrorInvalidValue;
  if (args.dtype == Dtype::float32) return backward<float>(args, stream);
  if (args.dtype == Dtype::float16) return backward<__half>(args, stream);
  return backward<__nv_bfloat16>(args, stream);
}

}  // namespace lm2::cuda
