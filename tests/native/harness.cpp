// Runs every kernel over small cases, for the sanitizers: buffers of exactly the right size, starts
// off any alignment, strided and broadcast inputs, results that must be written to the last
// element.
//
// Compiled with csrc/cpu/*.cpp (but for what needs torch), or with -DHARNESS_CUDA and the
// emulator's -include cuemu.h together with csrc/cuda/*.cu. Numbers are checked elsewhere, against
// the oracle.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#ifdef HARNESS_CUDA
#include "../../csrc/cuda/cuda.h"
namespace device = lm2::cuda;
#else
#include "../../csrc/cpu/cpu.h"
namespace device = lm2::cpu;

// threads of our own: the sanitizer sees every synchronisation
void lm2::cpu::parallel_for(int64_t count, int64_t, LoopBody body, void* context) {
  std::vector<std::thread> threads;
  for (int64_t thread = 0; thread < 3; ++thread) {
    const int64_t begin = count * thread / 3, end = count * (thread + 1) / 3;
    if (begin < end) threads.emplace_back([=] { body(context, begin, end); });
  }
  for (auto& thread : threads) thread.join();
}

int64_t lm2::cpu::num_threads() { return 3; }
#endif

using namespace lm2;

namespace {

// ThreadSanitizer is slow in the emulator: unless all is asked for, all gradients and cotangents
// together alone, a kernel that is one code for all dtypes in one of them, and few rows.
#if defined(HARNESS_CUDA) && defined(__SANITIZE_THREAD__)
const bool kAll = std::getenv("HARNESS_ALL") != nullptr;
#else
constexpr bool kAll = true;
#endif
const int kFirstSubset = kAll ? 1 : 3;
const int64_t kTokens = kAll ? 3 : 2;

uint32_t state = 1;

float random_number() {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) / (1 << 23) - 1.0f;
}

int64_t size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// A heap block of exactly `count` elements, `skip` elements off the alignment of malloc.
struct Buffer {
  std::unique_ptr<char[]> memory;
  char* data;
  int64_t count;
  Dtype dtype;

  Buffer(int64_t count, Dtype dtype, int64_t skip = 0) : count(count), dtype(dtype) {
    const int64_t bytes = count * size_of(dtype), before = skip * size_of(dtype);
    memory.reset(new char[static_cast<size_t>(bytes + before)]);
    data = memory.get() + before;
    std::memset(memory.get(), 0xff, static_cast<size_t>(bytes + before));
  }

  void fill() {
    for (int64_t i = 0; i < count; ++i) {
      const float x = random_number();
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      const double wide = x;
      // float16: random bits of a magnitude below 2
      const uint16_t half = static_cast<uint16_t>((bits >> 16 & 0x8000) | (bits >> 9 & 0x3bff));
      const uint16_t brain = static_cast<uint16_t>(bits >> 16);
      char* const to = data + i * size_of(dtype);
      if (dtype == Dtype::float64) std::memcpy(to, &wide, 8);
      if (dtype == Dtype::float32) std::memcpy(to, &x, 4);
      if (dtype == Dtype::float16) std::memcpy(to, &half, 2);
      if (dtype == Dtype::bfloat16) std::memcpy(to, &brain, 2);
    }
  }

  bool is_nan(int64_t i) const {
    uint64_t bits = 0;
    std::memcpy(&bits, data + i * size_of(dtype), static_cast<size_t>(size_of(dtype)));
    if (dtype == Dtype::float64) return (bits & 0x7fffffffffffffff) > 0x7ff0000000000000;
    if (dtype == Dtype::float32) return (bits & 0x7fffffff) > 0x7f800000;
    if (dtype == Dtype::float16) return (bits & 0x7fff) > 0x7c00;
    return (bits & 0x7fff) > 0x7f80;
  }
};

#ifdef HARNESS_CUDA
constexpr bool kHasApart = false;
#else
constexpr bool kHasApart = true;
#endif

std::vector<std::unique_ptr<Buffer>> buffers;
const char* current = "";

// How an input lies in memory.
enum class Layout { dense, unaligned, strided, broadcast };

View input(Dtype dtype, Layout layout, int64_t batch, int64_t rows, int64_t heads, int64_t width) {
  const int64_t gap = layout == Layout::strided ? 3 : 0;
  View view;
  view.dtype = dtype;
  view.head_stride = width + gap;
  view.row_stride = heads * view.head_stride + gap;
  view.batch_stride = layout == Layout::broadcast ? 0 : rows * view.row_stride + gap;
  // up to the last element and no further
  const int64_t count = (batch - 1) * view.batch_stride + (rows - 1) * view.row_stride +
                        (heads - 1) * view.head_stride + width;
  buffers.push_back(std::make_unique<Buffer>(count, dtype, layout == Layout::unaligned ? 1 : 0));
  buffers.back()->fill();
  view.data = buffers.back()->data;
  return view;
}

struct Result {
  Buffer* buffer;
  const char* name;
};
std::vector<Result> results;

void* result(const char* name, int64_t count, Dtype dtype) {
  buffers.push_back(std::make_unique<Buffer>(count, dtype));
  results.push_back({buffers.back().get(), name});
  return buffers.back()->data;
}

void check_results() {
  for (const Result& r : results) {
    for (int64_t i = 0; i < r.buffer->count; ++i) {
      if (!r.buffer->is_nan(i)) continue;
      std::printf("%s: %s[%ld] was not written\n", current, r.name, static_cast<long>(i));
      std::exit(3);
    }
  }
  results.clear();
}

template <class Args>
void run(const char* name, Args& args,
#ifdef HARNESS_CUDA
         cudaError_t (*function)(const Args&, cudaStream_t)
#else
         void (*function)(const Args&)
#endif
) {
  current = name;
#ifdef HARNESS_CUDA
  if constexpr (requires { args.workspace; }) {
    buffers.push_back(
        std::make_unique<Buffer>((device::workspace_bytes(args) + 3) / 4, Dtype::float32));
    args.workspace = buffers.back()->data;
  }
  if (function(args, nullptr) != cudaSuccess) {
    std::printf("%s: launch failed\n", name);
    std::exit(3);
  }
#else
  function(args);
#endif
  check_results();
}

struct Attention {
  int64_t batch, tokens, slots, heads, width;
  bool causal;
  int64_t offset;
  bool mask, dropout;
  int64_t top_k;
};

void attention(const Attention& c, Dtype dtype, Layout layout) {
  const Dtype wide = dtype == Dtype::float64 ? dtype : Dtype::float32;
  MemoryAttention common = {};
  common.batch = c.batch;
  common.tokens = c.tokens;
  common.slots = c.slots;
  common.heads = c.heads;
  common.width = c.width;
  common.dtype = dtype;
  common.query = input(dtype, layout, c.batch, c.tokens, c.heads, c.width);
  common.key = input(dtype, layout, c.batch, c.slots, c.heads, c.width);
  common.value = input(dtype, layout, c.batch, c.slots, c.heads, c.width);
  std::unique_ptr<uint8_t[]> mask(new uint8_t[static_cast<size_t>(c.batch * c.slots)]);
  for (int64_t i = 0; i < c.batch * c.slots; ++i) mask[i] = random_number() > 0;
  if (c.mask) {
    common.slot_mask = mask.get();
    common.mask_batch_stride = c.slots;
    common.mask_slot_stride = 1;
  }
  const std::unique_ptr<int64_t> seed(new int64_t(-123456789012345));
  if (c.dropout) common.seed = seed.get();
  common.drop_threshold = 1u << 30;
  common.keep_factor = 4.0 / 3.0;
  common.causal = c.causal;
  common.slot_offset = c.offset;
  common.scale = 0.7;
  common.top_k = c.top_k;
  const int64_t read = c.batch * c.tokens * c.heads * c.width;
  MemoryAttentionForward forward = {common, nullptr, nullptr};
  forward.out = result("out", read, dtype);
  forward.statistics = result("statistics", 2 * c.batch * c.heads * c.tokens, wide);
  run("memory_attention_forward", forward, device::memory_attention_forward);
  for (int needs = kFirstSubset; needs < 4; ++needs) {
    MemoryAttentionBackward backward = {};
    static_cast<MemoryAttention&>(backward) = common;
    backward.statistics = forward.statistics;
    backward.apart = kHasApart && c.causal;
    backward.dout = input(dtype, layout, c.batch, c.tokens, c.heads, c.width);
    backward.out = {forward.out, dtype, c.tokens * c.heads * c.width, c.heads * c.width, c.width};
    if (needs & 1) backward.dquery = result("dquery", read, dtype);
    if (needs & 2) {
      backward.dkey_value = result("dkey_value", 2 * c.batch * c.slots * c.heads * c.width, dtype);
    }
    run("memory_attention_backward", backward, device::memory_attention_backward);
  }
  buffers.clear();
}

// What of memory_update is there, and which rows its gates have.
struct Update {
  bool paper, bias, read;
  int64_t tokens_per_slot;
  bool gates_of_slots;
};

void update(int64_t batch, int64_t tokens, int64_t width, Dtype dtype, Dtype stream,
            const Update& c, Layout layout) {
  const int64_t slots = (tokens + c.tokens_per_slot - 1) / c.tokens_per_slot;
  const int64_t size = batch * tokens * width, row_size = batch * slots * width;
  const auto gate = [&](int64_t columns) {
    GateView view{input(dtype, layout, batch, c.gates_of_slots ? slots : tokens, 1, columns)};
    view.slot_stride = view.row_stride * (c.gates_of_slots ? 1 : c.tokens_per_slot);
    if (c.gates_of_slots) view.row_stride = 0;
    return view;
  };
  MemoryUpdate common = {};
  common.batch = batch;
  common.tokens = tokens;
  common.width = width;
  common.tokens_per_slot = c.tokens_per_slot;
  common.slots = slots;
  common.dtype = dtype;
  common.candidate = input(dtype, layout, batch, tokens, 1, width);
  common.memory = input(stream, layout, batch, slots, 1, width);
  common.input_gate = GateView{input(dtype, layout, batch, 1, 1, width)};
  common.input_gate.row_stride = 0;
  common.forget_gate = gate(width);
  if (c.paper) common.output_gate = gate(width);
  if (c.bias) common.gate_bias = gate(2 * width);
  if (c.read) common.read = input(dtype, layout, batch, tokens, 1, width);
  common.shows_memory = c.bias && !c.read;
  MemoryUpdateForward forward = {common, input(stream, layout, batch, tokens, 1, width), nullptr,
                                 nullptr};
  forward.output = result("output", size, stream);
  forward.new_memory = result("new_memory", row_size, stream);
  run("memory_update_forward", forward, device::memory_update_forward);
  for (int given = kFirstSubset; given < 4; ++given) {
    MemoryUpdateBackward backward = {};
    static_cast<MemoryUpdate&>(backward) = common;
    backward.apart = kHasApart && c.paper;
    if (given & 1) backward.doutput = input(stream, layout, batch, tokens, 1, width);
    if (given & 2) backward.dnew_memory = input(stream, layout, batch, slots, 1, width);
    backward.dcandidate = result("dcandidate", size, dtype);
    if (given != 1) backward.dmemory = result("dmemory", row_size, stream);
    const int64_t gates = c.paper ? 3 : 2;
    if (given != 2) backward.dgates = result("dgates", gates * size, dtype);
    if (given != 1 && c.tokens_per_slot > 1) {
      const Dtype wide = dtype == Dtype::float64 ? dtype : Dtype::float32;
      backward.dslot_gates = result("dslot_gates", gates * row_size, wide);
    }
    if (c.read && given != 2) backward.dread = result("dread", size, dtype);
    run("memory_update_backward", backward, device::memory_update_backward);
  }
  buffers.clear();
}

// With tanh(residual) besides, or of relu(x).
void optional_norm(ResidualLayerNormForward forward, bool with_tanh, Dtype stream, Layout layout) {
  const int64_t batch = forward.batch, tokens = forward.tokens, width = forward.width;
  const int64_t size = batch * tokens * width;
  forward.of_relu = !with_tanh;
  forward.out = result("out", size, forward.dtype);
  if (with_tanh) forward.tanh = result("tanh", size, stream);
  run(with_tanh ? "norm and tanh" : "norm of ReLU", forward, device::residual_layer_norm_forward);
  ResidualLayerNormBackward backward = {};
  static_cast<ResidualLayerNorm&>(backward) = forward;
  backward.dout = input(forward.dtype, layout, batch, tokens, 1, width);
  backward.mean = forward.mean;
  backward.rstd = forward.rstd;
  backward.dx_dtype = forward.dtype;
  backward.dx = result("dx", size, forward.dtype);
  backward.dresidual = result("dresidual", size, stream);
  if (with_tanh) {
    backward.dtanh = input(forward.dtype, layout, batch, tokens, 1, width);
    backward.dresidual_otherwise = input(stream, layout, batch, tokens, 1, width);
  }
  run(with_tanh ? "norm and tanh, backward" : "norm of ReLU, backward", backward,
      device::residual_layer_norm_backward);
}

void norm(int64_t batch, int64_t tokens, int64_t width, Dtype dtype, Dtype stream, Layout layout) {
  const Dtype wide = dtype == Dtype::float64 ? dtype : Dtype::float32;
  const int64_t rows = batch * tokens;
  ResidualLayerNorm common = {};
  common.batch = batch;
  common.tokens = tokens;
  common.width = width;
  common.dtype = dtype;
  common.parameter_dtype = stream;
  common.x = input(dtype, layout, batch, tokens, 1, width);
  common.residual = input(stream, layout, batch, tokens, 1, width);
  common.weight = input(stream, Layout::unaligned, 1, 1, 1, width).data;
  ResidualLayerNormForward forward = {common, nullptr, 1e-5, nullptr, nullptr, nullptr, nullptr};
  forward.bias = input(stream, Layout::unaligned, 1, 1, 1, width).data;
  forward.out = result("out", rows * width, dtype);
  forward.mean = result("mean", rows, wide);
  forward.rstd = result("rstd", rows, wide);
  run("residual_layer_norm_forward", forward, device::residual_layer_norm_forward);
  for (int needs = kFirstSubset; needs < 4; ++needs) {
    ResidualLayerNormBackward backward = {};
    static_cast<ResidualLayerNorm&>(backward) = common;
    backward.dout = input(dtype, layout, batch, tokens, 1, width);
    backward.mean = forward.mean;
    backward.rstd = forward.rstd;
    backward.dx_dtype = dtype == stream ? dtype : Dtype::float32;
    if (needs & 1) backward.dx = result("dx", rows * width, backward.dx_dtype);
    if (needs & 2) {
      backward.dweight = result("dweight", width, stream);
      backward.dbias = result("dbias", width, stream);
    }
    run("residual_layer_norm_backward", backward, device::residual_layer_norm_backward);
  }
  // the sums over many rows are those of above
  if (kAll || tokens == kTokens) {
    optional_norm(forward, true, stream, layout);
    optional_norm(forward, false, stream, layout);
  }
  buffers.clear();
}

void pool(int64_t batch, int64_t tokens, int64_t width, Dtype dtype, Dtype parameter, bool prefix,
          Layout layout) {
  const Dtype wide = dtype == Dtype::float64 ? dtype : Dtype::float32;
  const int64_t pooled = batch * (prefix ? tokens : 1) * width;
  PooledGate common = {};
  common.batch = batch;
  common.tokens = tokens;
  common.width = width;
  common.dtype = dtype;
  common.parameter_dtype = parameter;
  common.x = input(dtype, layout, batch, tokens, 1, width);
  common.weight = input(parameter, Layout::unaligned, 1, 1, 1, width).data;
  common.prefix = prefix;
  common.num_pooled = prefix ? 3 : 0;
  PooledGateForward forward = {};
  static_cast<PooledGate&>(forward) = common;
  if (prefix) forward.pooled_sum = input(wide, layout, batch, 1, 1, width);
  forward.pooled = result("pooled", pooled, dtype);
  forward.new_sum = result("new_sum", batch * width, wide);
  run("pooled_gate_forward", forward, device::pooled_gate_forward);
  for (int given = kFirstSubset; given < 4; ++given) {
    PooledGateBackward backward = {};
    static_cast<PooledGate&>(backward) = common;
    if (given & 1) {
      backward.dpooled = input(dtype, layout, batch, prefix ? tokens : 1, 1, width);
      if (!prefix) backward.dpooled.row_stride = 0;
    }
    if (given & 2) backward.dnew_sum = input(wide, layout, batch, 1, 1, width);
    if (given != 1) backward.dx = result("dx", batch * tokens * width, dtype);
    if (given != 2) backward.dweight = result("dweight", width, parameter);
    backward.dpooled_sum = result("dpooled_sum", batch * width, wide);
    run("pooled_gate_backward", backward, device::pooled_gate_backward);
  }
  buffers.clear();
}

#ifndef HARNESS_CUDA
void transpose(int64_t rows, int64_t columns, Dtype dtype, Layout layout) {
  const View matrix = input(dtype, layout, 1, rows, 1, columns);
  for (const bool needs_sums : {false, true}) {
    cpu::Transpose args = {rows, columns, dtype, matrix.data, matrix.row_stride, nullptr, nullptr};
    args.to = result("transposed", rows * columns, dtype);
    if (needs_sums) args.sums = result("sums", columns, dtype);
    run("transpose", args, cpu::transpose);
  }
  buffers.clear();
}

void elementwise(int64_t rows, int64_t columns, Dtype dtype) {
  const View term = input(dtype, Layout::unaligned, 1, rows, 1, columns);
  for (int64_t stride : {int64_t{0}, columns}) {
    const View total = input(dtype, Layout::dense, 1, rows, 1, columns);
    cpu::Add args = {rows, columns, dtype, total.data, term.data, stride};
    run("add", args, cpu::add);
  }
  const View activated = input(dtype, Layout::dense, 1, rows, 1, columns);
  cpu::ReluBackward args = {rows * columns, dtype, term.data, activated.data,
                            result("of relu", rows * columns, dtype)};
  run("relu_backward", args, cpu::relu_backward);
  buffers.clear();
}

void tanh(int64_t batch, int64_t rows, int64_t width, Dtype dtype, Layout layout) {
  cpu::Tanh args = {batch, rows, width, input(dtype, layout, batch, rows, 1, width), nullptr};
  args.result = result("tanh", batch * rows * width, dtype);
  run("tanh", args, cpu::tanh);
  buffers.clear();
}
#endif

}  // namespace

int main() {
#ifdef HARNESS_CUDA
  cuemu::device() = 1;
  std::vector<Dtype> dtypes = {Dtype::float32, Dtype::bfloat16, Dtype::float16};
  const std::vector<Attention> cases = {{1, 5, 7, 1, 9, true, 1, true, false, 0},
                                        {1, 18, 35, 2, 16, true, 20, false, true, 0},
                                        {2, 3, 4, 1, 8, false, 0, false, false, 0}};
#else
  std::vector<Dtype> dtypes = {Dtype::float32, Dtype::bfloat16, Dtype::float16, Dtype::float64};
  const std::vector<Attention> cases = {{2, 5, 7, 1, 9, true, 1, true, false, 0},
                                        {1, 101, 67, 2, 16, true, 20, false, true, 3},
                                        {2, 100, 33, 1, 35, false, 0, true, false, 0},
                                        {1, 2, 70, 3, 17, true, 69, true, true, 5},
                                        {1, 200, 1, 1, 1, true, 0, false, false, 0}};
#endif
  std::vector<Layout> layouts = {Layout::dense, Layout::unaligned, Layout::strided,
                                 Layout::broadcast};
#if defined(HARNESS_CUDA) && defined(__SANITIZE_THREAD__)
  // slow, and races depend neither on the layout nor on which 16-bit dtype it is
  dtypes.pop_back();
  layouts = {Layout::strided};
#endif
  size_t count = 0;
  for (const Dtype dtype : dtypes) {
    const Dtype stream = dtype == Dtype::float64 ? dtype : Dtype::float32;
    for (const Attention& c : cases) attention(c, dtype, layouts[count++ % layouts.size()]);
    if (!kAll && dtype != Dtype::float32) continue;
    for (const Layout layout : layouts) {
      for (const bool flag : {false, true}) {
        update(2, kTokens, 21, dtype, stream, {flag, ++count % 2 == 1, false, 1, false}, layout);
        update(1, 5, 21, dtype, stream, {flag, count % 2 == 1, flag, 2, count % 2 == 1}, layout);
        pool(2, 19, 21, dtype, stream, flag, layout);
      }
      norm(2, kTokens, 21, dtype, layout == Layout::dense ? dtype : stream, layout);
    }
#ifdef HARNESS_CUDA
    // few slots: in parts of the tokens
    attention({1, 513, 9, 1, 17, true, 5, true, true, 0}, dtype, Layout::strided);
    update(1, 19, 35, dtype, stream, {true, true, true, 11, false}, Layout::strided);
    norm(1, 18, 130, dtype, stream, Layout::strided);
    pool(1, 33, 130, dtype, dtype, true, Layout::strided);
#else
    update(1, 2, 1030, dtype, stream, {true, true, false, 1, false}, Layout::strided);
    update(1, 40, 520, dtype, stream, {true, true, true, 19, false}, Layout::strided);
    update(2, 40, 70, dtype, stream, {false, false, false, 40, true}, Layout::strided);
    // pieces for every thread
    if (dtype == Dtype::float32) {
      update(1, 65, 517, dtype, stream, {true, false, true, 65, true}, Layout::strided);
    }
    norm(1, 70, 1030, dtype, stream, Layout::strided);
    tanh(1, 7, 1030, dtype, Layout::strided);
    for (const Layout layout : layouts) {
      if (dtype == stream) transpose(37, 53, dtype, layout);
      if (dtype == stream && layout == Layout::dense) elementwise(7, 600, dtype);
      tanh(2, 3, 21, dtype, layout);
    }
    pool(3, 130, 517, dtype, dtype, true, Layout::strided);
#endif
  }
  std::puts("clean");
  return 0;
}
