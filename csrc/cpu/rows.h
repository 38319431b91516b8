// What the row-wise kernels share: rows of any dtype as rows of Scalars, a piece at a time.
#pragma once

#include "simd.h"

namespace lm2::cpu {
namespace {

// Elements of a row that are worked on at a time: a handful of such pieces fit in the first cache.
constexpr int64_t kPiece = 512;
// The scratch buffers of row-wise kernels.
enum { kFirstRow, kSecondRow };
// Elements that are worth waking a thread for.
constexpr int64_t kGrain = 1 << 15;

struct Whole {};
struct Part {
  int count;
};
// A part in a row that has room for whole vectors: lanes that are not there may be touched. (A load
// waits for a masked store.)
struct RoomyPart {
  int count;
};

template <class S, class T>
LM2_INLINE typename S::V get(const T* p, Whole) {
  return S::load(p);
}
template <class S, class T>
LM2_INLINE typename S::V get(const T* p, Part part) {
  return S::load(p, part.count);
}
template <class S, class T>
LM2_INLINE typename S::V get(const T* p, RoomyPart) {
  return S::load(p);
}
template <class S, class T>
LM2_INLINE void put(T* p, typename S::V x, Whole) {
  S::store(p, x);
}
template <class S, class T>
LM2_INLINE void put(T* p, typename S::V x, Part part) {
  S::store(p, x, part.count);
}

template <class S, class T>
LM2_INLINE void put(T* p, typename S::V x, RoomyPart) {
  S::store(p, x);
}

// x, with `rest` in the lanes that are not there.
template <class S>
LM2_INLINE typename S::V keep(typename S::V x, typename S::V, Whole) {
  return x;
}
template <class S>
LM2_INLINE typename S::V keep(typename S::V x, typename S::V rest, Part part) {
  return S::first_lanes(part.count, x, rest);
}

template <class S>
LM2_INLINE typename S::V keep(typename S::V x, typename S::V rest, RoomyPart part) {
  return S::first_lanes(part.count, x, rest);
}

// An int as a type.
template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

// Calls body(i, Whole) for each full vector of [0, count), then body(i, Part) for what is left.
template <class S, class Rest = Part, class F>
LM2_INLINE void vectors(int64_t count, const F& body) {
  int64_t i = 0;
  for (; i + S::kLanes <= count; i += S::kLanes) body(i, Whole{});
  if (i < count) body(i, Rest{static_cast<int>(count - i)});
}

LM2_INLINE int64_t size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

LM2_INLINE void* at(void* data, Dtype dtype, int64_t index) {
  return static_cast<char*>(data) + index * size_of(dtype);
}
LM2_INLINE const void* at(const void* data, Dtype dtype, int64_t index) {
  return static_cast<const char*>(data) + index * size_of(dtype);
}

template <class S, class From, class To>
LM2_INLINE void convert(const From* from, To* to, int64_t count) {
  vectors<S>(count, [&](int64_t i, auto part) __attribute__((always_inline)) {
    put<S>(to + i, get<S>(from + i, part), part);
  });
}

template <class S, class T>
static void widen(const T* from, typename S::Scalar* to, int64_t count) {
  convert<S>(from, to, count);
}

template <class S, class T>
static void narrow(const typename S::Scalar* from, T* to, int64_t count) {
  convert<S>(from, to, count);
}

// Elements as Scalars: where they lie if that is what they are, else converted into `buffer`. (By
// no function of its own: a processor that foresees what an instruction loads next shall see one
// stream of each.)
template <class S>
LM2_INLINE const typename S::Scalar* read(const void* data, Dtype dtype, int64_t count,
                                          typename S::Scalar* buffer) {
  using Scalar = typename S::Scalar;
  if constexpr (sizeof(Scalar) == 4) {
    if (dtype == Dtype::bfloat16) {
      convert<S>(static_cast<const bfloat16*>(data), buffer, count);
      return buffer;
    }
    if (dtype == Dtype::float16) {
      convert<S>(static_cast<const float16*>(data), buffer, count);
      return buffer;
    }
  }
  return static_cast<const Scalar*>(data);
}

// A place to write Scalars: the destination itself, or a buffer that `finish` converts from.
template <class S>
struct Destination {
  using Scalar = typename S::Scalar;
  Scalar* row;
  void* data;
  Dtype dtype;

  LM2_INLINE Destination open(void* data, Dtype dtype, Scalar* buffer) {
    const bool converts = sizeof(Scalar) == 4 && dtype != Dtype::float32;
    return {converts ? buffer : static_cast<Scalar*>(data), data, dtype};
  }

  void finish(int64_t count) const {
    if constexpr (sizeof(Scalar) == 4) {
      if (dtype == Dtype::bfloat16) narrow<S>(row, static_cast<bfloat16*>(data), count);
      if (dtype == Dtype::float16) narrow<S>(row, static_cast<float16*>(data), count);
    }
  }
};

// Where row (b, t) of a view begins, at column `column`.
LM2_INLINE const void* row_of(const View& view, int64_t b, int64_t t, int64_t column) {
  return at(static_cast<const void*>(view.data), view.dtype,
            b * view.batch_stride + t * view.row_stride + column);
}

// sum[i] += more[i]
template <class S>
LM2_INLINE void accumulate(typename S::Scalar* sum, const typename S::Scalar* more, int64_t count) {
  vectors<S>(count, [&](int64_t i, auto part) __attribute__((always_inline)) {
    put<S>(sum + i, get<S>(sum + i, part) + get<S>(more + i, part), part);
  });
}

// result[c] = the sum of partials[p][c] over p, by pairs and in an order that depends on `parts`
// alone. The partials are used up.
template <class S>
static void sum_partials(typename S::Scalar* partials, int64_t parts, int64_t stride, int64_t width,
                         void* result, Dtype dtype) {
  using Scalar = typename S::Scalar;
  const int64_t pieces = (width + kPiece - 1) / kPiece;
  parallel(pieces, larger<int64_t>(1, kGrain / (parts * kPiece)), [&](int64_t begin, int64_t end) {
    alignas(64) Scalar buffer[kPiece];
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t column = piece * kPiece, count = smaller(kPiece, width - column);
      Scalar* const sum = partials + column;
      for (int64_t step = 1; step < parts; step *= 2) {
        for (int64_t p = 0; p + step < parts; p += 2 * step) {
          accumulate<S>(sum + p * stride, sum + (p + step) * stride, count);
        }
      }
      const auto out = Destination<S>::open(at(result, dtype, column), dtype, buffer);
      for (int64_t i = 0; i < count; ++i) out.row[i] = sum[i];
      out.finish(count);
    }
  });
}

// Memory of one call that is shared by its threads.
struct Shared {
  void* memory;
  explicit Shared(int64_t bytes) : memory(allocate(bytes)) {}
  Shared(const Shared&) = delete;
  ~Shared() { release(memory); }
};

}  // namespace
}  // namespace lm2::cpu
