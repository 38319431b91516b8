// residual_layer_norm on the CPU: LayerNorm(x + residual), forward and backward.
//
// One thread owns a row. The sum of the two inputs stays in the thread's scratch while mean,
// variance and result are computed from it.
#pragma once

#include "tanh.h"

namespace lm2::cpu {
namespace {

// total[i] = x + residual of one row, or relu(x) + residual, through the piece buffers. Gives the
// sum of term(total).
template <class S, class F>
LM2_INLINE typename S::Scalar add_row(const ResidualLayerNorm& args, int64_t row,
                                      typename S::Scalar* total, const F& term) {
  using Scalar = typename S::Scalar;
  alignas(64) Scalar x_buffer[kPiece], residual_buffer[kPiece];
  const int64_t b = row / args.tokens, t = row % args.tokens;
  auto sum = S::zero();
  for (int64_t column = 0; column < args.width; column += kPiece) {
    const int64_t count = smaller(kPiece, args.width - column);
    const Scalar* x = read<S>(row_of(args.x, b, t, column), args.x.dtype, count, x_buffer);
    const Scalar* residual =
        read<S>(row_of(args.residual, b, t, column), args.residual.dtype, count, residual_buffer);
    auto piece = S::zero();
    vectors<S>(count, [&](int64_t i, auto part) __attribute__((always_inline)) {
      auto summand = get<S>(x + i, part);
      if (args.of_relu) summand = S::unless_not_positive(summand, summand);
      const auto element = summand + get<S>(residual + i, part);
      put<S>(total + column + i, element, part);
      piece = piece + keep<S>(term(element), S::zero(), part);
    });
    sum = sum + piece;
  }
  return S::sum(sum);
}

// The sum of f(element vector) over a row; lanes that are not there give f nothing to add.
template <class S, class F>
LM2_INLINE typename S::Scalar row_sum(int64_t width, const F& term) {
  // four chains: a quarter of the length, and of the wait for each addition
  typename S::V sum[4] = {S::zero(), S::zero(), S::zero(), S::zero()};
  int64_t i = 0;
  for (; i + 4 * S::kLanes <= width; i += 4 * S::kLanes) {
    for (int chain = 0; chain < 4; ++chain) {
      sum[chain] = sum[chain] + term(i + chain * S::kLanes, Whole{});
    }
  }
  for (; i + S::kLanes <= width; i += S::kLanes) sum[0] = sum[0] + term(i, Whole{});
  typename S::Scalar rest = 0;
  if (i < width) {
    alignas(64) typename S::Scalar last[S::kLanes];
    S::store(last, term(i, Part{static_cast<int>(width - i)}));
    for (int lane = 0; lane < width - i; ++lane) rest += last[lane];
  }
  return S::sum((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

template <class S>
static void tanh_of_residual(const ResidualLayerNormForward& args, int64_t row) {
  const Dtype dtype = args.residual.dtype;
  alignas(64) typename S::Scalar buffer[kPiece], result[kPiece];
  for (int64_t column = 0; column < args.width; column += kPiece) {
    const int64_t count = smaller(kPiece, args.width - column);
    const auto* const residual = read<S>(
        row_of(args.residual, row / args.tokens, row % args.tokens, column), dtype, count, buffer);
    const auto to =
        Destination<S>::open(at(args.tanh, dtype, row * args.width + column), dtype, result);
    tanh_of_piece<S>(residual, to.row, count);
    to.finish(count);
  }
}

template <class S>
void residual_layer_norm_forward(const ResidualLayerNormForward& args) {
  using Scalar = typename S::Scalar;
  const int64_t width = args.width;
  const int64_t bytes = round_up(width * static_cast<int64_t>(sizeof(Scalar)), 64);
  const Shared parameters(2 * bytes);
  Scalar* const place = static_cast<Scalar*>(parameters.memory);
  const Scalar* weight = read<S>(args.weight, args.parameter_dtype, width, place);
  const Scalar* bias =
      read<S>(args.bias, args.parameter_dtype, width, place + bytes / sizeof(Scalar));
  parallel(
      args.batch * args.tokens, larger<int64_t>(1, kGrain / width),
      [&](int64_t begin, int64_t end) {
        Scalar* const total = static_cast<Scalar*>(scratch(kFirstRow, bytes));
        alignas(64) Scalar out_buffer[kPiece];
        for (int64_t row = begin; row < end; ++row) {
          const auto itself = [](auto element) __attribute__((always_inline)) { return element; };
          const Scalar mean = add_row<S>(args, row, total, itself) / static_cast<Scalar>(width);
          const auto m = S::set(mean);
          const auto square = [&](int64_t i, auto part) __attribute__((always_inline)) {
            const auto centred = get<S>(total + i, part) - m;
            return centred * centred;
          };
          const Scalar variance = row_sum<S>(width, square) / static_cast<Scalar>(width);
          const Scalar rstd = 1 / std::sqrt(variance + static_cast<Scalar>(args.eps));
          static_cast<Scalar*>(args.mean)[row] = mean;
          static_cast<Scalar*>(args.rstd)[row] = rstd;
          for (int64_t column = 0; column < width; column += kPiece) {
            const int64_t count = smaller(kPiece, width - column);
            const auto out = Destination<S>::open(at(args.out, args.dtype, row * width + column),
                                                  args.dtype, out_buffer);
            vectors<S>(count, [&](int64_t i, auto part) __attribute__((always_inline)) {
              const auto normed = (get<S>(total + column + i, part) - m) * S::set(rstd);
              put<S>(out.row + i,
                     S::fma(normed, get<S>(weight + column + i, part),
                            get<S>(bias + column + i, part)),
                     part);
            });
            out.finish(count);
          }
          if (args.tanh != nullptr) tanh_of_residual<S>(args, row);
        }
      });
}

// dx and dresidual of a piece, from the gradient of what is normalised.
template <class S, class F>
LM2_INLINE void of_summands(const ResidualLayerNormBackward& args, int64_t row, int64_t column,
                            typename S::Scalar* dx, const F& of_total) {
  using Scalar = typename S::Scalar;
  alignas(64) Scalar x_buffer[kPiece], residual_buffer[kPiece], dtanh_buffer[kPiece],
      otherwise_buffer[kPiece], result_buffer[kPiece];
  const int64_t count = smaller(kPiece, args.width - column);
  const auto piece = [&](const View& view, Scalar* buffer) {
    const void* const data = row_of(view, row / args.tokens, row % args.tokens, column);
    return view ? read<S>(data, view.dtype, count, buffer) : nullptr;
  };
  const Scalar* const x = piece(args.x, x_buffer);
  const Scalar* const residual = piece(args.residual, residual_buffer);
  const Scalar* const dtanh = piece(args.dtanh, dtanh_buffer);
  const Scalar* const otherwise = piece(args.dresidual_otherwise, otherwise_buffer);
  const auto to =
      Destination<S>::open(at(args.dresidual, args.residual.dtype, row * args.width + column),
                           args.residual.dtype, result_buffer);
  vectors<S>(count, [&](int64_t i, auto part) __attribute__((always_inline)) {
    const auto d = of_total(i, part);
    auto of_residual = d;
    if (dtanh != nullptr) {
      auto slope = S::zero();
      S::tanh(get<S>(residual + i, part), &slope);
      of_residual = S::fma(get<S>(dtanh + i, part), slope, of_residual);
    }
    if (otherwise != nullptr) of_residual = of_residual + get<S>(otherwise + i, part);
    put<S>(to.row + i, of_residual, part);
    put<S>(dx + i, args.of_relu ? S::unless_not_positive(get<S>(x + i, part), d) : d, part);
  });
  to.finish(count);
}

template <class S>
void residual_layer_norm_backward(const ResidualLayerNormBackward& args) {
  using Scalar = typename S::Scalar;
  const int64_t width = args.width, rows = args.batch * args.tokens;
  const int64_t bytes = round_up(width * static_cast<int64_t>(sizeof(Scalar)), 64);
  const int64_t stride = bytes / static_cast<int64_t>(sizeof(Scalar));
  // rows whose parameter gradients are added up by one thread: by the shape alone, so that the
  // sums do not depend on how many threads there are
  const int64_t chunk = larger<int64_t>(16, (rows + 127) / 128);
  const int64_t chunks = (rows + chunk - 1) / chunk;
  const bool needs_parameters = args.dweight != nullptr;
  const Shared shared(bytes + (needs_parameters ? 2 * chunks * bytes : 0));
  Scalar* const place = static_cast<Scalar*>(shared.memory);
  const Scalar* weight = read<S>(args.weight, args.parameter_dtype, width, place);
  Scalar* const partials = place + stride;  // (chunks, 2, stride): dweight and dbias
  parallel(chunks, larger<int64_t>(1, kGrain / (chunk * width)), [&](int64_t begin, int64_t end) {
    Scalar* const normed = static_cast<Scalar*>(scratch(kFirstRow, bytes));
    Scalar* const gradient = static_cast<Scalar*>(scratch(kSecondRow, bytes));
    alignas(64) Scalar buffer[kPiece];
    for (int64_t item = begin; item < end; ++item) {
      Scalar* const dweight = partials + 2 * item * stride;
      Scalar* const dbias = dweight + stride;
      if (needs_parameters) {
        for (int64_t i = 0; i < width; ++i) dweight[i] = dbias[i] = 0;
      }
      for (int64_t row = item * chunk; row < smaller((item + 1) * chunk, rows); ++row) {
        const auto m = S::set(static_cast<const Scalar*>(args.mean)[row]);
        const auto r = S::set(static_cast<const Scalar*>(args.rstd)[row]);
        const Scalar size = static_cast<Scalar>(width);
        // a large mean has lost digits: what is left of it must not count as signal
        const auto centred = [&](auto element)
                                 __attribute__((always_inline)) { return element - m; };
        const auto left = S::set(add_row<S>(args, row, normed, centred) / size);
        auto sum_g = S::zero(), sum_gn = S::zero();
        for (int64_t column = 0; column < width; column += kPiece) {
          const int64_t count = smaller(kPiece, width - column);
          const Scalar* dout =
              read<S>(row_of(args.dout, row / args.tokens, row % args.tokens, column),
                      args.dout.dtype, count, buffer);
          auto piece_g = S::zero(), piece_gn = S::zero();
          vectors<S>(count, [&](int64_t i, auto part) __attribute__((always_inline)) {
            const int64_t c = column + i;
            const auto all = ((get<S>(normed + c, part) - m) - left) * r;
            const auto n = keep<S>(all, S::zero(), part);
            const auto d = get<S>(dout + i, part);
            const auto g = d * get<S>(weight + c, part);
            put<S>(normed + c, n, part);
            put<S>(gradient + c, g, part);
            // 0 in the lanes that are not there
            piece_g = piece_g + g;
            piece_gn = S::fma(g, n, piece_gn);
            if (needs_parameters) {
              put<S>(dweight + c, S::fma(d, n, get<S>(dweight + c, part)), part);
              put<S>(dbias + c, get<S>(dbias + c, part) + d, part);
            }
          });
          sum_g = sum_g + piece_g;
          sum_gn = sum_gn + piece_gn;
        }
        if (args.dx == nullptr) continue;
        const auto mean_g = S::set(S::sum(sum_g) / size);
        const auto mean_gn = S::set(S::sum(sum_gn) / size);
        for (int64_t column = 0; column < width; column += kPiece) {
          const int64_t count = smaller(kPiece, width - column);
          const auto dx = Destination<S>::open(at(args.dx, args.dx_dtype, row * width + column),
                                               args.dx_dtype, buffer);
          const auto of_total = [&](int64_t i, auto part) __attribute__((always_inline)) {
            const int64_t c = column + i;
            return (get<S>(gradient + c, part) - mean_g - get<S>(normed + c, part) * mean_gn) * r;
          };
          if (args.dresidual == nullptr) {
            vectors<S>(count, [&](int64_t i, auto part) __attribute__((always_inline)) {
              put<S>(dx.row + i, of_total(i, part), part);
            });
          } else {
            of_summands<S>(args, row, column, dx.row, of_total);
          }
          dx.finish(count);
        }
      }
    }
  });
  if (needs_parameters) {
    sum_partials<S>(partials, chunks, 2 * stride, width, args.dweight, args.parameter_dtype);
    sum_partials<S>(partials + stride, chunks, 2 * stride, width, args.dbias, args.parameter_dtype);
  }
}

}  // namespace
}  // namespace lm2::cpu
