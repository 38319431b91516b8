// The hyperbolic tangent of rows.
#pragma once

#include "rows.h"

namespace lm2::cpu {
namespace {

// Elements that are worth waking a thread for: each takes some ten times what a sum takes.
constexpr int64_t kTanhGrain = kGrain / 8;

template <class S>
LM2_INLINE void tanh_of_piece(const typename S::Scalar* x, typename S::Scalar* result,
                              int64_t count) {
  vectors<S>(count, [&](int64_t i, auto part) __attribute__((always_inline)) {
    put<S>(result + i, S::accurate_tanh(get<S>(x + i, part)), part);
  });
}

template <class S>
void tanh(const Tanh& args) {
  using Scalar = typename S::Scalar;
  const Dtype dtype = args.x.dtype;
  const int64_t pieces = (args.width + kPiece - 1) / kPiece;
  const int64_t grain = larger<int64_t>(1, kTanhGrain / smaller(args.width, kPiece));
  parallel(args.batch * args.rows * pieces, grain, [&](int64_t begin, int64_t end) {
    alignas(64) Scalar wide[kPiece], result[kPiece];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / pieces, column = item % pieces * kPiece;
      const int64_t count = smaller(kPiece, args.width - column);
      const auto* const x =
          read<S>(row_of(args.x, row / args.rows, row % args.rows, column), dtype, count, wide);
      const auto to =
          Destination<S>::open(at(args.result, dtype, row * args.width + column), dtype, result);
      tanh_of_piece<S>(x, to.row, count);
      to.finish(count);
    }
  });
}

}  // namespace
}  // namespace lm2::cpu
