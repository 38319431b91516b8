// What stands between the products of a layer, in float32 and float64.
#pragma once

#include "rows.h"

namespace lm2::cpu {
namespace {

template <class S>
void add(const Add& args) {
  using Scalar = typename S::Scalar;
  const int64_t pieces = (args.columns + kPiece - 1) / kPiece;
  const int64_t grain = larger<int64_t>(1, kGrain / smaller(args.columns, kPiece));
  parallel(args.rows * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / pieces, column = item % pieces * kPiece;
      Scalar* const to = static_cast<Scalar*>(args.to) + row * args.columns + column;
      const auto* const from =
          static_cast<const Scalar*>(args.from) + row * args.from_stride + column;
      accumulate<S>(to, from, smaller(kPiece, args.columns - column));
    }
  });
}

template <class S>
void relu_backward(const ReluBackward& args) {
  using Scalar = typename S::Scalar;
  const int64_t pieces = (args.count + kPiece - 1) / kPiece;
  parallel(pieces, kGrain / kPiece, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = piece * kPiece;
      const auto* const dy = static_cast<const Scalar*>(args.dy) + first;
      const auto* const result = static_cast<const Scalar*>(args.result) + first;
      auto* const to = static_cast<Scalar*>(args.to) + first;
      vectors<S>(smaller(kPiece, args.count - first),
                 [&](int64_t i, auto part) __attribute__((always_inline)) {
                   const auto d = get<S>(dy + i, part);
                   put<S>(to + i, S::unless_not_positive(get<S>(result + i, part), d), part);
                 });
    }
  });
}

}  // namespace
}  // namespace lm2::cpu
