// memory_update on the CPU: the gated write and what the layer shows, forward and backward.
//
// A work item is a piece of one slot's row: it reads the row once, goes through the slot's tokens,
// and writes what they show and the one new row. Everything between loading a token's piece and
// storing it stays in the first cache.
#pragma once

#include "rows.h"

namespace lm2::cpu {
namespace {

// The columns that a piece has at least: narrower ones are read less fast.
constexpr int64_t kLeastPiece = 128;
// Tokens that are added up one after the other, before they are added to the slot's sum.
constexpr int64_t kRun = 16;

// The buffers of a work item, in one array. Two pieces that are 4096 bytes apart share the first
// cache's sets, so those that most calls need come first and evenly.
enum { kMemory, kCandidate, kInput, kForget, kOutput, kRead, kInputBias, kForgetBias, kInputs };

// A piece of a slot's row.
struct SlotPiece {
  int64_t b, slot, column, count;
  int64_t first_token, tokens;

  // Where it begins in a contiguous (B, R, D), and its token k in a contiguous (B, T, D).
  int64_t row_offset(const MemoryUpdate& args) const {
    return (b * args.slots + slot) * args.width + column;
  }
  int64_t token_offset(const MemoryUpdate& args, int64_t k) const {
    return (b * args.tokens + first_token + k) * args.width + column;
  }
};

// Calls body(piece) for every piece of every slot's row.
template <class F>
LM2_INLINE void for_each_piece(const MemoryUpdate& args, const F& body) {
  const int64_t rows = args.batch * args.slots;
  const auto pieces_of = [&](int64_t columns) { return (args.width + columns - 1) / columns; };
  int64_t columns = kPiece;
  // of few long slots, pieces for every thread
  while (columns > kLeastPiece && columns * args.tokens_per_slot > kGrain &&
         rows * pieces_of(columns) < num_threads()) {
    columns /= 2;
  }
  const int64_t pieces = pieces_of(columns);
  const int64_t elements = smaller(args.width, columns) * args.tokens_per_slot;
  parallel(rows * pieces, larger<int64_t>(1, kGrain / elements), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / pieces, column = item % pieces * columns;
      const int64_t slot = row % args.slots, first = slot * args.tokens_per_slot;
      body(SlotPiece{row / args.slots, slot, column, smaller(columns, args.width - column), first,
                     smaller(args.tokens_per_slot, args.tokens - first)});
    }
  });
}

// A piece of a token's gate. kMany, here and below: slots have several tokens.
template <class S, bool kMany>
struct GatePiece {
  const typename S::Scalar *z, *bias;
  bool is_open;  // z is after the sigmoid

  template <class P>
  __attribute__((always_inline)) typename S::V operator()(int64_t i, P part) const {
    auto x = get<S>(z + i, part);
    if (kMany && is_open) return x;
    if (bias != nullptr) x = x + get<S>(bias + i, part);
    return S::sigmoid(x);
  }

  // Of a gate that never has a bias.
  template <class P>
  __attribute__((always_inline)) typename S::V without_bias(int64_t i, P part) const {
    const auto x = get<S>(z + i, part);
    return kMany && is_open ? x : S::sigmoid(x);
  }
};

// A gate of a slot's tokens.
template <class S, bool kMany>
struct Gate {
  using Scalar = typename S::Scalar;
  using Piece = GatePiece<S, kMany>;
  const GateView &view, &bias;
  const int64_t bias_column;  // where the gate's part of the bias begins
  Scalar *const buffer, *const bias_buffer;

  // Of the slot's token k; that of token 0 is asked for first.
  __attribute__((always_inline)) Piece token(const SlotPiece& piece, int64_t k) {
    if (!view) return {};
    // by all tokens of the slot: then its sigmoid is taken once
    const bool is_shared = kMany && view.row_stride == 0 && bias.row_stride == 0;
    if (is_shared && k > 0) return {buffer, nullptr, true};
    Piece gate = {row(view, piece, k, piece.column, buffer), nullptr, false};
    if (bias) gate.bias = row(bias, piece, k, bias_column + piece.column, bias_buffer);
    if (!is_shared) return gate;
    vectors<S>(piece.count, [&](int64_t i, auto part) __attribute__((always_inline)) {
      put<S>(buffer + i, gate(i, part), part);
    });
    return {buffer, nullptr, true};
  }

  __attribute__((always_inline)) static const Scalar* row(const GateView& from,
                                                          const SlotPiece& piece, int64_t k,
                                                          int64_t column, Scalar* buffer) {
    const int64_t index =
        piece.b * from.batch_stride + piece.slot * from.slot_stride + k * from.row_stride + column;
    return read<S>(at(static_cast<const void*>(from.data), from.dtype, index), from.dtype,
                   piece.count, buffer);
  }
};

// A piece of what a token has, as Scalars.
template <class S, bool kMany>
struct TokenPiece {
  const typename S::Scalar *candidate, *shown;
  GatePiece<S, kMany> input, forget, output;
};

// A piece of a slot's row as Scalars, and where those of its tokens come from.
template <class S, bool kMany>
struct UpdatePiece {
  using Scalar = typename S::Scalar;
  const MemoryUpdate& args;
  const SlotPiece& piece;
  Scalar (*const buffers)[kPiece];
  const GateView no_bias;
  const Scalar* const memory;
  Gate<S, kMany> input, forget, output;

  UpdatePiece(const MemoryUpdate& args, const SlotPiece& piece, Scalar (*buffers)[kPiece])
      : args(args),
        piece(piece),
        buffers(buffers),
        memory(row(args.memory, piece.slot, buffers[kMemory])),
        input{args.input_gate, args.gate_bias, 0, buffers[kInput], buffers[kInputBias]},
        forget{args.forget_gate, args.gate_bias, args.width, buffers[kForget],
               buffers[kForgetBias]},
        output{args.output_gate, no_bias, 0, buffers[kOutput], nullptr} {}

  // Of the slot's token k; that of token 0 is asked for first.
  __attribute__((always_inline)) TokenPiece<S, kMany> token(int64_t k) {
    const Scalar* candidate = row(args.candidate, piece.first_token + k, buffers[kCandidate]);
    const Scalar* shown = args.shows_memory ? memory : candidate;
    if (args.read) shown = row(args.read, piece.first_token + k, buffers[kRead]);
    return {candidate, shown, input.token(piece, k), forget.token(piece, k),
            output.token(piece, k)};
  }

  // A piece of a tensor's row, of a slot or a token.
  __attribute__((always_inline)) const Scalar* row(const View& view, int64_t r,
                                                   Scalar* buffer) const {
    return read<S>(row_of(view, piece.b, r, piece.column), view.dtype, piece.count, buffer);
  }
};

// The sum over a slot's tokens of what each has for a piece of its row, run by run. What is rounded
// off where a run is added is kept, and added at the end: no sum is one long chain.
template <class S, bool kMany>
struct SlotSum {
  using Scalar = typename S::Scalar;
  Scalar *total, *run, *lost;

  // The row that token k's part goes to with add_to.
  Scalar* token(int64_t k) { return kMany && k >= kRun ? run : total; }

  template <class P>
  __attribute__((always_inline)) static void add_to(Scalar* row, bool is_first, int64_t i,
                                                    typename S::V x, P part) {
    if (kMany && !is_first) x = get<S>(row + i, part) + x;
    put<S>(row + i, x, part);
  }

  // After token k, perhaps the last.
  void end(int64_t k, const SlotPiece& piece) {
    const bool is_last = k + 1 == piece.tokens, ends = (k + 1) % kRun == 0 || is_last;
    if (kMany && k >= kRun && ends) add_run(k < 2 * kRun, piece.count);
    if (kMany && k >= kRun && is_last) add_lost(piece.count);
  }

  // Token k's part, all of it.
  void add(int64_t k, const Scalar* row, const SlotPiece& piece) {
    Scalar* const sum = token(k);
    vectors<S>(piece.count, [&](int64_t i, auto part) __attribute__((always_inline)) {
      add_to(sum, k % kRun == 0, i, get<S>(row + i, part), part);
    });
    end(k, piece);
  }

  void add_run(bool is_first, int64_t count) {
    vectors<S>(count, [&](int64_t i, auto part) __attribute__((always_inline)) {
      const auto a = get<S>(total + i, part), b = get<S>(run + i, part);
      // the sum, and exactly what it lacks
      const auto sum = a + b, of_b = sum - a;
      const auto rest = (a - (sum - of_b)) + (b - of_b);
      put<S>(total + i, sum, part);
      put<S>(lost + i, is_first ? rest : get<S>(lost + i, part) + rest, part);
    });
  }

  void add_lost(int64_t count) {
    vectors<S>(count, [&](int64_t i, auto part) __attribute__((always_inline)) {
      const auto sum = get<S>(total + i, part);
      // of an infinity it is NaN
      put<S>(total + i, S::if_nonzero(sum - sum, sum, sum + get<S>(lost + i, part)), part);
    });
  }
};

// quotient = row / tokens; they may be one.
template <class S>
static void divide(const typename S::Scalar* row, int64_t tokens, typename S::Scalar* quotient,
                   int64_t count) {
  const auto divisor = S::set(static_cast<typename S::Scalar>(tokens));
  vectors<S>(count, [&](int64_t i, auto part) __attribute__((always_inline)) {
    put<S>(quotient + i, get<S>(row + i, part) / divisor, part);
  });
}

// The place of a result's piece; what nobody needs is computed into the buffer.
template <class S>
LM2_INLINE Destination<S> place(void* data, Dtype dtype, int64_t index,
                                typename S::Scalar* buffer) {
  if (data == nullptr) return {buffer, nullptr, Dtype::float32};
  return Destination<S>::open(at(data, dtype, index), dtype, buffer);
}

template <class S, bool kMany>
static void update_forward(const MemoryUpdateForward& args) {
  using Scalar = typename S::Scalar;
  for_each_piece(args, [&](const SlotPiece& piece) {
    alignas(64) Scalar all_buffers[kInputs + 5][kPiece];
    Scalar(*const buffers)[kPiece] = all_buffers + kInputs;
    UpdatePiece<S, kMany> in(args, piece, all_buffers);
    const Scalar* const memory = in.memory;
    const auto updated =
        place<S>(args.new_memory, args.memory.dtype, piece.row_offset(args), buffers[0]);
    SlotSum<S, kMany> sum{updated.row, buffers[3], buffers[4]};
    for (int64_t k = 0; k < (kMany ? piece.tokens : 1); ++k) {
      const auto token = in.token(k);
      Scalar* const row = sum.token(k);
      const bool is_first = k % kRun == 0;
      const Scalar* hidden = in.row(args.hidden, piece.first_token + k, buffers[1]);
      const auto out =
          place<S>(args.output, args.hidden.dtype, piece.token_offset(args, k), buffers[2]);
      vectors<S>(piece.count, [&](int64_t i, auto part) __attribute__((always_inline)) {
        const auto written = token.input(i, part) * S::tanh(get<S>(token.candidate + i, part));
        const auto m = S::fma(token.forget(i, part), get<S>(memory + i, part), written);
        auto y = get<S>(hidden + i, part);
        if (token.output.z == nullptr) {
          y = y + m;
        } else {
          y = S::fma(token.output.without_bias(i, part), get<S>(token.shown + i, part), y);
        }
        sum.add_to(row, is_first, i, m, part);
        put<S>(out.row + i, y, part);
      });
      out.finish(piece.count);
      sum.end(k, piece);
    }
    if (kMany) divide<S>(updated.row, piece.tokens, updated.row, piece.count);
    updated.finish(piece.count);
  });
}

template <class S, bool kMany>
static void update_backward(const MemoryUpdateBackward& args) {
  using Scalar = typename S::Scalar;
  const bool release = !args.output_gate, has_read = static_cast<bool>(args.read);
  const bool reaches_memory = args.dnew_memory || release;
  const int64_t gates = release ? 2 : 3;
  const int64_t gate_stride = args.width * (args.apart ? args.batch * args.tokens : 1);
  for_each_piece(args, [&](const SlotPiece& piece) {
    alignas(64) Scalar all_buffers[kInputs + (kMany ? 16 : 10)][kPiece];
    Scalar(*const buffers)[kPiece] = all_buffers + kInputs;
    UpdatePiece<S, kMany> in(args, piece, all_buffers);
    const Scalar* const memory = in.memory;
    const Scalar *dout = nullptr, *dnew = nullptr;
    if (args.dnew_memory) {
      dnew = in.row(args.dnew_memory, piece.slot, buffers[0]);
      if (kMany) {
        divide<S>(dnew, piece.tokens, buffers[0], piece.count);
        dnew = buffers[0];
      }
    }
    const auto dmemory =
        place<S>(args.dmemory, args.memory.dtype, piece.row_offset(args), buffers[1]);
    SlotSum<S, kMany> sum{dmemory.row, buffers[8], buffers[9]};
    const int64_t summed = kMany && args.dslot_gates != nullptr ? gates : 0;
    SlotSum<S, kMany> gate_sums[3];
    for (int64_t gate = 0; gate < summed; ++gate) {
      const int64_t column = gate * args.width + piece.column;
      Scalar* const total = static_cast<Scalar*>(args.dslot_gates) +
                            gates * (piece.row_offset(args) - piece.column) + column;
      gate_sums[gate] = {total, buffers[10 + 2 * gate], buffers[11 + 2 * gate]};
    }
    for (int64_t k = 0; k < (kMany ? piece.tokens : 1); ++k) {
      const auto token = in.token(k);
      Scalar* const row = sum.token(k);
      const bool is_first = k % kRun == 0;
      if (args.doutput) dout = in.row(args.doutput, piece.first_token + k, buffers[2]);
      const int64_t offset = piece.token_offset(args, k);
      const auto dcandidate = place<S>(args.dcandidate, args.dtype, offset, buffers[3]);
      const auto dread = place<S>(args.dread, args.dtype, offset, buffers[7]);
      const int64_t first_gate =
          args.apart ? offset : gates * (offset - piece.column) + piece.column;
      const auto gate = [&](int64_t index, Scalar* buffer) {
        return place<S>(index < gates ? args.dgates : nullptr, args.dtype,
                        first_gate + index * gate_stride, buffer);
      };
      const auto dinput = gate(0, buffers[4]);
      const auto dforget = gate(1, buffers[5]);
      const auto doutgate = gate(2, buffers[6]);
      vectors<S>(piece.count, [&](int64_t i, auto part) __attribute__((always_inline)) {
        const auto one = S::set(1);
        const auto c = get<S>(token.candidate + i, part), p = get<S>(memory + i, part);
        auto dc = S::zero(), dp = S::zero(), di = S::zero(), df = S::zero();
        // a gradient that never arrived is not 0 times something: that is NaN for an infinity
        if (reaches_memory) {
          auto d = dnew == nullptr ? get<S>(dout + i, part) : get<S>(dnew + i, part);
          if (release && dnew != nullptr && dout != nullptr) d = d + get<S>(dout + i, part);
          auto slope = S::zero();
          const auto u = S::tanh(c, &slope);
          const auto gi = token.input(i, part);
          const auto gf = token.forget(i, part);
          dc = d * gi * slope;
          dp = d * gf;
          di = d * u * gi * (one - gi);
          df = d * p * gf * (one - gf);
        }
        if (!release && dout != nullptr) {
          const auto d = get<S>(dout + i, part), g = token.output.without_bias(i, part),
                     dshown = d * g;
          put<S>(doutgate.row + i, d * get<S>(token.shown + i, part) * g * (one - g), part);
          if (has_read) {
            put<S>(dread.row + i, dshown, part);
          } else if (args.shows_memory) {
            dp = dp + dshown;
          } else {
            dc = dc + dshown;
          }
        } else if (!release) {
          put<S>(doutgate.row + i, S::zero(), part);
          if (has_read) put<S>(dread.row + i, S::zero(), part);
        }
        put<S>(dcandidate.row + i, dc, part);
        sum.add_to(row, is_first, i, dp, part);
        put<S>(dinput.row + i, di, part);
        put<S>(dforget.row + i, df, part);
      });
      const Scalar* const of_gates[] = {dinput.row, dforget.row, doutgate.row};
      for (int64_t gate = 0; gate < summed; ++gate) gate_sums[gate].add(k, of_gates[gate], piece);
      dcandidate.finish(piece.count);
      dread.finish(piece.count);
      dinput.finish(piece.count);
      dforget.finish(piece.count);
      doutgate.finish(piece.count);
      sum.end(k, piece);
    }
    dmemory.finish(piece.count);
  });
}

template <class S>
void memory_update_forward(const MemoryUpdateForward& args) {
  args.tokens_per_slot > 1 ? update_forward<S, true>(args) : update_forward<S, false>(args);
}

template <class S>
void memory_update_backward(const MemoryUpdateBackward& args) {
  args.tokens_per_slot > 1 ? update_backward<S, true>(args) : update_backward<S, false>(args);
}

}  // namespace
}  // namespace lm2::cpu
