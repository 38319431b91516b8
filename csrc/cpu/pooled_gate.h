// pooled_gate on the CPU: the (running) mean over tokens of relu(weight * x), forward and backward.
//
// Tokens are taken in chunks whose size depends on the shape alone: one thread adds up a chunk row
// by row, and sums of chunks are added in order. So results do not depend on the threads, and no
// sum is one long chain.
#pragma once

#include "rows.h"

namespace lm2::cpu {
namespace {

// How the tokens of a batch row are cut.
struct Chunks {
  int64_t size, count;
  explicit Chunks(int64_t tokens)
      : size(larger<int64_t>(16, (tokens + 63) / 64)), count((tokens + size - 1) / size) {}
};

// Calls body(b, chunk, first token, end token) for every chunk of every batch row.
template <class F>
LM2_INLINE void for_each_chunk(const PooledGate& args, const Chunks& chunks, const F& body) {
  const int64_t grain = larger<int64_t>(1, kGrain / (chunks.size * args.width));
  parallel(args.batch * chunks.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / chunks.count, chunk = item % chunks.count;
      const int64_t first = chunk * chunks.size;
      body(b, chunk, first, smaller(first + chunks.size, args.tokens));
    }
  });
}

// sum += relu(weight * x) of one row; with `pooled`, what the sum is then, over `tokens`.
template <class S>
static void pool_row(const PooledGate& args, int64_t b, int64_t t, const typename S::Scalar* weight,
                     typename S::Scalar* sum, void* pooled, int64_t tokens) {
  using Scalar = typename S::Scalar;
  alignas(64) Scalar x_buffer[kPiece], out_buffer[kPiece];
  const auto count_of_tokens = S::set(static_cast<Scalar>(tokens));
  for (int64_t column = 0; column < args.width; column += kPiece) {
    const int64_t count = smaller(kPiece, args.width - column);
    const Scalar* x = read<S>(row_of(args.x, b, t, column), args.x.dtype, count, x_buffer);
    vectors<S>(count, [&](int64_t i, auto part) __attribute__((always_inline)) {
      const auto product = get<S>(weight + column + i, part) * get<S>(x + i, part);
      const auto total = get<S>(sum + column + i, part) + S::unless_not_positive(product, product);
      put<S>(sum + column + i, total, part);
    });
    if (pooled == nullptr) continue;
    const auto out =
        Destination<S>::open(at(pooled, args.dtype, (b * args.tokens + t) * args.width + column),
                             args.dtype, out_buffer);
    vectors<S>(count, [&](int64_t i, auto part) __attribute__((always_inline)) {
      put<S>(out.row + i, get<S>(sum + column + i, part) / count_of_tokens, part);
    });
    out.finish(count);
  }
}

template <class S>
void pooled_gate_forward(const PooledGateForward& args) {
  using Scalar = typename S::Scalar;
  const int64_t width = args.width;
  const Chunks chunks(args.tokens);
  // a line of its own for each row of sums: no two threads write to one
  const int64_t stride = round_up(width, 64 / sizeof(Scalar));
  const Shared shared((1 + args.batch * chunks.count) * stride * sizeof(Scalar));
  Scalar* const place = static_cast<Scalar*>(shared.memory);
  const Scalar* weight = read<S>(args.weight, args.parameter_dtype, width, place);
  Scalar* const sums = place + stride;  // (B, chunks, stride)
  Scalar* const new_sum = static_cast<Scalar*>(args.new_sum);
  const auto sum_of = [&](int64_t b, int64_t chunk) {
    return sums + (b * chunks.count + chunk) * stride;
  };
  const bool one_pass = args.prefix && chunks.count == 1;
  if (!one_pass) {
    for_each_chunk(args, chunks, [&](int64_t b, int64_t chunk, int64_t first, int64_t end) {
      Scalar* const sum = sum_of(b, chunk);
      for (int64_t i = 0; i < width; ++i) sum[i] = 0;
      for (int64_t t = first; t < end; ++t) pool_row<S>(args, b, t, weight, sum, nullptr, 1);
    });
  }
  // each chunk's sum becomes that of everything before it
  parallel(args.batch, larger<int64_t>(1, kGrain / (chunks.count * width)),
           [&](int64_t begin, int64_t end) {
             // a sum of sums: all of its rounding would go into every mean
             double* const running =
                 static_cast<double*>(scratch(kFirstRow, width * sizeof(double)));
             alignas(64) Scalar buffer[kPiece];
             for (int64_t b = begin; b < end; ++b) {
               const Scalar* before = args.pooled_sum
                                          ? static_cast<const Scalar*>(args.pooled_sum.data) +
                                                b * args.pooled_sum.batch_stride
                                          : nullptr;
               for (int64_t i = 0; i < width; ++i) running[i] = before == nullptr ? 0 : before[i];
               for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
                 Scalar* const sum = sum_of(b, chunk);
                 for (int64_t i = 0; i < width; ++i) {
                   const Scalar own = one_pass ? 0 : sum[i];
                   sum[i] = static_cast<Scalar>(running[i]);
                   running[i] += own;
                 }
               }
               if (args.prefix) continue;
               for (int64_t i = 0; i < width; ++i) {
                 new_sum[b * width + i] = static_cast<Scalar>(running[i]);
               }
               for (int64_t column = 0; column < width; column += kPiece) {
                 const int64_t count = smaller(kPiece, width - column);
                 const auto out = Destination<S>::open(
                     at(args.pooled, args.dtype, b * width + column), args.dtype, buffer);
                 for (int64_t i = 0; i < count; ++i) {
                   out.row[i] =
                       static_cast<Scalar>(running[column + i] / static_cast<double>(args.tokens));
                 }
                 out.finish(count);
               }
             }
           });
  if (!args.prefix) return;
  for_each_chunk(args, chunks, [&](int64_t b, int64_t chunk, int64_t first, int64_t end) {
    Scalar* const sum = sum_of(b, chunk);
    for (int64_t t = first; t < end; ++t) {
      pool_row<S>(args, b, t, weight, sum, args.pooled, args.num_pooled + t + 1);
    }
    if (end == args.tokens) {
      for (int64_t i = 0; i < width; ++i) new_sum[b * width + i] = sum[i];
    }
  });
}

// share = dpooled of one row over the count of its tokens, added to `sum`.
template <class S>
static void add_share(const PooledGateBackward& args, int64_t b, int64_t t,
                      typename S::Scalar* sum) {
  using Scalar = typename S::Scalar;
  alignas(64) Scalar buffer[kPiece];
  const int64_t tokens = args.prefix ? args.num_pooled + t + 1 : args.tokens;
  const auto over = S::set(static_cast<Scalar>(tokens));
  for (int64_t column = 0; column < args.width; column += kPiece) {
    const int64_t count = smaller(kPiece, args.width - column);
    const Scalar* dpooled =
        read<S>(row_of(args.dpooled, b, t, column), args.dpooled.dtype, count, buffer);
    vectors<S>(count, [&](int64_t i, auto part) __attribute__((always_inline)) {
      put<S>(sum + column + i, get<S>(sum + column + i, part) + get<S>(dpooled + i, part) / over,
             part);
    });
  }
}

// dx of one row and its part of dweight, from the gradient of relu(weight * x).
template <class S>
static void pool_row_backward(const PooledGateBackward& args, int64_t b, int64_t t,
                              const typename S::Scalar* weight, const typename S::Scalar* dactive,
                              typename S::Scalar* dweight) {
  using Scalar = typename S::Scalar;
  alignas(64) Scalar x_buffer[kPiece], dx_buffer[kPiece];
  for (int64_t column = 0; column < args.width; column += kPiece) {
    const int64_t count = smaller(kPiece, args.width - column);
    const Scalar* x = read<S>(row_of(args.x, b, t, column), args.x.dtype, count, x_buffer);
    const int64_t index = (b * args.tokens + t) * args.width + column;
    const auto dx = args.dx == nullptr ? Destination<S>{dx_buffer, nullptr, Dtype::float32}
                                       : Destination<S>::open(at(args.dx, args.dtype, index),
                                                              args.dtype, dx_buffer);
    vectors<S>(count, [&](int64_t i, auto part) __attribute__((always_inline)) {
      const int64_t c = column + i;
      const auto w = get<S>(weight + c, part), v = get<S>(x + i, part);
      const auto d = S::unless_not_positive(w * v, get<S>(dactive + c, part));
      put<S>(dx.row + i, d * w, part);
      if (dweight != nullptr) {
        put<S>(dweight + c, S::fma(d, v, get<S>(dweight + c, part)), part);
      }
    });
    dx.finish(count);
  }
}

template <class S>
void pooled_gate_backward(const PooledGateBackward& args) {
  using Scalar = typename S::Scalar;
  const int64_t width = args.width;
  const Chunks chunks(args.tokens);
  const int64_t stride = round_up(width, 64 / sizeof(Scalar));
  const int64_t items = args.batch * chunks.count;
  const bool needs_dweight = args.dweight != nullptr;
  const Shared shared((1 + items * (needs_dweight ? 2 : 1)) * stride * sizeof(Scalar));
  Scalar* const place = static_cast<Scalar*>(shared.memory);
  const Scalar* weight = read<S>(args.weight, args.parameter_dtype, width, place);
  Scalar* const sums = place + stride;             // (B, chunks, stride): of dpooled / count
  Scalar* const dweights = sums + items * stride;  // (B, chunks, stride)
  const bool scans = args.prefix && args.dpooled;
  if (scans) {
    for_each_chunk(args, chunks, [&](int64_t b, int64_t chunk, int64_t first, int64_t end) {
      Scalar* const sum = sums + (b * chunks.count + chunk) * stride;
      for (int64_t i = 0; i < width; ++i) sum[i] = 0;
      for (int64_t t = end - 1; t >= first; --t) add_share<S>(args, b, t, sum);
    });
  }
  // each chunk's sum becomes that of everything after it, and of what reaches all tokens
  parallel(args.batch, larger<int64_t>(1, kGrain / (chunks.count * width)),
           [&](int64_t begin, int64_t end) {
             Scalar* const running =
                 static_cast<Scalar*>(scratch(kFirstRow, stride * sizeof(Scalar)));
             for (int64_t b = begin; b < end; ++b) {
               const Scalar* dnew = args.dnew_sum ? static_cast<const Scalar*>(args.dnew_sum.data) +
                                                        b * args.dnew_sum.batch_stride
                                                  : nullptr;
               for (int64_t i = 0; i < width; ++i) running[i] = dnew == nullptr ? 0 : dnew[i];
               if (!args.prefix && args.dpooled) add_share<S>(args, b, 0, running);
               for (int64_t chunk = chunks.count - 1; chunk >= 0; --chunk) {
                 Scalar* const sum = sums + (b * chunks.count + chunk) * stride;
                 for (int64_t i = 0; i < width; ++i) {
                   const Scalar own = scans ? sum[i] : 0;
                   sum[i] = running[i];
                   running[i] += own;
                 }
               }
               if (args.dpooled_sum != nullptr) {
                 Scalar* const dsum = static_cast<Scalar*>(args.dpooled_sum) + b * width;
                 for (int64_t i = 0; i < width; ++i) dsum[i] = running[i];
               }
             }
           });
  if (args.dx == nullptr && !needs_dweight) return;
  for_each_chunk(args, chunks, [&](int64_t b, int64_t chunk, int64_t first, int64_t end) {
    const int64_t item = b * chunks.count + chunk;
    Scalar* const dactive = sums + item * stride;
    Scalar* const dweight = needs_dweight ? dweights + item * stride : nullptr;
    for (int64_t i = 0; needs_dweight && i < width; ++i) dweight[i] = 0;
    if (!args.prefix) {
      // upwards, as memory is read ahead
      for (int64_t t = first; t < end; ++t) {
        pool_row_backward<S>(args, b, t, weight, dactive, dweight);
      }
      return;
    }
    for (int64_t t = end - 1; t >= first; --t) {
      if (scans) add_share<S>(args, b, t, dactive);
      pool_row_backward<S>(args, b, t, weight, dactive, dweight);
    }
  });
  if (needs_dweight) {
    sum_partials<S>(dweights, items, stride, width, args.dweight, args.parameter_dtype);
  }
}

}  // namespace
}  // namespace lm2::cpu
