// From tensors to csrc/arguments.h: what every device's operators share.
//
// Python has checked its inputs already; these functions are reachable without it
// (torch.ops.lm2_kernels_cpp), so they check again whatever keeps memory safe, allocate the results
// and hand plain pointers to the kernels. A failed check is a RuntimeError that names the op.
//
// A Device gives: name; owns(tensor), whether it can read it; kHasFloat64, kMaxHeadWidth and
// kHasTopK, what its kernels cover; workspace_bytes(args, like); and run(args, like), which
// launches on the device of the tensor `like`.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"

namespace lm2 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class... Text>
void check(bool holds, const char* op, const Text&... text) {
  if (holds) return;
  std::ostringstream message;
  message << op << ": ";
  (message << ... << text);
  throw std::runtime_error(message.str());
}

inline Dtype dtype_of(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::Double:
      return Dtype::float64;
    default:
      break;
  }
  check(false, op, name, " must be float32, bfloat16, float16 or float64");
  return Dtype::float32;
}

inline ScalarType scalar_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return ScalarType::Float;
    case Dtype::bfloat16:
      return ScalarType::BFloat16;
    case Dtype::float16:
      return ScalarType::Half;
    case Dtype::float64:
      return ScalarType::Double;
  }
  return ScalarType::Undefined;
}

// The dtype of statistics and sums.
inline Dtype accumulation(Dtype dtype) {
  return dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
}

// One dtype, or float32 and a 16-bit one.
inline bool go_together(Dtype a, Dtype b) {
  return a == b || ((a == Dtype::float32 || b == Dtype::float32) && a != Dtype::float64 &&
                    b != Dtype::float64);
}

// Whether a tensor's storage covers all its elements: it can have been resized under it.
inline bool storage_covers(const Tensor& tensor) {
  int64_t last = tensor.storage_offset(), bytes = 0;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    int64_t span;
    if (__builtin_mul_overflow(tensor.size(axis) - 1, tensor.stride(axis), &span)) return false;
    if (__builtin_add_overflow(last, span, &last)) return false;
  }
  if (__builtin_add_overflow(last, 1, &last)) return false;
  if (__builtin_mul_overflow(last, static_cast<int64_t>(tensor.element_size()), &bytes)) {
    return false;
  }
  int64_t held = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &held));
  return bytes <= held;
}

// The checks of one call: which op, on which device, and the copies that must outlive the launch.
template <class Device>
class Call {
 public:
  Call(const char* op, const Tensor& first) : op_(op), first_(first) {}

  template <class... Text>
  void check(bool holds, const Text&... text) const {
    lm2::check(holds, op_, text...);
  }

  Dtype dtype(const char* name, const Tensor& tensor) const {
    const Dtype dtype = dtype_of(op_, name, tensor);
    check(Device::kHasFloat64 || dtype != Dtype::float64, name, " is float64, which ",
          Device::kName, " kernels do not compute; use float32");
    return dtype;
  }

  // A tensor must be of exactly this shape and one of these dtypes, and readable to its last
  // element.
  void require(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes,
               std::initializer_list<ScalarType> dtypes) const {
    check(Device::owns(tensor) && tensor.get_device_index() == first_.get_device_index(), name,
          " must be on the same ", Device::kName, " device as the other tensors");
    bool right = tensor.dim() == static_cast<int64_t>(sizes.size());
    int64_t axis = 0;
    if (right) {
      for (int64_t size : sizes) right = right && tensor.size(axis++) == size;
    }
    if (!right) fail_shape(name, tensor, sizes);
    bool known = false;
    for (ScalarType dtype : dtypes) known = known || tensor.scalar_type() == dtype;
    check(known, name, " has a dtype that does not go with the others'");
    if (tensor.numel() == 0) return;
    check(tensor.data_ptr() != nullptr && storage_covers(tensor), name,
          " has no data (was its storage resized?)");
    check(reinterpret_cast<uintptr_t>(tensor.data_ptr()) % tensor.element_size() == 0, name,
          " is not aligned to its dtype");
  }

  // (B, L, D), (B, L, H, K) or (B, D) as a View.
  View view(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes,
            std::initializer_list<ScalarType> dtypes) {
    require(name, tensor, sizes, dtypes);
    const int64_t last = tensor.dim() - 1;
    const Tensor t = tensor.size(last) > 1 && tensor.stride(last) != 1 ? dense(tensor) : tensor;
    View view;
    view.data = t.numel() == 0 ? nullptr : t.data_ptr();
    view.dtype = dtype_of(op_, name, t);
    view.batch_stride = stride(t, 0);
    view.row_stride = t.dim() > 2 ? stride(t, 1) : 0;
    view.head_stride = t.dim() > 3 ? stride(t, 2) : 0;
    return view;
  }

  View view(const char* name, const OptionalTensor& tensor, std::initializer_list<int64_t> sizes,
            std::initializer_list<ScalarType> dtypes) {
    return tensor ? view(name, *tensor, sizes, dtypes) : View{};
  }

  // A tensor without strides to speak of, copied if it has any.
  const void* plain(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes,
                    ScalarType dtype) {
    require(name, tensor, sizes, {dtype});
    return dense(tensor).data_ptr();
  }

  // A result. Without `needed` it is the empty tensor that stands for none.
  Tensor result(std::vector<int64_t> sizes, Dtype dtype, bool needed = true) const {
    if (!needed) sizes = {0};
    return named([&] { return torch::stable::new_empty(first_, sizes, scalar_type(dtype)); });
  }

  template <class Args>
  void run(Args& args) {
    named([&] { run_unnamed(args); });
  }

 private:
  template <class Args>
  void run_unnamed(Args& args) {
    if constexpr (requires { args.workspace; }) {
      const int64_t bytes = Device::workspace_bytes(args, first_);
      args.workspace = nullptr;
      if (bytes > 0) {
        // float32, because its allocation is aligned for everything; 64 floats are the 256 bytes
        kept_.push_back(
            torch::stable::new_empty(first_, {(bytes + 3) / 4 + 64}, ScalarType::Float));
        const auto address = reinterpret_cast<uintptr_t>(kept_.back().data_ptr());
        args.workspace = reinterpret_cast<void*>((address + 255) / 256 * 256);
      }
    }
    Device::run(args, first_);
  }

  // The tensor, or a copy that is kept, with no gaps between its elements.
  const Tensor& dense(const Tensor& tensor) {
    kept_.push_back(named([&] { return torch::stable::contiguous(tensor); }));
    return kept_.back();
  }

  // What fails below here does not know the op.
  template <class F>
  auto named(const F& function) const -> decltype(function()) {
    try {
      return function();
    } catch (const std::bad_alloc&) {
      throw std::runtime_error(std::string(op_) + ": out of memory");
    } catch (const std::exception& error) {
      throw std::runtime_error(std::string(op_) + ": " + error.what());
    }
  }

  static int64_t stride(const Tensor& t, int64_t axis) {
    return t.size(axis) == 1 ? 0 : t.stride(axis);
  }

  void fail_shape(const char* name, const Tensor& tensor,
                  std::initializer_list<int64_t> sizes) const {
    std::ostringstream got, wanted;
    for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
      got << (axis ? ", " : "") << tensor.size(axis);
    }
    for (auto size = sizes.begin(); size != sizes.end(); ++size) {
      wanted << (size == sizes.begin() ? "" : ", ") << *size;
    }
    check(false, name, " must have shape (", wanted.str(), "), got (", got.str(), ")");
  }

  const char* op_;
  Tensor first_;
  std::vector<Tensor> kept_;
};

inline void* pointer(const Tensor& result, bool needed = true) {
  return needed ? result.data_ptr() : nullptr;
}

template <class Device>
struct Bindings {
  static void fill(Call<Device>& call, MemoryAttention& args, const Tensor& query,
                   const Tensor& key, const Tensor& value, const OptionalTensor& slot_mask,
                   const OptionalTensor& seed, bool causal, int64_t slot_offset, double scale,
                   std::optional<int64_t> top_k, double dropout_p) {
    call.check(query.dim() == 4, "query must be (B, T, H, K)");
    call.check(key.dim() == 4, "key must be (B, N, H, K)");
    args.batch = query.size(0);
    args.tokens = query.size(1);
    args.heads = query.size(2);
    args.width = query.size(3);
    args.slots = key.size(1);
    call.check(args.tokens > 0 && args.heads > 0 && args.width > 0 && args.slots > 0,
               "tokens, heads, head width and slots must be at least 1");
    call.check(args.slots <= std::numeric_limits<int32_t>::max() &&
                   args.tokens <= std::numeric_limits<int32_t>::max(),
               "tokens and slots must be below 2^31");
    call.check(args.width <= Device::kMaxHeadWidth, "head width is ", args.width, ", ",
               Device::kName, " kernels go to ", Device::kMaxHeadWidth);
    args.dtype = call.dtype("query", query);
    const ScalarType type = scalar_type(args.dtype);
    const auto bank = {args.batch, args.slots, args.heads, args.width};
    args.query =
        call.view("query", query, {args.batch, args.tokens, args.heads, args.width}, {type});
    args.key = call.view("key", key, bank, {type});
    args.value = call.view("value", value, bank, {type});
    args.slot_mask = nullptr;
    args.mask_batch_stride = args.mask_slot_stride = 0;
    if (slot_mask) {
      // any strides: the kernels take both
      call.require("slot_mask", *slot_mask, {args.batch, args.slots}, {ScalarType::Bool});
      args.slot_mask = static_cast<const uint8_t*>(slot_mask->data_ptr());
      args.mask_batch_stride = slot_mask->stride(0);
      args.mask_slot_stride = slot_mask->stride(1);
    }
    call.check(slot_offset >= 0, "slot_offset must be at least 0, got ", slot_offset);
    args.causal = causal;
    // further on every token sees every slot
    args.slot_offset = slot_offset < args.slots ? slot_offset : args.slots;
    args.scale = scale;
    call.check(!top_k || (*top_k >= 1 && *top_k <= args.slots), "top_k must be between 1 and ",
               args.slots);
    call.check(!top_k || Device::kHasTopK, "top_k is not in the ", Device::kName, " kernels");
    args.top_k = top_k.value_or(0);
    call.check(dropout_p >= 0.0 && dropout_p < 1.0, "dropout_p must be in [0, 1), got ", dropout_p);
    call.check(seed.has_value() || dropout_p == 0.0, "dropout needs a seed");
    args.seed = nullptr;
    if (seed) {
      call.require("seed", *seed, {}, {ScalarType::Long});
      args.seed = static_cast<const int64_t*>(seed->data_ptr());
    }
    const double most = std::numeric_limits<uint32_t>::max();
    args.drop_threshold =
        static_cast<uint32_t>(std::fmin(std::nearbyint(dropout_p * 0x1p32), most));
    args.keep_factor = 1.0 / (1.0 - dropout_p);
  }

  static std::tuple<Tensor, Tensor> memory_attention_forward(
      const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& slot_mask,
      const OptionalTensor& seed, bool causal, int64_t slot_offset, double scale,
      std::optional<int64_t> top_k, double dropout_p) {
    Call<Device> call("memory_attention", query);
    MemoryAttentionForward args;
    fill(call, args, query, key, value, slot_mask, seed, causal, slot_offset, scale, top_k,
         dropout_p);
    Tensor out = call.result({args.batch, args.tokens, args.heads, args.width}, args.dtype);
    Tensor statistics =
        call.result({args.batch, args.heads, 2, args.tokens}, accumulation(args.dtype));
    args.out = pointer(out);
    args.statistics = pointer(statistics);
    if (args.batch > 0) call.run(args);
    return {out, statistics};
  }

  // kApart, here and below: what comes side by side lies one part after the other.
  template <bool kApart>
  static std::tuple<Tensor, Tensor> memory_attention_backward(
      const Tensor& dout, const Tensor& query, const Tensor& key, const Tensor& value,
      const OptionalTensor& slot_mask, const OptionalTensor& seed, const Tensor& out,
      const Tensor& statistics, bool causal, int64_t slot_offset, double scale,
      std::optional<int64_t> top_k, double dropout_p, bool needs_dquery, bool needs_dkey_value) {
    Call<Device> call("memory_attention", query);
    MemoryAttentionBackward args;
    fill(call, args, query, key, value, slot_mask, seed, causal, slot_offset, scale, top_k,
         dropout_p);
    const ScalarType type = scalar_type(args.dtype);
    const auto read = {args.batch, args.tokens, args.heads, args.width};
    args.dout = call.view("dout", dout, read, {type});
    args.out = call.view("out", out, read, {type});
    args.statistics = call.plain("statistics", statistics, {args.batch, args.heads, 2, args.tokens},
                                 scalar_type(accumulation(args.dtype)));
    Tensor dquery = call.result(read, args.dtype, needs_dquery);
    std::vector<int64_t> packed = {args.batch, args.slots, args.heads, args.width};
    packed.insert(packed.begin() + (kApart ? 0 : 2), 2);
    Tensor dkey_value = call.result(packed, args.dtype, needs_dkey_value);
    args.apart = kApart;
    args.dquery = pointer(dquery, needs_dquery);
    args.dkey_value = pointer(dkey_value, needs_dkey_value);
    if (args.batch > 0 && (needs_dquery || needs_dkey_value)) call.run(args);
    return {dquery, dkey_value};
  }

  static void fill(Call<Device>& call, MemoryUpdate& args, const Tensor& candidate,
                   const Tensor& memory, const Tensor& input_gate, const Tensor& forget_gate,
                   const OptionalTensor& output_gate, const OptionalTensor& gate_bias,
                   const OptionalTensor& read, const std::string& output, int64_t tokens_per_slot) {
    call.check(candidate.dim() == 3, "candidate must be (B, T, D)");
    args.batch = candidate.size(0);
    args.tokens = candidate.size(1);
    args.width = candidate.size(2);
    call.check(args.tokens > 0 && args.width > 0, "tokens and width must be at least 1");
    call.check(tokens_per_slot >= 1, "tokens_per_slot must be at least 1, got ", tokens_per_slot);
    // of more than there are, one slot has them all
    args.tokens_per_slot = tokens_per_slot < args.tokens ? tokens_per_slot : args.tokens;
    args.slots = (args.tokens - 1) / args.tokens_per_slot + 1;
    args.dtype = call.dtype("candidate", candidate);
    const auto type = {scalar_type(args.dtype)};
    const auto rows = {args.batch, args.tokens, args.width};
    args.candidate = call.view("candidate", candidate, rows, type);
    args.memory = stream_view(call, args, "memory", memory, args.slots);
    args.input_gate = gate_view(call, args, "input_gate", input_gate, args.width);
    args.forget_gate = gate_view(call, args, "forget_gate", forget_gate, args.width);
    args.output_gate = gate_view(call, args, "output_gate", output_gate, args.width);
    args.gate_bias = gate_view(call, args, "gate_bias", gate_bias, 2 * args.width);
    args.read = call.view("read", read, rows, type);
    call.check(output == "read" || output == "memory", "output must be 'read' or 'memory', got '",
               output, "'");
    args.shows_memory = output == "memory";
    call.check(!read || (output_gate && !args.shows_memory),
               "read needs an output_gate and output='read'");
  }

  // hidden, memory and their gradients: the activations' dtype or float32.
  static View stream_view(Call<Device>& call, const MemoryUpdate& args, const char* name,
                          const OptionalTensor& tensor, int64_t rows) {
    const ScalarType type = scalar_type(args.dtype);
    const ScalarType wide = args.dtype == Dtype::float64 ? type : ScalarType::Float;
    return call.view(name, tensor, {args.batch, rows, args.width}, {type, wide});
  }

  static GateView gate_view(Call<Device>& call, const MemoryUpdate& args, const char* name,
                            const OptionalTensor& gate, int64_t columns) {
    if (!gate) return GateView{};
    const int64_t given = gate->dim() == 3 ? gate->size(1) : 0;
    const bool shared = given == 1 || given == args.slots;
    const int64_t rows = shared ? given : args.tokens;
    GateView view{call.view(name, gate, {args.batch, rows, columns}, {scalar_type(args.dtype)})};
    view.slot_stride = view.row_stride;
    if (rows == args.tokens) {
      view.slot_stride *= args.tokens_per_slot;
    } else {
      view.row_stride = 0;
    }
    return view;
  }

  static std::tuple<Tensor, Tensor> memory_update_forward(
      const Tensor& hidden, const Tensor& candidate, const Tensor& memory, const Tensor& input_gate,
      const Tensor& forget_gate, const OptionalTensor& output_gate, const OptionalTensor& gate_bias,
      const OptionalTensor& read, std::string output, int64_t tokens_per_slot) {
    Call<Device> call("memory_update", candidate);
    MemoryUpdateForward args;
    fill(call, args, candidate, memory, input_gate, forget_gate, output_gate, gate_bias, read,
         output, tokens_per_slot);
    args.hidden = stream_view(call, args, "hidden", hidden, args.tokens);
    Tensor result = call.result({args.batch, args.tokens, args.width}, args.hidden.dtype);
    Tensor new_memory = call.result({args.batch, args.slots, args.width}, args.memory.dtype);
    args.output = pointer(result);
    args.new_memory = pointer(new_memory);
    if (args.batch > 0) call.run(args);
    return {result, new_memory};
  }

  template <bool kApart>
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> memory_update_backward(
      const OptionalTensor& doutput, const OptionalTensor& dnew_memory, const Tensor& candidate,
      const Tensor& memory, const Tensor& input_gate, const Tensor& forget_gate,
      const OptionalTensor& output_gate, const OptionalTensor& gate_bias,
      const OptionalTensor& read, std::string output, int64_t tokens_per_slot,
      bool needs_dcandidate, bool needs_dmemory, bool needs_dgates, bool needs_dslot_gates,
      bool needs_dread) {
    Call<Device> call("memory_update", candidate);
    MemoryUpdateBackward args;
    fill(call, args, candidate, memory, input_gate, forget_gate, output_gate, gate_bias, read,
         output, tokens_per_slot);
    call.check(doutput || dnew_memory, "one of doutput and dnew_memory must be given");
    call.check(!needs_dread || read, "needs_dread needs a read");
    call.check(!needs_dslot_gates || args.tokens_per_slot > 1,
               "needs_dslot_gates needs slots of several tokens");
    args.doutput = stream_view(call, args, "doutput", doutput, args.tokens);
    args.dnew_memory = stream_view(call, args, "dnew_memory", dnew_memory, args.slots);
    const std::vector<int64_t> rows = {args.batch, args.tokens, args.width};
    Tensor dcandidate = call.result(rows, args.dtype, needs_dcandidate);
    Tensor dmemory =
        call.result({args.batch, args.slots, args.width}, args.memory.dtype, needs_dmemory);
    const int64_t gates = output_gate ? 3 : 2;
    std::vector<int64_t> packed = rows;
    packed.insert(packed.begin() + (kApart ? 0 : 2), gates);
    Tensor dgates = call.result(packed, args.dtype, needs_dgates);
    args.apart = kApart;
    Tensor dslot_gates = call.result({args.batch, args.slots, gates, args.width},
                                     accumulation(args.dtype), needs_dslot_gates);
    Tensor dread = call.result(rows, args.dtype, needs_dread);
    args.dcandidate = pointer(dcandidate, needs_dcandidate);
    args.dmemory = pointer(dmemory, needs_dmemory);
    args.dgates = pointer(dgates, needs_dgates);
    args.dslot_gates = pointer(dslot_gates, needs_dslot_gates);
    args.dread = pointer(dread, needs_dread);
    const bool needs_any =
        needs_dcandidate || needs_dmemory || needs_dgates || needs_dslot_gates || needs_dread;
    if (args.batch > 0 && needs_any) call.run(args);
    return {dcandidate, dmemory, dgates, dslot_gates, dread};
  }

  static void fill(Call<Device>& call, ResidualLayerNorm& args, const Tensor& x,
                   const Tensor& residual, const Tensor& weight) {
    call.check(x.dim() == 3, "x must be (B, T, D)");
    args.batch = x.size(0);
    args.tokens = x.size(1);
    args.width = x.size(2);
    call.check(args.tokens > 0 && args.width > 0, "tokens and width must be at least 1");
    args.dtype = call.dtype("x", x);
    const Dtype residual_dtype = call.dtype("residual", residual);
    args.parameter_dtype = call.dtype("weight", weight);
    call.check(go_together(args.dtype, residual_dtype), "residual's dtype does not go with x's");
    call.check(go_together(args.dtype, args.parameter_dtype),
               "weight's dtype does not go with x's");
    const auto rows = {args.batch, args.tokens, args.width};
    args.x = call.view("x", x, rows, {scalar_type(args.dtype)});
    args.residual = call.view("residual", residual, rows, {scalar_type(residual_dtype)});
    args.weight = call.plain("weight", weight, {args.width}, scalar_type(args.parameter_dtype));
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> norm_forward(const Tensor& x,
                                                                 const Tensor& residual,
                                                                 const Tensor& weight,
                                                                 const Tensor& bias, double eps,
                                                                 bool with_tanh, bool of_relu) {
    Call<Device> call("residual_layer_norm", x);
    ResidualLayerNormForward args;
    fill(call, args, x, residual, weight);
    args.of_relu = of_relu;
    args.bias = call.plain("bias", bias, {args.width}, scalar_type(args.parameter_dtype));
    args.eps = eps;
    Tensor out = call.result({args.batch, args.tokens, args.width}, args.dtype);
    Tensor mean = call.result({args.batch, args.tokens}, accumulation(args.dtype));
    Tensor rstd = call.result({args.batch, args.tokens}, accumulation(args.dtype));
    Tensor tanh =
        call.result({args.batch, args.tokens, args.width}, args.residual.dtype, with_tanh);
    args.out = pointer(out);
    args.mean = pointer(mean);
    args.rstd = pointer(rstd);
    args.tanh = pointer(tanh, with_tanh);
    if (args.batch > 0) call.run(args);
    return {out, mean, rstd, tanh};
  }

  static std::tuple<Tensor, Tensor, Tensor> residual_layer_norm_forward(const Tensor& x,
                                                                        const Tensor& residual,
                                                                        const Tensor& weight,
                                                                        const Tensor& bias,
                                                                        double eps) {
    auto [out, mean, rstd, _] = norm_forward(x, residual, weight, bias, eps, false, false);
    return {out, mean, rstd};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> residual_layer_norm_and_tanh_forward(
      const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias,
      double eps) {
    return norm_forward(x, residual, weight, bias, eps, true, false);
  }

  static std::tuple<Tensor, Tensor, Tensor> residual_layer_norm_of_relu_forward(
      const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias,
      double eps) {
    auto [out, mean, rstd, _] = norm_forward(x, residual, weight, bias, eps, false, true);
    return {out, mean, rstd};
  }

  // dx, dresidual, dweight and dbias.
  static std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward(
      const Tensor& dout, const Tensor& x, const Tensor& residual, const Tensor& weight,
      const Tensor& mean, const Tensor& rstd, const OptionalTensor& dtanh,
      const OptionalTensor& dresidual_otherwise, bool of_relu, bool needs_dx, bool needs_dresidual,
      bool needs_dparams) {
    Call<Device> call("residual_layer_norm", x);
    ResidualLayerNormBackward args;
    fill(call, args, x, residual, weight);
    args.of_relu = of_relu;
    const auto rows = {args.batch, args.tokens, args.width};
    const ScalarType type = scalar_type(args.dtype);
    const ScalarType statistics = scalar_type(accumulation(args.dtype));
    args.dout = call.view("dout", dout, rows, {type});
    args.mean = call.plain("mean", mean, {args.batch, args.tokens}, statistics);
    args.rstd = call.plain("rstd", rstd, {args.batch, args.tokens}, statistics);
    args.dtanh = call.view("dtanh", dtanh, rows, {type});
    args.dresidual_otherwise =
        call.view("dresidual", dresidual_otherwise, rows, {scalar_type(args.residual.dtype)});
    const bool agree = args.residual.dtype == args.dtype || needs_dresidual;
    args.dx_dtype = agree ? args.dtype : Dtype::float32;
    Tensor dx = call.result(rows, args.dx_dtype, needs_dx);
    Tensor dresidual = call.result(rows, args.residual.dtype, needs_dresidual);
    Tensor dweight = call.result({args.width}, args.parameter_dtype, needs_dparams);
    Tensor dbias = call.result({args.width}, args.parameter_dtype, needs_dparams);
    args.dx = pointer(dx, needs_dx);
    args.dresidual = pointer(dresidual, needs_dresidual);
    args.dweight = pointer(dweight, needs_dparams);
    args.dbias = pointer(dbias, needs_dparams);
    if (args.batch == 0) {
      if (needs_dparams) zero({dweight, dbias});
    } else if (needs_dx || needs_dparams) {
      call.run(args);
    }
    return {dx, dresidual, dweight, dbias};
  }

  static std::tuple<Tensor, Tensor, Tensor> residual_layer_norm_backward(
      const Tensor& dout, const Tensor& x, const Tensor& residual, const Tensor& weight,
      const Tensor& mean, const Tensor& rstd, bool needs_dx, bool needs_dparams) {
    auto [dx, _, dweight, dbias] =
        norm_backward(dout, x, residual, weight, mean, rstd, std::nullopt, std::nullopt, false,
                      needs_dx, false, needs_dparams);
    return {dx, dweight, dbias};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> residual_layer_norm_and_tanh_backward(
      const Tensor& dout, const Tensor& x, const Tensor& residual, const Tensor& weight,
      const Tensor& mean, const Tensor& rstd, const Tensor& dtanh, const Tensor& dresidual,
      bool needs_dparams) {
    return norm_backward(dout, x, residual, weight, mean, rstd, dtanh, dresidual, false, true, true,
                         needs_dparams);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> residual_layer_norm_of_relu_backward(
      const Tensor& dout, const Tensor& x, const Tensor& residual, const Tensor& weight,
      const Tensor& mean, const Tensor& rstd, bool needs_dparams) {
    return norm_backward(dout, x, residual, weight, mean, rstd, std::nullopt, std::nullopt, true,
                         true, true, needs_dparams);
  }

  static void zero(std::initializer_list<Tensor> tensors) {
    for (Tensor tensor : tensors) torch::stable::zero_(tensor);
  }

  static void fill(Call<Device>& call, PooledGate& args, const Tensor& x, const Tensor& weight,
                   bool prefix, int64_t num_pooled) {
    call.check(x.dim() == 3, "x must be (B, T, D)");
    args.batch = x.size(0);
    args.tokens = x.size(1);
    args.width = x.size(2);
    call.check(args.tokens > 0 && args.width > 0, "tokens and width must be at least 1");
    call.check(num_pooled >= 0 && num_pooled <= std::numeric_limits<int64_t>::max() - args.tokens,
               "num_pooled must be at least 0, and num_pooled + tokens below 2^63, got ",
               num_pooled);
    args.dtype = call.dtype("x", x);
    args.parameter_dtype = call.dtype("weight", weight);
    call.check(go_together(args.dtype, args.parameter_dtype),
               "weight's dtype does not go with x's");
    args.x = call.view("x", x, {args.batch, args.tokens, args.width}, {scalar_type(args.dtype)});
    args.weight = call.plain("weight", weight, {args.width}, scalar_type(args.parameter_dtype));
    args.prefix = prefix;
    args.num_pooled = num_pooled;
  }

  static std::tuple<Tensor, Tensor> pooled_gate_forward(const Tensor& x, const Tensor& weight,
                                                        const OptionalTensor& pooled_sum,
                                                        bool prefix, int64_t num_pooled) {
    Call<Device> call("pooled_gate", x);
    PooledGateForward args;
    fill(call, args, x, weight, prefix, num_pooled);
    const Dtype sums = accumulation(args.dtype);
    call.check(!pooled_sum || prefix, "pooled_sum needs prefix");
    args.pooled_sum =
        call.view("pooled_sum", pooled_sum, {args.batch, args.width}, {scalar_type(sums)});
    Tensor pooled = call.result({args.batch, prefix ? args.tokens : 1, args.width}, args.dtype);
    Tensor new_sum = call.result({args.batch, args.width}, sums);
    args.pooled = pointer(pooled);
    args.new_sum = pointer(new_sum);
    if (args.batch > 0) call.run(args);
    return {pooled, new_sum};
  }

  static std::tuple<Tensor, Tensor, Tensor> pooled_gate_backward(
      const OptionalTensor& dpooled, const OptionalTensor& dnew_sum, const Tensor& x,
      const Tensor& weight, bool prefix, int64_t num_pooled, bool needs_dx, bool needs_dweight,
      bool needs_dpooled_sum) {
    Call<Device> call("pooled_gate", x);
    PooledGateBackward args;
    fill(call, args, x, weight, prefix, num_pooled);
    call.check(dpooled || dnew_sum, "one of dpooled and dnew_sum must be given");
    const Dtype sums = accumulation(args.dtype);
    args.dpooled = call.view("dpooled", dpooled, {args.batch, prefix ? args.tokens : 1, args.width},
                             {scalar_type(args.dtype)});
    args.dnew_sum = call.view("dnew_sum", dnew_sum, {args.batch, args.width}, {scalar_type(sums)});
    Tensor dx = call.result({args.batch, args.tokens, args.width}, args.dtype, needs_dx);
    Tensor dweight = call.result({args.width}, args.parameter_dtype, needs_dweight);
    Tensor dpooled_sum = call.result({args.batch, args.width}, sums, needs_dpooled_sum);
    args.dx = pointer(dx, needs_dx);
    args.dweight = pointer(dweight, needs_dweight);
    args.dpooled_sum = pointer(dpooled_sum, needs_dpooled_sum);
    if (args.batch == 0) {
      if (needs_dweight) zero({dweight});
    } else if (needs_dx || needs_dweight || needs_dpooled_sum) {
      call.run(args);
    }
    return {dx, dweight, dpooled_sum};
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("memory_attention_forward", TORCH_BOX(&Bindings::memory_attention_forward));
    m.impl("memory_attention_backward", TORCH_BOX(&Bindings::memory_attention_backward<false>));
    m.impl("memory_update_forward", TORCH_BOX(&Bindings::memory_update_forward));
    m.impl("memory_update_backward", TORCH_BOX(&Bindings::memory_update_backward<false>));
    m.impl("residual_layer_norm_forward", TORCH_BOX(&Bindings::residual_layer_norm_forward));
    m.impl("residual_layer_norm_backward", TORCH_BOX(&Bindings::residual_layer_norm_backward));
    m.impl("residual_layer_norm_and_tanh_forward",
           TORCH_BOX(&Bindings::residual_layer_norm_and_tanh_forward));
    m.impl("residual_layer_norm_and_tanh_backward",
           TORCH_BOX(&Bindings::residual_layer_norm_and_tanh_backward));
    m.impl("residual_layer_norm_of_relu_forward",
           TORCH_BOX(&Bindings::residual_layer_norm_of_relu_forward));
    m.impl("residual_layer_norm_of_relu_backward",
           TORCH_BOX(&Bindings::residual_layer_norm_of_relu_backward));
    m.impl("pooled_gate_forward", TORCH_BOX(&Bindings::pooled_gate_forward));
    m.impl("pooled_gate_backward", TORCH_BOX(&Bindings::pooled_gate_backward));
  }
};

}  // namespace lm2
