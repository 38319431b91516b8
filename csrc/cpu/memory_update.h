// memory_update on the CPU: the gated write and what the layer shows, forward and backward.
//
// Elementwise over (B, T, D). A work item is a piece of one row; everything between loading it and
// storing it stays in the first cache.
#pragma once

#include "rows.h"

namespace lm2::cpu {
namespace {

// Calls body(b, t, column, count) for every piece of every row.
template <class F>
LM2_INLINE void for_each_piece(int64_t batch, int64_t tokens, int64_t width, const F& body) {
  const int64_t pieces = (width + kPiece - 1) / kPiece;
  const int64_t grain = larger<int64_t>(1, kGrain / smaller(width, kPiece));
  parallel(batch * tokens * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / pieces, column = item % pieces * kPiece;
      body(row / tokens, row % tokens, column, smaller(kPiece, width - column));
    }
  });
}

// The inputs of one piece of a row, as Scalars.
template <class S>
struct UpdatePiece {
  using Scalar = typename S::Scalar;
  using V = typename S::V;
  const Scalar *candidate, *memory, *input, *forget, *output;
  const Scalar *input_bias, *forget_bias;
  alignas(64) Scalar buffers[7][kPiece];

  UpdatePiece(const MemoryUpdate& args, int64_t b, int64_t t, int64_t column, int64_t count) {
    candidate = get_row(args.candidate, b, t, column, count, 0);
    memory = get_row(args.memory, b, t, column, count, 1);
    input = get_row(args.input_gate, b, t, column, count, 2);
    forget = get_row(args.forget_gate, b, t, column, count, 3);
    output = get_row(args.output_gate, b, t, column, count, 4);
    input_bias = get_row(args.gate_bias, b, t, column, count, 5);
    forget_bias = get_row(args.gate_bias, b, t, args.width + column, count, 6);
  }

  const Scalar* get_row(const View& view, int64_t b, int64_t t, int64_t column, int64_t count,
                        int which) {
    if (!view) return nullptr;
    return read<S>(row_of(view, b, t, column), view.dtype, count, buffers[which]);
  }

  // A gate after its sigmoid.
  template <class P>
  LM2_INLINE V gate(const Scalar* z, const Scalar* bias, int64_t i, P part) {
    V x = get<S>(z + i, part);
    if (bias != nullptr) x = x + get<S>(bias + i, part);
    return S::sigmoid(x);
  }
};

template <class S>
void memory_update_forward(const MemoryUpdateForward& args) {
  using Scalar = typename S::Scalar;
  for_each_piece(
      args.batch, args.tokens, args.width,
      [&](int64_t b, int64_t t, int64_t column, int64_t count) {
        using Piece = UpdatePiece<S>;
        const Piece in(args, b, t, column, count);
        alignas(64) Scalar hidden_buffer[kPiece], out_buffer[kPiece], new_buffer[kPiece];
        const Scalar* hidden =
            read<S>(row_of(args.hidden, b, t, column), args.hidden.dtype, count, hidden_buffer);
        const int64_t offset = (b * args.tokens + t) * args.width + column;
        const auto out = Destination<S>::open(at(args.output, args.hidden.dtype, offset),
                                              args.hidden.dtype, out_buffer);
        const auto updated = Destination<S>::open(at(args.new_memory, args.memory.dtype, offset),
                                                  args.memory.dtype, new_buffer);
        const Scalar* shown = args.shows_memory ? in.memory : in.candidate;
        vectors<S>(count, [&](int64_t i, auto part) __attribute__((always_inline)) {
          const auto written = Piece::gate(in.input, in.input_bias, i, part) *
                               S::tanh(get<S>(in.candidate + i, part));
          const auto m = S::fma(Piece::gate(in.forget, in.forget_bias, i, part),
                                get<S>(in.memory + i, part), written);
          auto y = get<S>(hidden + i, part);
          if (in.output == nullptr) {
            y = y + m;
          } else {
            y = S::fma(Piece::gate(in.output, nullptr, i, part), get<S>(shown + i, part), y);
          }
          put<S>(updated.row + i, m, part);
          put<S>(out.row + i, y, part);
        });
        out.finish(count);
        updated.finish(count);
      });
}

template <class S>
void memory_update_backward(const MemoryUpdateBackward& args) {
  using Scalar = typename S::Scalar;
  for_each_piece(
      args.batch, args.tokens, args.width,
      [&](int64_t b, int64_t t, int64_t column, int64_t count) {
        using Piece = UpdatePiece<S>;
        const Piece in(args, b, t, column, count);
        alignas(64) Scalar buffers[8][kPiece];
        const Scalar *dout = nullptr, *dnew = nullptr;
        if (args.doutput) {
          dout = read<S>(row_of(args.doutput, b, t, column), args.doutput.dtype, count, buffers[0]);
        }
        if (args.dnew_memory) {
          dnew = read<S>(row_of(args.dnew_memory, b, t, column), args.dnew_memory.dtype, count,
                         buffers[1]);
        }
        const int64_t row = b * args.tokens + t, offset = row * args.width + column;
        const int64_t gates = args.output_gate ? 3 : 2;
        // what nobody needs is computed into a buffer
        const auto place = [&](void* data, Dtype dtype, int64_t index, int which) {
          if (data == nullptr) return Destination<S>{buffers[which], nullptr, Dtype::float32};
          return Destination<S>::open(at(data, dtype, index), dtype, buffers[which]);
        };
        const auto dcandidate = place(args.dcandidate, args.dtype, offset, 2);
        const auto dmemory = place(args.dmemory, args.memory.dtype, offset, 3);
        const int64_t gate_offset = row * gates * args.width + column;
        const auto dinput = place(args.dgates, args.dtype, gate_offset, 4);
        const auto dforget = place(args.dgates, args.dtype, gate_offset + args.width, 5);
        const auto doutgate =
            place(gates == 3 ? args.dgates : nullptr, args.dtype, gate_offset + 2 * args.width, 6);
        const bool release = in.output == nullptr;
        const bool reaches_memory = dnew != nullptr || release;
        vectors<S>(count, [&](int64_t i, auto part) __attribute__((always_inline)) {
          const auto one = S::set(1);
          const auto c = get<S>(in.candidate + i, part), p = get<S>(in.memory + i, part);
          auto dc = S::zero(), dp = S::zero(), di = S::zero(), df = S::zero();
          // a gradient that never arrived is not 0 times something: that is NaN for an infinity
          if (reaches_memory) {
            auto d = dnew == nullptr ? get<S>(dout + i, part) : get<S>(dnew + i, part);
            if (release && dnew != nullptr && dout != nullptr) d = d + get<S>(dout + i, part);
            auto slope = S::zero();
            const auto u = S::tanh(c, &slope);
            const auto gi = Piece::gate(in.input, in.input_bias, i, part);
            const auto gf = Piece::gate(in.forget, in.forget_bias, i, part);
            dc = d * gi * slope;
            dp = d * gf;
            di = d * u * gi * (one - gi);
            df = d * p * gf * (one - gf);
          }
          if (!release && dout != nullptr) {
            const auto d = get<S>(dout + i, part);
            const auto g = Piece::gate(in.output, nullptr, i, part);
            put<S>(doutgate.row + i, d * (args.shows_memory ? p : c) * g * (one - g), part);
            if (args.shows_memory) {
              dp = dp + d * g;
            } else {
              dc = dc + d * g;
            }
          } else if (!release) {
            put<S>(doutgate.row + i, S::zero(), part);
          }
          put<S>(dcandidate.row + i, dc, part);
          put<S>(dmemory.row + i, dp, part);
          put<S>(dinput.row + i, di, part);
          put<S>(dforget.row + i, df, part);
        });
        dcandidate.finish(count);
        dmemory.finish(count);
        dinput.finish(count);
        dforget.finish(count);
        doutgate.finish(count);
      });
}

}  // namespace
}  // namespace lm2::cpu
