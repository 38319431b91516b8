// A matrix with its axes exchanged, for products whose library takes dense rows alone.
#pragma once

#include "rows.h"

namespace lm2::cpu {
namespace {

// Rows and columns of a tile: the float32 of a cache line. Rows that are a power of two apart share
// few sets of the first cache, so a line is done with before the next ones push it out: AVX-512
// reads and writes each once.
constexpr int64_t kTile = 16;

template <class S>
void transpose(const Transpose& args) {
  using Scalar = typename S::Scalar;
  const auto* const matrix = static_cast<const Scalar*>(args.from);
  auto* const result = static_cast<Scalar*>(args.to);
  const int64_t rows = args.rows, columns = args.columns, stride = args.row_stride;
  const int64_t panels = (columns + kTile - 1) / kTile;
  parallel(panels, larger<int64_t>(1, kGrain / (rows * kTile)), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kTile, last = smaller(first + kTile, columns);
      int64_t row = 0;
      for (; last - first == kTile && row + kTile <= rows; row += kTile) {
        const Scalar* const from = matrix + row * stride + first;
        Scalar* const to = result + first * rows + row;
        for (int64_t k = 0; k < kTile; k += S::kLanes) {
          for (int64_t i = 0; i < kTile; i += S::kLanes) {
            S::transpose(from + i * stride + k, stride, to + k * rows + i, rows);
          }
        }
      }
      for (int64_t column = first; column < last; ++column) {
        for (int64_t i = row; i < rows; ++i)
          result[column * rows + i] = matrix[i * stride + column];
      }
    }
  });
}

}  // namespace
}  // namespace lm2::cpu
