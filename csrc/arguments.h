// What a kernel is given: plain pointers, strides and options, the same on the CPU and on a GPU.
//
// No torch header here. csrc/bindings.h checks the tensors and fills these structs, so a kernel may
// rely on every word below and checks nothing itself. Shapes are those of reference.py:
// B batch, T tokens, N slots, D width, H heads, K head width.
#pragma once

#include <cstdint>

namespace lm2 {

enum class Dtype : int32_t { float32, bfloat16, float16, float64 };

// A tensor whose last axis is contiguous and whose data is aligned to its dtype (to no more than
// that). Strides are in elements and may be anything the tensor can have: 0 where an axis is
// broadcast, larger than the row, negative never.
struct View {
  void* data = nullptr;  // null: absent
  Dtype dtype = Dtype::float32;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;   // of the token or slot axis; 0 for a gate (B, 1, D)
  int64_t head_stride = 0;  // of (B, T, H, K) tensors only

  constexpr explicit operator bool() const { return data != nullptr; }
};

// All sizes are at least 1. "Contiguous" results are dense in the order of axes given.
// Statistics are float32, float64 where dtype is float64: "void*" below.

struct MemoryAttention {
  int64_t batch, tokens, slots, heads, width;
  Dtype dtype;  // of query, key, value, out and every gradient
  View query, key, value;
  const uint8_t* slot_mask;  // (B, N), nonzero = takes part; null: all do
  int64_t mask_batch_stride, mask_slot_stride;
  const int64_t* seed;  // one element, in the memory of the device; null: no dropout
  bool causal;
  int64_t slot_offset;  // 0 <= slot_offset <= N; token t sees slots <= slot_offset + t
  double scale;
  int64_t top_k;            // 0: all
  uint32_t drop_threshold;  // csrc/dropout.h: a probability stays iff its bits >= this
  double keep_factor;       // 1 / (1 - p)
};

struct MemoryAttentionForward : MemoryAttention {
  void* out;         // (B, T, H, K) contiguous
  void* statistics;  // (B, H, 2, T) contiguous; what backward wants of a row, or 0
};

struct MemoryAttentionBackward : MemoryAttention {
  View dout, out;
  const void* statistics;  // (B, H, 2, T) contiguous
  void* dquery;            // (B, T, H, K) contiguous; null: not needed
  void* dkey_value;        // (B, N, 2, H, K) contiguous; null: not needed. Not both are null
  bool apart;              // it is (2, B, N, H, K); of the CPU's kernels alone
  void* workspace;  // of the size the backend asked for, 256-byte aligned; null if it asked for 0
};

// A gate of memory_update, or the bias of two: a row a token, a row a slot, or one for all. Token k
// of slot r has the row at r * slot_stride + k * row_stride.
struct GateView : View {
  int64_t slot_stride = 0;
};

struct MemoryUpdate {
  int64_t batch, tokens, width;
  int64_t tokens_per_slot;  // c, 1 <= c <= T: token t is bound to slot t / c
  int64_t slots;            // R = ceil(T / c); the last one may have fewer tokens
  Dtype dtype;              // of candidate, read, the gates and gate_bias; memory and hidden may be
                            // float32 beside it
  View candidate, memory;   // (B, T, D), (B, R, D)
  GateView input_gate, forget_gate;
  GateView output_gate;  // absent in the release formulation
  GateView gate_bias;    // of 2 D columns, added to [input gate | forget gate]; may be absent
  View read;             // what an output gate shows, where not the candidate; may be absent
  bool shows_memory;     // with an output gate: it shows memory; then there is no read
};

struct MemoryUpdateForward : MemoryUpdate {
  View hidden;
  void* output;      // (B, T, D) contiguous, hidden's dtype
  void* new_memory;  // (B, R, D) contiguous, memory's dtype
};

struct MemoryUpdateBackward : MemoryUpdate {
  View doutput, dnew_memory;  // (B, T, D), (B, R, D); either may be absent, not both
  void* dcandidate;           // (B, T, D) contiguous, dtype; null: not needed
  void* dmemory;              // (B, R, D) contiguous, memory's dtype; null: not needed
  void* dgates;               // (B, T, G, D) contiguous, dtype; G is 3 with an output gate, else 2;
                              // null: not needed
  bool apart;                 // they are (G, B, T, D); of the CPU's kernels alone
  void* dslot_gates;          // (B, R, G, D) contiguous, float32 or float64: sums over the slots'
                              // tokens; null: not needed, or a slot has one token
  void* dread;                // (B, T, D) contiguous, dtype; null: not needed, or no read
};

struct ResidualLayerNorm {
  int64_t batch, tokens, width;
  Dtype dtype;            // of x
  Dtype parameter_dtype;  // of weight and bias
  View x, residual;       // residual may have another dtype than x, float32 being one of the two
  bool of_relu;           // normalised is relu(x) + residual
  const void* weight;     // (D,) contiguous
};

struct ResidualLayerNormForward : ResidualLayerNorm {
  const void* bias;  // (D,) contiguous
  double eps;
  void* out;   // (B, T, D) contiguous, x's dtype
  void* mean;  // (B, T) contiguous
  void* rstd;  // (B, T) contiguous
  void* tanh;  // (B, T, D) contiguous, of residual in its dtype; null: not needed
};

struct ResidualLayerNormBackward : ResidualLayerNorm {
  View dout;  // x's dtype
  const void* mean;
  const void* rstd;
  void* dx;        // (B, T, D) contiguous, dx_dtype; null: not needed
  Dtype dx_dtype;  // x's where x and residual agree or dresidual is there, else float32
  View dtanh, dresidual_otherwise;  // of x's and residual's dtype; absent, or there is a dresidual
  void* dresidual;  // (B, T, D) contiguous, residual's dtype: dx, but for a ReLU, and what comes by
                    // those two; null: not needed. With it there is a dx
  void* dweight;    // (D,) contiguous, parameter_dtype; null: not needed
  void* dbias;      // null exactly where dweight is
  void* workspace;  // as above
};

struct PooledGate {
  int64_t batch, tokens, width;
  Dtype dtype;            // of x and pooled
  Dtype parameter_dtype;  // of weight
  View x;
  const void* weight;  // (D,) contiguous
  bool prefix;
  int64_t num_pooled;
};

struct PooledGateForward : PooledGate {
  View pooled_sum;  // (B, D), statistics' dtype; may be absent
  void* pooled;     // (B, T, D) with prefix, else (B, 1, D); contiguous
  void* new_sum;    // (B, D) contiguous
  void* workspace;  // as above
};

struct PooledGateBackward : PooledGate {
  View dpooled;       // (B, T, D) or (B, 1, D), x's dtype; may be absent
  View dnew_sum;      // (B, D), statistics' dtype; may be absent, not both are
  void* dx;           // (B, T, D) contiguous, x's dtype; null: not needed
  void* dweight;      // (D,) contiguous, parameter_dtype; null: not needed
  void* dpooled_sum;  // (B, D) contiguous; null: not needed
  void* workspace;    // as above
};

}  // namespace lm2
