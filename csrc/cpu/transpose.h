// A matrix with its axes exchanged, for products whose library takes dense rows alone, and the sums
// of its rows.
#pragma once

#include "rows.h"

namespace lm2::cpu {
namespace {

// Rows and columns of a tile: the float32 of a cache line. Rows that are a power of two apart share
// few sets of the first cache, so a line is done with before the next ones push it out: AVX-512
// reads and writes each once.
constexpr int64_t kTile = 16;

// The sums of a panel of rows in steps: of a tile, of 16 tiles, of 16 times as many, of the rest. A
// long sum of one step would lose what is small beside it.
constexpr int kSteps = 3;
constexpr int64_t kFanIn = 16;

template <class S>
struct PanelSums {
  using Scalar = typename S::Scalar;
  alignas(64) Scalar steps[kSteps][kTile] = {};
  int64_t tiles = 0;

  __attribute__((always_inline)) void add(const Scalar* from, int64_t stride, int64_t rows,
                                          int64_t columns) {
    vectors<S>(columns, [&](int64_t i, auto part) __attribute__((always_inline)) {
      auto sum = get<S>(from + i, part);
      for (int64_t row = 1; row < rows; ++row) sum = sum + get<S>(from + row * stride + i, part);
      put<S>(steps[0] + i, get<S>(steps[0] + i, part) + sum, part);
    });
    ++tiles;
    int64_t done = kFanIn;
    for (int step = 0; step + 1 < kSteps && tiles % done == 0; ++step, done *= kFanIn) carry(step);
  }

  __attribute__((always_inline)) void carry(int step) {
    for (int64_t i = 0; i < kTile; ++i) {
      steps[step + 1][i] += steps[step][i];
      steps[step][i] = 0;
    }
  }

  __attribute__((always_inline)) const Scalar* total() {
    for (int step = 0; step + 1 < kSteps; ++step) carry(step);
    return steps[kSteps - 1];
  }
};

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
      PanelSums<S> sums;
      for (int64_t row = 0; row < rows; row += kTile) {
        const int64_t count = smaller(kTile, rows - row);
        const Scalar* const from = matrix + row * stride + first;
        Scalar* const to = result + first * rows + row;
        if (args.sums != nullptr) sums.add(from, stride, count, last - first);
        if (count == kTile && last - first == kTile) {
          for (int64_t k = 0; k < kTile; k += S::kLanes) {
            for (int64_t i = 0; i < kTile; i += S::kLanes) {
              S::transpose(from + i * stride + k, stride, to + k * rows + i, rows);
            }
          }
          continue;
        }
        for (int64_t k = 0; k < last - first; ++k) {
          for (int64_t i = 0; i < count; ++i) to[k * rows + i] = from[i * stride + k];
        }
      }
      if (args.sums != nullptr) {
        const Scalar* const total = sums.total();
        for (int64_t k = first; k < last; ++k) {
          static_cast<Scalar*>(args.sums)[k] = total[k - first];
        }
      }
    }
  });
}

}  // namespace
}  // namespace lm2::cpu
