// memory_update in CUDA C++: the gated write and what the layer shows, forward and backward.
//
// A block owns some columns of one slot's row, and its threads the slot's tokens: each thread reads
// its column of the row once and goes through every so many-th token. What the threads of a column
// have for the one new row they add up in shared memory, in order. With one token a slot a thread
// owns a column, and nothing is added.
#include "cuda.h"
#include "simt.h"

namespace lm2::cuda {
namespace {

constexpr int kThreads = 256;
// The most threads that share a column. What is left, 32 columns, are whole sectors of memory.
constexpr int kMostLanes = 8;
// Tokens whose parts are added up before they are added to a thread's sum: no sum is one long chain.
constexpr int kRun = 16;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// How many threads share a column: a power of 2, by the tokens alone.
__host__ __device__ __forceinline__ int lanes_of(const MemoryUpdate& args) {
  int lanes = 1;
  while (lanes < kMostLanes && lanes < args.tokens_per_slot) lanes *= 2;
  return lanes;
}

// What of the tensors is a thread's: a column of a slot, and which of its tokens.
struct Share {
  int64_t b, slot, column;
  int64_t first_token, tokens;  // of the slot
  int lane, lanes;
  bool is_there;  // false beyond the row's end

  __device__ explicit Share(const MemoryUpdate& args) {
    lanes = lanes_of(args);
    const int columns = kThreads / lanes;
    const int64_t pieces = (args.width + columns - 1) / columns;
    const int64_t row = blockIdx.x / pieces;
    column = blockIdx.x % pieces * columns + threadIdx.x % columns;
    lane = threadIdx.x / columns;
    b = row / args.slots;
    slot = row % args.slots;
    first_token = slot * args.tokens_per_slot;
    tokens = min(args.tokens_per_slot, args.tokens - first_token);
    is_there = column < args.width;
  }

  // Of its column in a contiguous (B, R, D), and of its token k's in a contiguous (B, T, D).
  __device__ int64_t row_index(const MemoryUpdate& args) const {
    return (b * args.slots + slot) * args.width + column;
  }
  __device__ int64_t token_index(const MemoryUpdate& args, int64_t k) const {
    return (b * args.tokens + first_token + k) * args.width + column;
  }

  // The sum over a column's threads, in their order; the first of them gets it.
  __device__ float add_up(float x) const {
    if (lanes == 1) return x;
    LM2_SHARED(parts, float[kThreads]);
    parts[threadIdx.x] = x;
    __syncthreads();
    for (int i = threadIdx.x + kThreads / lanes; lane == 0 && i < kThreads; i += kThreads / lanes) {
      x += parts[i];
    }
    return x;
  }
};

// A sum over a thread's tokens, run by run.
struct Sum {
  float total = 0.0f, run = 0.0f;
  int added = 0;
  ...
};
