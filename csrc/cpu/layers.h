// A memory layer in one call, for layers that Python's part of a call would hold up: what
// lm2_kernels/layers/paper_function.py and release_function.py compute, of CPU tensors of one
// dtype, float32 or float64, at one token per slot, with every gradient wanted. The chain is
// theirs; every kernel is called by the functions that its operator calls, every product by its
// name.
//
// Included by bindings.cpp.
#pragma once

#include <array>
#include <utility>

namespace lm2 {
namespace {

using Ops = Bindings<Cpu>;
namespace stable_detail = torch::stable::detail;

// Which products go to oneDNN: by rows of tokens, of slots or of what is pooled, for a Linear of
// width D or 2 D. cpu_products.py has measured it.
enum ForwardWay : int64_t { kTokens = 1 << 0, kSlots = 1 << 1, kWide = 1 << 2, kPooled = 1 << 3 };
enum BackwardWay : int64_t {
  // gradients of what is multiplied, and of weights
  kOfTokens = 1 << 0,
  kOfSlots = 1 << 1,
  kTokensWeight = 1 << 2,
  kSlotsWeight = 1 << 3,
  // of the Linears of width 2 D
  kOfWide = 1 << 4,
  kOfPooled = 1 << 5,
  kWideWeight = 1 << 6,
  kPooledWeight = 1 << 7,
};

constexpr const char* kLayer = "layer";

// A PyTorch operator by its name.
template <class... Args>
Tensor aten_overload(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{stable_detail::from(args)...};
  if (torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION) != 0) {
    check(false, kLayer, name, " failed; PyTorch has written why to stderr");
  }
  return stable_detail::to<Tensor>(stack[0]);
}
template <class... Args>
Tensor aten(const char* name, const Args&... args) {
  return aten_overload(name, "", args...);
}

// What is reinterpreted below, or given to a kernel as a pointer.
const Tensor& dense(const Tensor& tensor) {
  check(tensor.is_cpu() && tensor.is_contiguous() && tensor.numel() > 0 && tensor.dim() > 0 &&
            storage_covers(tensor),
        kLayer, "a tensor is not on the CPU, is empty, has gaps, or has no data");
  return tensor;
}

// What the kernels of this file know.
Dtype float_of(const Tensor& tensor) {
  const Dtype dtype = dtype_of(kLayer, "a tensor", tensor);
  check(dtype == accumulation(dtype), kLayer, "tensors must be float32 or float64");
  return dtype;
}

const Tensor& given(const OptionalTensor& tensor) {
  check(tensor.has_value(), kLayer, "a tensor is missing");
  return *tensor;
}

// The weights of Linears, of `wide` ones (2 D, D).
void check_weights(const std::vector<OptionalTensor>& weights, int64_t dim,
                   std::initializer_list<size_t> wide = {}) {
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!weights[i]) continue;
    int64_t rows = dim;
    for (size_t place : wide) rows = i == place ? 2 * dim : rows;
    const Tensor& weight = dense(*weights[i]);
    check(weight.dim() == 2 && weight.size(0) == rows && weight.size(1) == dim, kLayer,
          "a weight must be (", rows, ", ", dim, ")");
  }
}

// A view from element `first` on, of those that `tensor` has.
Tensor strided(const Tensor& tensor, std::initializer_list<int64_t> sizes,
               std::initializer_list<int64_t> strides, int64_t first = 0) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(tensor.get(), static_cast<int64_t>(sizes.size()),
                                     sizes.begin(), strides.begin(), first, &handle));
  return Tensor(handle);
}

int64_t last_size(const Tensor& tensor) { return tensor.size(tensor.dim() - 1); }

// Of dense tensors.
Tensor matrix(const Tensor& tensor) {
  const int64_t columns = last_size(dense(tensor));
  return strided(tensor, {tensor.numel() / columns, columns}, {columns, 1});
}
Tensor rows_of(const Tensor& tensor, int64_t batch) {
  const int64_t columns = last_size(dense(tensor));
  check(batch > 0 && tensor.numel() % (columns * batch) == 0, kLayer, "a batch must divide rows");
  const int64_t rows = tensor.numel() / columns / batch;
  return strided(tensor, {batch, rows, columns}, {rows * columns, columns, 1});
}
Tensor by_heads(const Tensor& rows, int64_t heads) {
  check(dense(rows).dim() == 3 && heads > 0 && rows.size(2) % heads == 0, kLayer,
        "rows must be (B, L, D), and D a multiple of the heads");
  const int64_t length = rows.size(1), dim = rows.size(2), width = dim / heads;
  return strided(rows, {rows.size(0), length, heads, width}, {length * dim, dim, width, 1});
}
// (B, L, D) of the heads of (B, L, H, K).
Tensor merged(const Tensor& heads) {
  check(dense(heads).dim() == 4, kLayer, "heads must be (B, L, H, K)");
  const int64_t length = heads.size(1), dim = heads.size(2) * heads.size(3);
  return strided(heads, {heads.size(0), length, dim}, {length * dim, dim, 1});
}
// `count` columns of a dense (rows, columns) or (batch, rows, columns).
Tensor columns_of(const Tensor& tensor, int64_t first, int64_t count) {
  const int64_t last = tensor.dim() - 1, all = last_size(dense(tensor));
  check((last == 1 || last == 2) && first + count <= all, kLayer, "there are no such columns");
  if (last == 1) return strided(tensor, {tensor.size(0), count}, {all, 1}, first);
  return strided(tensor, {tensor.size(0), tensor.size(1), count}, {tensor.size(1) * all, all, 1},
                 first);
}
Tensor transposed(const Tensor& matrix) {
  check(matrix.dim() == 2, kLayer, "a weight must be a matrix");
  return strided(matrix, {matrix.size(1), matrix.size(0)}, {matrix.stride(1), matrix.stride(0)});
}

// total += term; a term of one row is added to every one.
void add_to(const Tensor& total, const Tensor& term) {
  const int64_t columns = last_size(dense(term)), rows = dense(total).numel() / columns;
  const bool is_row = term.numel() == columns;
  check(total.scalar_type() == term.scalar_type() && last_size(total) == columns &&
            (is_row || term.numel() == total.numel()),
        kLayer, "terms of a sum must agree");
  cpu::add(
      {rows, columns, float_of(total), total.data_ptr(), term.data_ptr(), is_row ? 0 : columns});
}

// x @ weight^T by oneDNN, rows of x by rows of weight.
Tensor onednn(const Tensor& x, const Tensor& weight, const OptionalTensor& bias = std::nullopt) {
  // it reads a bias as if it had no strides, and asks nobody how long a storage is
  check(storage_covers(weight) &&
            (!bias || (bias->is_contiguous() && bias->dim() == 1 && storage_covers(*bias))),
        kLayer, "a weight or bias has no data, or a bias has gaps");
  return aten("mkldnn::_linear_pointwise", x, weight, bias, std::string("none"),
              std::vector<double>{}, std::optional<std::string>(""));
}

// A Linear of contiguous (B, L, D).
Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool by_onednn) {
  dense(x);
  if (!by_onednn) return aten("aten::linear", x, weight, bias);
  return rows_of(onednn(matrix(x), weight, bias), x.size(0));
}

// dy @ weight, of matrices.
Tensor times(const Tensor& dy, const Tensor& weight, bool by_onednn) {
  return by_onednn ? onednn(dy, transposed(weight)) : aten("aten::mm", dy, weight);
}

Tensor sum_of_rows(const Tensor& matrix) {
  const int64_t axis = 0;
  return torch::stable::sum(matrix, torch::headeronly::IntHeaderOnlyArrayRef(&axis, 1));
}

// The transposed copies that products take, one after the other in the same memory: what was just
// written to is in a cache yet.
class Copies {
 public:
  // Of a matrix with contiguous rows, and the sums of its rows if they are needed.
  std::tuple<Tensor, OptionalTensor> transpose(const Tensor& matrix, bool needs_sums) {
    const int64_t rows = matrix.size(0), columns = matrix.size(1), size = rows * columns;
    check(matrix.dim() == 2 && size > 0 && matrix.stride(1) == 1 && storage_covers(matrix), kLayer,
          "what is transposed must be a matrix with contiguous rows");
    if (!memory_ || memory_->numel() < size) {
      memory_ = std::nullopt;
      memory_ = torch::stable::new_empty(matrix, {size});
    }
    OptionalTensor sums;
    if (needs_sums) sums = torch::stable::new_empty(matrix, {columns});
    cpu::transpose({rows, columns, float_of(matrix), matrix.data_ptr(), matrix.stride(0),
                    memory_->data_ptr(), needs_sums ? sums->data_ptr() : nullptr});
    return {strided(*memory_, {columns, rows}, {rows, 1}), sums};
  }

 private:
  OptionalTensor memory_;
};

// Gradients of weight and bias, which are put behind `results` in this order.
void gradients_of_linear(std::vector<Tensor>& results, Copies& copies, const Tensor& dy,
                         const Tensor& x, bool has_bias, bool by_onednn) {
  if (!by_onednn) {
    results.push_back(aten("aten::mm", transposed(dy), x));
    if (has_bias) results.push_back(sum_of_rows(dy));
    return;
  }
  const auto [columns, sums] = copies.transpose(dy, has_bias);
  results.push_back(onednn(columns, transposed(x)));
  if (has_bias) results.push_back(*sums);
}

// Multiplications up to which oneDNN adds to a sum no slower than what comes after it.
constexpr int64_t kMostSummedByProduct = int64_t{1} << 29;

// A sum of gradients, of which the first term is not written to unless it is ours.
class Sum {
 public:
  Sum() = default;
  explicit Sum(const OptionalTensor& term) : total_(term) {}

  void add(const Tensor& own) {
    if (total_) add_to(own, *total_);
    total_ = own;
  }
  void add_product(const Tensor& dy, const Tensor& weight, bool by_onednn) {
    const int64_t multiplications = dy.numel() * last_size(weight);
    if (!total_ || !by_onednn || multiplications > kMostSummedByProduct) {
      add(times(dy, weight, by_onednn));
      return;
    }
    total_ = aten_overload("mkldnn::_linear_pointwise", "binary", dy, *total_, transposed(weight),
                           OptionalTensor(), std::string("add"));
  }
  Tensor take() { return *std::exchange(total_, std::nullopt); }

 private:
  OptionalTensor total_;
};

struct Attending {
  int64_t heads;
  bool causal;
  int64_t slot_offset;
  double scale;
  std::optional<int64_t> top_k;
  double dropout_p;
};

// What backward is given of an attention.
struct Attended {
  Tensor bank, query, key, value, out, statistics;
  OptionalTensor slot_mask, seed;
};

Attended attend(const Tensor& x, const Tensor& bank, const OptionalTensor& slot_mask,
                const OptionalTensor& seed, const std::vector<OptionalTensor>& p, int64_t ways,
                const Attending& how) {
  const Tensor query = by_heads(linear(x, given(p[0]), p[1], ways & kTokens), how.heads);
  const Tensor key = by_heads(linear(bank, given(p[2]), p[3], ways & kSlots), how.heads);
  const Tensor value = by_heads(linear(bank, given(p[4]), p[5], ways & kSlots), how.heads);
  auto [out, statistics] =
      Ops::memory_attention_forward(query, key, value, slot_mask, seed, how.causal, how.slot_offset,
                                    how.scale, how.top_k, how.dropout_p);
  return {bank, query, key, value, out, statistics, slot_mask, seed};
}

// Part `index` of (parts, ...), a matrix.
Tensor part_of(const Tensor& parts, int64_t index, int64_t columns) {
  const int64_t size = dense(parts).numel() / parts.size(0);
  check(index < parts.size(0) && columns > 0 && size % columns == 0, kLayer,
        "there is no such part");
  return strided(parts, {size / columns, columns}, {columns, 1}, index * size);
}

// Puts the gradients of the three Linears behind `of_readers`. Gives those of query (B T, D), and
// of key and value (2, B, N, H, K).
std::tuple<Tensor, Tensor> attend_backward(std::vector<Tensor>& of_readers, Copies& copies,
                                           const Tensor& dread, const Tensor& x,
                                           const Attended& kept, const std::vector<bool>& has_bias,
                                           int64_t ways, const Attending& how) {
  const auto [dquery, dkey_value] = Ops::memory_attention_backward<true>(
      by_heads(rows_of(dread, kept.query.size(0)), how.heads), kept.query, kept.key, kept.value,
      kept.slot_mask, kept.seed, kept.out, kept.statistics, how.causal, how.slot_offset, how.scale,
      how.top_k, how.dropout_p, true, true);
  const Tensor of_query = matrix(merged(dquery)), bank = matrix(kept.bank);
  gradients_of_linear(of_readers, copies, of_query, x, has_bias[0], ways & kTokensWeight);
  for (int64_t part = 0; part < 2; ++part) {
    gradients_of_linear(of_readers, copies, part_of(dkey_value, part, last_size(bank)), bank,
                        has_bias[1 + part], ways & kSlotsWeight);
  }
  return {of_query, dkey_value};
}

// Puts the gradient of a memory behind `results`, of which all is read and rewritten; else that of
// the rows that are rewritten, and that of what is read.
void put_memory(std::vector<Tensor>& results, const Tensor& drows, const Tensor& dkey_value,
                bool is_whole, const std::vector<OptionalTensor>& weights, int64_t ways) {
  if (!is_whole) results.push_back(drows);
  Sum total(is_whole ? OptionalTensor(matrix(drows)) : std::nullopt);
  for (int64_t part = 0; part < 2; ++part) {
    const Tensor& weight = given(weights[1 + part]);
    total.add_product(part_of(dkey_value, part, weight.size(0)), weight, ways & kOfSlots);
  }
  results.push_back(rows_of(total.take(), dkey_value.size(1)));
}

// --- the paper's layer ---------------------------------------------------------------------------

// Parameters in the order of paper_function.PROJECTIONS, weight and bias. Gives output and new
// rows, and if anything is kept what was read, the candidate if there is one, the gates of input,
// forget and output, query, key, value, what was read by heads, and the statistics.
std::vector<Tensor> paper_layer_forward(const Tensor& x, const Tensor& rows, const Tensor& bank,
                                        const OptionalTensor& slot_mask, const OptionalTensor& seed,
                                        const std::vector<OptionalTensor>& p, int64_t ways,
                                        int64_t heads, bool causal, int64_t slot_offset,
                                        double scale, std::optional<int64_t> top_k,
                                        double dropout_p, const std::string& output, bool keeps) {
  check(p.size() == 14 && dense(x).dim() == 3, kLayer, "there must be 14 parameters, x (B, T, D)");
  float_of(x);
  const Attending how = {heads, causal, slot_offset, scale, top_k, dropout_p};
  Attended read = attend(x, bank, slot_mask, seed, p, ways, how);
  const Tensor out = merged(read.out);
  if (!keeps) read = {};
  OptionalTensor candidate;
  if (p[12]) {
    candidate = linear(x, given(p[12]), p[13], ways & kTokens);
    add_to(*candidate, out);
  }
  const Tensor input_gate = linear(x, given(p[8]), p[9], ways & kTokens);
  const Tensor forget_gate = linear(out, given(p[10]), p[11], ways & kTokens);
  const Tensor output_gate = linear(out, given(p[6]), p[7], ways & kTokens);
  const OptionalTensor shown = candidate && output == "read" ? OptionalTensor(out) : std::nullopt;
  auto [result, new_rows] =
      Ops::memory_update_forward(x, candidate ? *candidate : out, rows, input_gate, forget_gate,
                                 output_gate, std::nullopt, shown, output, 1);
  std::vector<Tensor> results = {result, new_rows};
  if (!keeps) return results;
  results.push_back(out);
  if (candidate) results.push_back(*candidate);
  for (const Tensor& each : {input_gate, forget_gate, output_gate, read.query, read.key, read.value,
                             read.out, read.statistics}) {
    results.push_back(each);
  }
  return results;
}

// Takes the weights in the same order, and which of the Linears have a bias. Gives the gradients of
// x, what put_memory says, and the gradients of the parameters:
// weight and bias of query, key, value, candidate, input, forget and output gate, but for what
// there is not.
std::vector<Tensor> paper_layer_backward(
    const Tensor& doutput, const Tensor& dnew_rows, const Tensor& x, const Tensor& rows,
    const Tensor& out, const OptionalTensor& candidate, const Tensor& input_gate,
    const Tensor& forget_gate, const Tensor& output_gate, const Tensor& bank, const Tensor& query,
    const Tensor& key, const Tensor& value, const Tensor& by_head, const Tensor& statistics,
    const OptionalTensor& slot_mask, const OptionalTensor& seed,
    const std::vector<OptionalTensor>& weights, const std::vector<bool>& has_bias, int64_t ways,
    int64_t heads, bool causal, int64_t slot_offset, double scale, std::optional<int64_t> top_k,
    double dropout_p, const std::string& output, bool needs_drows, bool is_whole) {
  check(weights.size() == 7 && has_bias.size() == 7 && dense(x).dim() == 3, kLayer,
        "there must be 7 Linears, x (B, T, D)");
  float_of(x);
  check_weights(weights, last_size(x));
  const Attending how = {heads, causal, slot_offset, scale, top_k, dropout_p};
  const Attended kept = {bank, query, key, value, by_head, statistics, slot_mask, seed};
  const bool shows_read = candidate && output == "read";
  const OptionalTensor shown = shows_read ? OptionalTensor(out) : std::nullopt;
  auto [dcandidate, drows, dgates, _, dshown] = Ops::memory_update_backward<true>(
      doutput, dnew_rows, candidate ? *candidate : out, rows, input_gate, forget_gate, output_gate,
      std::nullopt, shown, output, 1, true, needs_drows, true, false, shows_read);
  const Tensor x_rows = matrix(x), out_rows = matrix(out);
  const int64_t dim = last_size(x);
  const bool square = ways & kOfTokens, of_weight = ways & kTokensWeight;
  std::vector<Tensor> of_candidate, of_gates, of_readers;
  Copies copies;
  Sum dx(matrix(doutput)), dread;
  if (candidate) {
    gradients_of_linear(of_candidate, copies, matrix(dcandidate), x_rows, has_bias[6], of_weight);
    dx.add_product(matrix(dcandidate), given(weights[6]), square);
  }
  dread.add(matrix(std::exchange(dcandidate, Tensor())));
  if (shows_read) dread.add(matrix(std::exchange(dshown, Tensor())));
  {
    // of the input, the forget and the output gate, whose Linear comes before both
    const Tensor parts[] = {part_of(dgates, 0, dim), part_of(dgates, 1, dim),
                            part_of(dgates, 2, dim)};
    dgates = Tensor();
    gradients_of_linear(of_gates, copies, parts[0], x_rows, has_bias[4], of_weight);
    gradients_of_linear(of_gates, copies, parts[1], out_rows, has_bias[5], of_weight);
    gradients_of_linear(of_gates, copies, parts[2], out_rows, has_bias[3], of_weight);
    dx.add_product(parts[0], given(weights[4]), square);
    dread.add_product(parts[1], given(weights[5]), square);
    dread.add_product(parts[2], given(weights[3]), square);
  }
  const auto [dquery, dkey_value] =
      attend_backward(of_readers, copies, dread.take(), x_rows, kept, has_bias, ways, how);
  dx.add_product(dquery, given(weights[0]), square);
  std::vector<Tensor> results = {dx.take()};
  if (needs_drows) put_memory(results, drows, dkey_value, is_whole, weights, ways);
  for (const auto* more : {&of_readers, &of_candidate, &of_gates}) {
    results.insert(results.end(), more->begin(), more->end());
  }
  return results;
}

// --- the release layer ---------------------------------------------------------------------------

// Places of release_function.ReleaseParameters.
enum Parameter {
  kMlp = 6,
  kPooledLinear = 8,
  kRowsLinear = 10,
  kCandidate = 12,
  kFirstNorm = 14,
  kSecondNorm = 16,
  kPool = 18,
  kInputBias,
  kForgetBias
};
constexpr int64_t kMostApplications = 1 << 16;

// gates += [input_bias | forget_bias], both of one element.
template <class Scalar>
void add_biases(const Tensor& gates, const Tensor& input_bias, const Tensor& forget_bias) {
  for (const Tensor& bias : {input_bias, forget_bias}) {
    check(bias.is_cpu() && bias.numel() == 1 && bias.scalar_type() == gates.scalar_type() &&
              storage_covers(bias),
          kLayer, "the gates' biases must be one number each");
  }
  const int64_t width = last_size(gates);
  const Tensor both = torch::stable::new_empty(gates, {width});
  Scalar* const place = static_cast<Scalar*>(both.data_ptr());
  for (int64_t i = 0; i < width; ++i) {
    place[i] = *static_cast<const Scalar*>((2 * i < width ? input_bias : forget_bias).data_ptr());
  }
  add_to(gates, both);
}

// Gives output, new rows and new sum, and if anything is kept what was pooled, the rows' tanh, the
// gates, their bias, what was read, what was attended, the MLP's result before its last ReLU, the
// candidate, mean and rstd of both norms, query, key, value, what was read by heads, the
// statistics, and the MLP's other results.
std::vector<Tensor> release_layer_forward(
    const Tensor& x, const Tensor& rows, const Tensor& bank, const OptionalTensor& slot_mask,
    const OptionalTensor& seed, const OptionalTensor& pooled_sum,
    const std::vector<OptionalTensor>& p, int64_t ways, int64_t heads, bool causal,
    int64_t slot_offset, double scale, std::optional<int64_t> top_k, double dropout_p, bool prefix,
    int64_t num_pooled, int64_t applications, double first_eps, double second_eps, bool keeps) {
  check(p.size() == kForgetBias + 1 && applications > 0 && applications < kMostApplications, kLayer,
        "there must be 21 parameters, and an MLP");
  check(dense(x).dim() == 3, kLayer, "x must be (B, T, D)");
  float_of(x);
  const Attending how = {heads, causal, slot_offset, scale, top_k, dropout_p};
  const int64_t dim = x.size(2);
  auto [pooled, new_sum] =
      Ops::pooled_gate_forward(x, given(p[kPool]), pooled_sum, prefix, num_pooled);
  const Tensor gate_bias =
      linear(pooled, given(p[kPooledLinear]), p[kPooledLinear + 1], ways & kPooled);
  const bool is_float64 = x.scalar_type() == ScalarType::Double;
  (is_float64 ? add_biases<double> : add_biases<float>)(gate_bias, given(p[kInputBias]),
                                                        given(p[kForgetBias]));
  if (!keeps) pooled = Tensor();
  Attended read = attend(x, bank, slot_mask, seed, p, ways, how);
  Tensor out = merged(read.out);
  if (!keeps) read = {};
  auto [attended, first_mean, first_rstd, rows_tanh] = Ops::residual_layer_norm_and_tanh_forward(
      out, rows, given(p[kFirstNorm]), given(p[kFirstNorm + 1]), first_eps);
  if (!keeps) out = Tensor();
  std::vector<Tensor> mixed = {attended};
  for (int64_t left = applications - 1; left >= 0; --left) {
    mixed.push_back(linear(mixed.back(), given(p[kMlp]), p[kMlp + 1], ways & kTokens));
    if (left > 0) aten("aten::relu_", mixed.back());
    if (!keeps) mixed.erase(mixed.begin());
  }
  auto [candidate, second_mean, second_rstd] = Ops::residual_layer_norm_of_relu_forward(
      mixed.back(), attended, given(p[kSecondNorm]), given(p[kSecondNorm + 1]), second_eps);
  if (!keeps) {
    attended = Tensor();
    mixed.clear();
  }
  if (p[kCandidate]) {
    const Tensor of_token = linear(x, given(p[kCandidate]), p[kCandidate + 1], ways & kTokens);
    add_to(of_token, candidate);
    candidate = of_token;
  }
  const Tensor gates = linear(rows_tanh, given(p[kRowsLinear]), p[kRowsLinear + 1], ways & kWide);
  auto [output, new_rows] = Ops::memory_update_forward(
      x, candidate, rows, columns_of(gates, 0, dim), columns_of(gates, dim, dim), std::nullopt,
      gate_bias, std::nullopt, "read", 1);
  std::vector<Tensor> results = {output, new_rows, new_sum};
  if (!keeps) return results;
  for (const Tensor& each : {pooled, rows_tanh, gates, gate_bias, out, attended, mixed.back(),
                             candidate, first_mean, first_rstd, second_mean, second_rstd,
                             read.query, read.key, read.value, read.out, read.statistics}) {
    results.push_back(each);
  }
  results.insert(results.end(), mixed.begin() + 1, mixed.end() - 1);
  return results;
}

// What the gates' gradients come to.
struct GateGradients {
  std::vector<Tensor> of_rows, of_pooled;  // of the weights and biases
  Tensor dbiases;                          // (2 D), of either bias
  Tensor dtanh;                            // (B, T, D), if the memory needs one
  Tensor dpooled;                          // (B, 1 or T, D)
};

// dgates: (B, T, 2, D).
GateGradients gates_backward(Copies& copies, const Tensor& dgates, const Tensor& gate_bias,
                             const Tensor& rows_tanh, const Tensor& pooled,
                             const std::vector<OptionalTensor>& weights,
                             const std::vector<bool>& has_bias, int64_t ways, bool needs_dtanh) {
  const int64_t batch = dense(dgates).size(0), tokens = dgates.size(1), width = 2 * dgates.size(3);
  const Tensor of_tokens = strided(dgates, {batch * tokens, width}, {width, 1});
  Tensor of_bias = of_tokens;
  if (gate_bias.size(1) != tokens) {
    const int64_t axis = 1;
    of_bias = torch::stable::sum(rows_of(of_tokens, batch),
                                 torch::headeronly::IntHeaderOnlyArrayRef(&axis, 1));
  }
  GateGradients found;
  found.dbiases = sum_of_rows(of_bias);
  gradients_of_linear(found.of_rows, copies, of_tokens, matrix(rows_tanh), false,
                      ways & kWideWeight);
  gradients_of_linear(found.of_pooled, copies, of_bias, matrix(pooled), false,
                      ways & kPooledWeight);
  for (const auto& [results, linear] : {std::pair(&found.of_rows, kRowsLinear / 2),
                                        std::pair(&found.of_pooled, kPooledLinear / 2)}) {
    // each its own
    if (has_bias[linear]) results->push_back(torch::stable::clone(found.dbiases));
  }
  if (needs_dtanh) {
    const Tensor& weight = given(weights[kRowsLinear / 2]);
    found.dtanh = rows_of(times(of_tokens, weight, ways & kOfWide), batch);
  }
  const Tensor& weight = given(weights[kPooledLinear / 2]);
  found.dpooled = rows_of(times(of_bias, weight, ways & kOfPooled), batch);
  return found;
}

// The gradient (B, T, D) of what goes into the MLP, given those of its result before the last ReLU
// and of its input otherwise.
Tensor mlp_backward(std::vector<Tensor>& of_mlp, Copies& copies, const Tensor& dresult,
                    const Tensor& dattended, const std::vector<Tensor>& mixed, const Tensor& weight,
                    bool has_bias, int64_t ways) {
  Sum total;
  total.add(matrix(dattended));
  Tensor dmixed = matrix(dresult);
  for (size_t i = mixed.size() - 1; i > 0; --i) {
    std::vector<Tensor> more;
    gradients_of_linear(more, copies, dmixed, matrix(mixed[i - 1]), has_bias, ways & kTokensWeight);
    for (size_t k = 0; k < of_mlp.size(); ++k) add_to(of_mlp[k], more[k]);
    if (of_mlp.empty()) of_mlp = more;
    dmixed = times(dmixed, weight, ways & kOfTokens);
    if (i == 1) break;
    check(mixed[i - 1].numel() == dense(dmixed).numel() &&
              mixed[i - 1].scalar_type() == dmixed.scalar_type(),
          kLayer, "results of the MLP must agree");
    cpu::relu_backward({dmixed.numel(), float_of(dmixed), dmixed.data_ptr(),
                        mixed[i - 1].data_ptr(), dmixed.data_ptr()});
  }
  total.add(dmixed);
  return rows_of(total.take(), dattended.size(0));
}

// Takes the weights in the order of the parameters up to kFirstNorm, and which of those Linears
// have a bias. Gives the gradients of x, what put_memory says, and the gradients of the parameters:
// weight and bias of query, key, value, MLP, pooled, rows and candidate, of the norms, of the pool,
// and of the two biases, but for what there is not.
std::vector<Tensor> release_layer_backward(
    const OptionalTensor& doutput, const OptionalTensor& dnew_rows, const OptionalTensor& dnew_sum,
    const Tensor& x, const Tensor& rows, const Tensor& pooled, const Tensor& rows_tanh,
    const Tensor& gates, const Tensor& gate_bias, const std::vector<Tensor>& mixed,
    const Tensor& candidate, const std::vector<Tensor>& statistics_of_norms, const Tensor& bank,
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& by_head,
    const Tensor& statistics, const OptionalTensor& slot_mask, const OptionalTensor& seed,
    const std::vector<OptionalTensor>& weights, const std::vector<bool>& has_bias,
    const Tensor& first_norm, const Tensor& second_norm, const Tensor& pool_weight, int64_t ways,
    int64_t heads, bool causal, int64_t slot_offset, double scale, std::optional<int64_t> top_k,
    double dropout_p, bool prefix, int64_t num_pooled, bool needs_drows, bool is_whole) {
  check(weights.size() == 7 && has_bias.size() == 7 && mixed.size() > 1 &&
            statistics_of_norms.size() == 4,
        kLayer, "there must be 7 Linears, 2 results or more, and 4 statistics");
  check(dense(x).dim() == 3 && gate_bias.dim() == 3, kLayer, "x must be (B, T, D)");
  float_of(x);
  check_weights(weights, last_size(x), {kPooledLinear / 2, kRowsLinear / 2});
  const Attending how = {heads, causal, slot_offset, scale, top_k, dropout_p};
  const Attended kept = {bank, query, key, value, by_head, statistics, slot_mask, seed};
  const int64_t dim = x.size(2);
  const bool square = ways & kOfTokens, of_weight = ways & kTokensWeight;
  const Tensor x_rows = matrix(x);
  auto [dcandidate, dwritten, dgates, by_slot, dread_of_update] =
      Ops::memory_update_backward<false>(doutput, dnew_rows, candidate, rows,
                                         columns_of(gates, 0, dim), columns_of(gates, dim, dim),
                                         std::nullopt, gate_bias, std::nullopt, "read", 1, true,
                                         needs_drows, true, false, false);
  Copies copies;
  GateGradients of_gates = gates_backward(copies, std::exchange(dgates, Tensor()), gate_bias,
                                          rows_tanh, pooled, weights, has_bias, ways, needs_drows);
  std::vector<Tensor> of_readers, of_mlp, of_candidate;
  Sum dx(doutput ? OptionalTensor(matrix(*doutput)) : std::nullopt);
  if (weights[kCandidate / 2]) {
    dx.add_product(matrix(dcandidate), given(weights[kCandidate / 2]), square);
    gradients_of_linear(of_candidate, copies, matrix(dcandidate), x_rows, has_bias[kCandidate / 2],
                        of_weight);
  }
  auto [dresult, dattended, dsecond_weight, dsecond_bias] =
      Ops::residual_layer_norm_of_relu_backward(std::exchange(dcandidate, Tensor()), mixed.back(),
                                                mixed.front(), second_norm, statistics_of_norms[2],
                                                statistics_of_norms[3], true);
  Tensor dnormed = mlp_backward(of_mlp, copies, std::exchange(dresult, Tensor()),
                                std::exchange(dattended, Tensor()), mixed, given(weights[kMlp / 2]),
                                has_bias[kMlp / 2], ways);
  const Tensor read = merged(by_head);
  Tensor dread, drows, dfirst_weight, dfirst_bias;
  if (needs_drows) {
    std::tie(dread, drows, dfirst_weight, dfirst_bias) = Ops::residual_layer_norm_and_tanh_backward(
        dnormed, read, rows, first_norm, statistics_of_norms[0], statistics_of_norms[1],
        std::exchange(of_gates.dtanh, Tensor()), std::exchange(dwritten, Tensor()), true);
  } else {
    std::tie(dread, dfirst_weight, dfirst_bias) =
        Ops::residual_layer_norm_backward(dnormed, read, rows, first_norm, statistics_of_norms[0],
                                          statistics_of_norms[1], true, true);
  }
  dnormed = Tensor();
  const auto [dquery, dkey_value] = attend_backward(
      of_readers, copies, std::exchange(dread, Tensor()), x_rows, kept, has_bias, ways, how);
  dx.add_product(dquery, given(weights[0]), square);
  auto [of_x, dpool_weight, dpooled_sum] = Ops::pooled_gate_backward(
      of_gates.dpooled, dnew_sum, x, pool_weight, prefix, num_pooled, true, true, false);
  dx.add(matrix(of_x));

  std::vector<Tensor> results = {dx.take()};
  if (needs_drows) put_memory(results, drows, dkey_value, is_whole, weights, ways);
  for (const auto* more :
       {&of_readers, &of_mlp, &of_gates.of_pooled, &of_gates.of_rows, &of_candidate}) {
    results.insert(results.end(), more->begin(), more->end());
  }
  for (const Tensor& each :
       {dfirst_weight, dfirst_bias, dsecond_weight, dsecond_bias, dpool_weight}) {
    results.push_back(each);
  }
  for (int64_t gate = 0; gate < 2; ++gate) {
    results.push_back(sum_of_rows(strided(of_gates.dbiases, {dim, 1}, {1, 1}, gate * dim)));
  }
  return results;
}

}  // namespace
}  // namespace lm2
