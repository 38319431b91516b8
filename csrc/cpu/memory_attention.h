// memory_attention on the CPU, forward and backward.
//
// One work item is some of the query blocks of one (batch, head): every `ranges`-th block, so that
// under a causal mask all items cost the same. A block's scores over the slots it sees are kept
// whole in the second cache; a hidden slot costs nothing beyond the block's edge, and nothing of
// size T x N exists. All products are one microkernel over panels: B is packed in panels of two
// vectors, zero-filled at the edges, A is read by (row stride, column stride).
//
// Where the processor multiplies pairs of bfloat16, a Scalar of a product's operands is a word: two
// consecutive terms of a row of A, and of a column of B. Scores, probabilities and sums stay
// float32; what multiplies them is rounded to bfloat16 first.
#pragma once

#include "../dropout.h"
#include "rows.h"

namespace lm2::cpu {
namespace {

constexpr int64_t kBlockRows = 48;
// Elements of a block of scores: 1 MiB of float32.
constexpr int64_t kBlockElements = 1 << 18;
// Terms of a product that one accumulator adds up before it joins the total.
constexpr int64_t kChain = 64;
// Up to this many query rows, packing keys and values costs more than it saves.
constexpr int64_t kFewRows = 4;
// Work items wanted, over batch and heads: by the shape alone, as sums are cut by them.
constexpr int64_t kItems = 16;

// The scratch buffers of a thread.
enum {
  kKeyPanels,
  kValuePanels,
  kScores,
  kResult,
  kQueries,
  kMask,
  kFactor,
  kDout,
  kDscores,
  kKeyRows,
  kQueryPanels,
  kDoutPanels,
  kDkey,
  kDvalue,
  kPairs
};

template <class S>
LM2_INLINE typename S::Scalar* scratch_of(int which, int64_t elements) {
  return static_cast<typename S::Scalar*>(
      scratch(which, elements * static_cast<int64_t>(sizeof(typename S::Scalar))));
}

// Terms of a product that one Scalar of its operands holds.
template <class S, class T>
constexpr int kTerms = S::kHasPairs && std::is_same_v<T, bfloat16> ? 2 : 1;

// Scalars that hold so many terms.
template <class S, class T>
LM2_INLINE int64_t words(int64_t terms) {
  return (terms + kTerms<S, T> - 1) / kTerms<S, T>;
}

template <class S, class T>
LM2_INLINE typename S::V multiply_add(typename S::V a, typename S::V b, typename S::V sum) {
  if constexpr (kTerms<S, T> == 2) {
    return S::fma_pairs(a, b, sum);
  } else {
    return S::fma(a, b, sum);
  }
}

// C (kTileRows x 2 vectors) += or = A (rows x depth) B (depth x 2 vectors), depth in words.
template <class S, class T, int kTileRows>
static void tile(int64_t depth, const typename S::Scalar* a, int64_t row_stride,
                 int64_t column_stride, const typename S::Scalar* b, typename S::Scalar* c,
                 int64_t c_stride, bool adds) {
  using V = typename S::V;
  constexpr int64_t kPanel = 2 * S::kLanes;
  V sum[kTileRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) sum[i][0] = sum[i][1] = S::zero();
  for (int64_t k = 0; k < depth; ++k) {
    const V b0 = S::load(b + k * kPanel), b1 = S::load(b + k * kPanel + S::kLanes);
    const typename S::Scalar* const column = a + k * column_stride;
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      const V x = S::set(column[i * row_stride]);
      sum[i][0] = multiply_add<S, T>(x, b0, sum[i][0]);
      sum[i][1] = multiply_add<S, T>(x, b1, sum[i][1]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
    typename S::Scalar* const out = c + i * c_stride;
    if (adds) {
      sum[i][0] = sum[i][0] + S::load(out);
      sum[i][1] = sum[i][1] + S::load(out + S::kLanes);
    }
    S::store(out, sum[i][0]);
    S::store(out + S::kLanes, sum[i][1]);
  }
}

// C (rows x columns) += or = A (rows x depth) B, B in panels of `panel_stride` elements.
template <class S, class T>
static void multiply(int64_t rows, int64_t columns, int64_t depth, const typename S::Scalar* a,
                     int64_t row_stride, int64_t column_stride, const typename S::Scalar* b,
                     int64_t panel_stride, typename S::Scalar* c, int64_t c_stride, bool adds) {
  constexpr int64_t kPanel = 2 * S::kLanes;
  for (int64_t j = 0; j < columns; j += kPanel) {
    for (int64_t k = 0; k < depth; k += kChain) {
      const int64_t terms = smaller(kChain, depth - k);
      const auto* const a_part = a + k * column_stride;
      const auto* const panel = b + j / kPanel * panel_stride + k * kPanel;
      int64_t i = 0;
      const auto step = [&](auto tile_rows) {
        constexpr int kTileRows = decltype(tile_rows)::value;
        for (; i + kTileRows <= rows; i += kTileRows) {
          tile<S, T, kTileRows>(terms, a_part + i * row_stride, row_stride, column_stride, panel,
                                c + i * c_stride + j, c_stride, adds || k > 0);
        }
      };
      step(Count<S::kRows>{});
      if constexpr (S::kRows > 8) step(Count<8>{});
      if constexpr (S::kRows > 4) step(Count<4>{});
      step(Count<2>{});
      step(Count<1>{});
    }
  }
}

// One (batch, head) of the inputs.
template <class S, class T>
struct Head {
  using Scalar = typename S::Scalar;
  static constexpr int64_t kPanel = 2 * S::kLanes;
  static_assert(kPanel <= kBlockRows);
  const MemoryAttention& args;
  int64_t b, h;
  const Scalar* mask = nullptr;  // (N,), 1 = takes part; null: all do
  int64_t first_visible = 0;     // the first slot that takes part, N if none does
  int64_t width, padded_width, padded_slots;
  int64_t row_words;  // of K elements

  Head(const MemoryAttention& given, int64_t batch_and_head)
      : args(given), b(batch_and_head / given.heads), h(batch_and_head % given.heads) {
    width = args.width;
    padded_width = round_up(width, kPanel);
    padded_slots = round_up(args.slots, kPanel);
    row_words = words<S, T>(width);
    if (args.slot_mask == nullptr) return;
    Scalar* const row = scratch_of<S>(kMask, padded_slots);
    first_visible = args.slots;
    for (int64_t j = args.slots - 1; j >= 0; --j) {
      const bool seen = args.slot_mask[b * args.mask_batch_stride + j * args.mask_slot_stride] != 0;
      row[j] = seen ? 1 : 0;
      if (seen) first_visible = j;
    }
    mask = row;
  }

  const T* rows(const View& view) const {
    return static_cast<const T*>(view.data) + b * view.batch_stride + h * view.head_stride;
  }

  // Token t's row of a result (B, T, H, K): a row of sums times a factor.
  void put_row(const Scalar* sums, Scalar factor, void* result, int64_t t) const {
    T* const row = static_cast<T*>(result) + ((b * args.tokens + t) * args.heads + h) * width;
    const auto times = S::set(factor);
    vectors<S>(width, [&](int64_t k, auto part) __attribute__((always_inline)) {
      put<S>(row + k, get<S>(sums + k, part) * times, part);
    });
  }

  // The slots that token t sees, before the mask.
  int64_t visible(int64_t t) const {
    return args.causal ? smaller(args.slots, args.slot_offset + t + 1) : args.slots;
  }

  // The first token that sees a slot, before the mask; it may lie beyond the last.
  int64_t first_token(int64_t slot) const {
    return args.causal ? larger<int64_t>(0, slot - args.slot_offset) : 0;
  }

  bool takes_part(int64_t slot) const { return mask == nullptr || mask[slot] != 0; }

  // Rows of a view as words, `row_words` apart: rows that lie 4 KiB apart would share one set of
  // the first cache.
  const Scalar* dense(const View& view, int64_t first, int64_t count, int which) const {
    const T* const source = rows(view) + first * view.row_stride;
    Scalar* const result = scratch_of<S>(which, kBlockRows * width);
    for (int64_t i = 0; i < count; ++i) {
      copy_words(source + i * view.row_stride, result + i * row_words, width);
    }
    return result;
  }

  // A row's elements as words.
  LM2_INLINE void copy_words(const T* from, Scalar* to, int64_t count) {
    if constexpr (kTerms<S, T> == 2) {
      if (count % 2 != 0) to[count / 2] = 0;
      std::memcpy(to, from, count * sizeof(T));
    } else {
      widen<S>(from, to, count);
    }
  }

  // Panels over slots, (slots / panel, words of K, panel): the right operand of Q K^T.
  void pack_transposed(const View& view, int64_t slots, Scalar* panels) const {
    Scalar* const part = scratch_of<S>(kResult, kBlockRows * padded_width);
    for (int64_t j = 0; j < slots; j += kPanel) {
      for (int64_t i = 0; i < kPanel; ++i) {
        copy_row(view, j + i, part + i * row_words);
      }
      for (int64_t half = 0; half < kPanel; half += S::kLanes) {
        const Scalar* const from = part + half * row_words;
        Scalar* const panel = panels + j * row_words + half;
        int64_t k = 0;
        for (; k + S::kLanes <= row_words; k += S::kLanes) {
          S::transpose(from + k, row_words, panel + k * kPanel, kPanel);
        }
        for (; k < row_words; ++k) S::store(panel + k * kPanel, S::gather(from + k, row_words));
      }
    }
  }

  // A slot's row, 0 beyond the last slot and where it is masked: 0 * NaN is NaN.
  void copy_row(const View& view, int64_t slot, Scalar* to) const {
    if (slot >= args.slots || !takes_part(slot)) {
      for (int64_t k = 0; k < row_words; ++k) to[k] = 0;
      return;
    }
    copy_words(rows(view) + slot * view.row_stride, to, width);
  }

  // Panels over columns, (K / panel, words of rows, panel): the right operand of P V.
  void pack(const View& view, int64_t first, int64_t count, bool slots, Scalar* panels) const {
    const int64_t depth = words<S, T>(count);
    for (int64_t i = 0; i < depth; ++i) {
      // the rows of a word; null where there is none
      const T* row[kTerms<S, T>];
      for (int term = 0; term < kTerms<S, T>; ++term) {
        const int64_t index = kTerms<S, T> * i + term;
        const bool is_there = index < count && !(slots && !takes_part(first + index));
        row[term] = is_there ? rows(view) + (first + index) * view.row_stride : nullptr;
      }
      for (int64_t k = 0; k < padded_width; k += S::kLanes) {
        const int64_t left = smaller<int64_t>(S::kLanes, width - k);
        const auto part = [&](const T* from) __attribute__((always_inline)) {
          if (from == nullptr || left <= 0) return S::zero();
          return left == S::kLanes ? S::load(from + k) : S::load(from + k, static_cast<int>(left));
        };
        auto x = part(row[0]);
        if constexpr (kTerms<S, T> == 2) x = S::pairs(x, part(row[1]));
        S::store(panels + k / kPanel * depth * kPanel + i * kPanel + k % kPanel, x);
      }
    }
  }

  // A block of probabilities, or of their gradients, as the left operand of a product over slots:
  // words of consecutive slots of a row. In place unless words are pairs.
  const Scalar* by_slots(const Scalar* block, int64_t count, int64_t stride, int64_t slots,
                         int64_t* word_stride) const {
    *word_stride = stride;
    if constexpr (kTerms<S, T> == 2) {
      *word_stride = stride / 2;
      Scalar* const result = scratch_of<S>(kPairs, kBlockRows * stride);
      for (int64_t i = 0; i < count; ++i) {
        T* const row = reinterpret_cast<T*>(result + i * *word_stride);
        const Scalar* const from = block + i * stride;
        for (int64_t j = 0; j < slots; j += S::kLanes) S::store_rounded(row + j, S::load(from + j));
      }
      return result;
    }
    return block;
  }

  // The same for a product over the block's rows: words of consecutive rows of a column.
  const Scalar* by_rows(const Scalar* block, int64_t count, int64_t stride, int64_t slots) const {
    if constexpr (kTerms<S, T> == 2) {
      Scalar* const result = scratch_of<S>(kPairs, kBlockRows * stride);
      for (int64_t i = 0; i < count; i += 2) {
        const Scalar* const from = block + i * stride;
        for (int64_t j = 0; j < slots; j += S::kLanes) {
          const auto next = i + 1 < count ? S::load(from + stride + j) : S::zero();
          S::store(result + i / 2 * stride + j, S::pairs(S::load(from + j), next));
        }
      }
      return result;
    }
    return block;
  }

  // Turns a row of products into exp(score - maximum), in place, and 0 from `visible` up to `end`:
  // times the result, that is the probabilities. What top-k and dropout put on each slot goes to
  // `factor`, and whether they do to `has_factor`. Rows here have room for whole vectors.
  Scalar softmax(Scalar* row, int64_t t, int64_t end, Scalar* factor, bool* has_factor) const {
    const int64_t count = visible(t);
    *has_factor = false;
    if (first_visible >= count) {
      for (int64_t j = 0; j < end; ++j) row[j] = 0;
      return 1;
    }
    const auto low = S::set(-std::numeric_limits<Scalar>::infinity());
    const auto scale = S::set(static_cast<Scalar>(args.scale));
    auto most = low;
    vectors<S, RoomyPart>(count, [&](int64_t j, auto part) __attribute__((always_inline)) {
      auto x = get<S>(row + j, part) * scale;
      if (mask != nullptr) x = S::if_nonzero(get<S>(mask + j, part), x, low);
      x = keep<S>(x, low, part);
      put<S>(row + j, x, part);
      most = S::max(most, x);
    });
    const bool has_top_k = args.top_k != 0 && args.top_k < count;
    if (has_top_k) keep_top_k(row, factor, count, args.top_k);
    const auto shift = S::set(S::maximum(most));
    auto sum = S::zero();
    vectors<S, RoomyPart>(count, [&](int64_t j, auto part) __attribute__((always_inline)) {
      const auto p = S::exp_down(get<S>(row + j, part) - shift);
      put<S>(row + j, p, part);
      sum = sum + p;
    });
    const Scalar total = S::sum(sum);
    for (int64_t j = count; j < end; ++j) row[j] = 0;
    if (args.seed != nullptr) {
      const Scalar kept = static_cast<Scalar>(args.keep_factor);
      const auto keys = dropout::row_keys(*args.seed, (b * args.heads + h) * args.tokens + t);
      for (int64_t j = 0; j < count; ++j) {
        const bool stays = dropout::bits(keys, static_cast<uint32_t>(j)) >= args.drop_threshold;
        const Scalar f = stays ? kept : 0;
        factor[j] = has_top_k ? factor[j] * f : f;
      }
    }
    *has_factor = has_top_k || args.seed != nullptr;
    return 1 / total;
  }

  // From a row of products with keys to what the values' rows were weighted by, and from a row of
  // products of dout with values to the gradient of the products with keys; both in place, and 0
  // from `visible` up to `end`.
  void softmax_backward(Scalar* p, Scalar* ds, int64_t t, int64_t end, Scalar* factor) const {
    const int64_t count = visible(t);
    // the scores again, and their softmax from them: from a rounded log-sum-exp, a one-hot row
    // would not cancel exactly
    bool has_factor;
    const auto inverse = S::set(softmax(p, t, end, factor, &has_factor));
    auto sum = S::zero();
    vectors<S, RoomyPart>(count, [&](int64_t j, auto part) __attribute__((always_inline)) {
      const auto x = get<S>(p + j, part) * inverse;
      put<S>(p + j, x, part);
      auto d = get<S>(ds + j, part);
      if (has_factor) d = d * get<S>(factor + j, part);
      put<S>(ds + j, d, part);
      sum = sum + keep<S>(d * x, S::zero(), part);
    });
    const auto delta = S::set(S::sum(sum)), scale = S::set(static_cast<Scalar>(args.scale));
    vectors<S, RoomyPart>(count, [&](int64_t j, auto part) __attribute__((always_inline)) {
      const auto x = get<S>(p + j, part);
      put<S>(ds + j, (get<S>(ds + j, part) - delta) * x * scale, part);
      if (has_factor) {
        put<S>(p + j, keep<S>(x * get<S>(factor + j, part), S::zero(), part), part);
      }
    });
    for (int64_t j = count; j < end; ++j) ds[j] = 0;
  }
};

// How the query blocks of every (batch, head) are shared out.
template <class S>
struct Split {
  int64_t block_rows, blocks, ranges, items;

  explicit Split(const MemoryAttention& args) {
    const int64_t rows = kBlockElements / round_up(args.slots, 2 * S::kLanes);
    block_rows = larger<int64_t>(S::kRows, smaller(kBlockRows, rows / S::kRows * S::kRows));
    blocks = (args.tokens + block_rows - 1) / block_rows;
    const int64_t heads = args.batch * args.heads;
    // two blocks at least: each item packs keys and values for itself
    const int64_t most = larger<int64_t>(1, blocks / 2);
    ranges = smaller(most, (kItems + heads - 1) / heads);
    items = heads * ranges;
  }
};

// Slots whose rows a pass over a few rows reads together: as many streams from memory.
constexpr int kTogether = 4;

// Calls body(j, Count<n>) for every n = kTogether neighbours of the slots [begin, end) that all
// take part, and for every other slot that does with n = 1.
template <class S, class T, class F>
LM2_INLINE void slots_that_take_part(const Head<S, T>& head, int64_t begin, int64_t end,
                                     const F& body) {
  for (int64_t j = begin; j < end;) {
    bool all = j + kTogether <= end;
    for (int i = 0; all && i < kTogether; ++i) all = head.takes_part(j + i);
    if (all) {
      body(j, Count<kTogether>{});
    } else if (head.takes_part(j)) {
      body(j, Count<1>{});
    }
    j += all ? kTogether : 1;
  }
}

// result[j] = the product of `vector` with slot j's row; 0 where the slot takes no part.
template <class S, class T>
static void products_with_rows(const Head<S, T>& head, const View& view,
                               const typename S::Scalar* vector, int64_t count,
                               typename S::Scalar* result) {
  const T* const rows = head.rows(view);
  if (head.mask != nullptr) {
    for (int64_t j = 0; j < count; ++j) result[j] = 0;
  }
  slots_that_take_part(head, 0, count, [&](int64_t j, auto number) {
    constexpr int kNumber = decltype(number)::value;
    const T* const first = rows + j * view.row_stride;
    typename S::V dot[kNumber];
    for (int i = 0; i < kNumber; ++i) dot[i] = S::zero();
    vectors<S>(head.width, [&](int64_t k, auto part) __attribute__((always_inline)) {
      const auto x = get<S>(vector + k, part);
      for (int i = 0; i < kNumber; ++i) {
        dot[i] = S::fma(x, get<S>(first + i * view.row_stride + k, part), dot[i]);
      }
    });
    for (int i = 0; i < kNumber; ++i) result[j + i] = S::sum(dot[i]);
  });
}

// The sum of the slots' rows, each times its weight. Has its own scratch, good until the next call.
template <class S, class T>
static const typename S::Scalar* sum_of_rows(const Head<S, T>& head, const View& view,
                                             const typename S::Scalar* weights, int64_t count) {
  using Scalar = typename S::Scalar;
  const T* const rows = head.rows(view);
  Scalar* const total = scratch_of<S>(kResult, 2 * head.padded_width);
  Scalar* const chain = total + head.padded_width;
  for (int64_t k = 0; k < head.width; ++k) total[k] = 0;
  for (int64_t start = 0; start < count; start += kChain) {
    Scalar* const sum = start == 0 ? total : chain;
    for (int64_t k = 0; k < head.width; ++k) sum[k] = 0;
    const int64_t end = smaller(start + kChain, count);
    slots_that_take_part(head, start, end, [&](int64_t j, auto number) {
      constexpr int kNumber = decltype(number)::value;
      const T* const first = rows + j * view.row_stride;
      vectors<S>(head.width, [&](int64_t k, auto part) __attribute__((always_inline)) {
        auto x = get<S>(sum + k, part);
        for (int i = 0; i < kNumber; ++i) {
          x = S::fma(S::set(weights[j + i]), get<S>(first + i * view.row_stride + k, part), x);
        }
        put<S>(sum + k, x, part);
      });
    });
    if (sum != total) accumulate<S>(total, sum, head.width);
  }
  return total;
}

// A few rows, one at a time and straight from where keys and values lie.
template <class S, class T>
static void forward_few(const MemoryAttentionForward& args) {
  using Scalar = typename S::Scalar;
  parallel(args.batch * args.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const Head<S, T> head(args, item);
      Scalar* const row = scratch_of<S>(kScores, head.padded_slots);
      Scalar* const factor = scratch_of<S>(kFactor, head.padded_slots);
      Scalar* const query = scratch_of<S>(kQueries, head.width);
      for (int64_t t = 0; t < args.tokens; ++t) {
        const int64_t count = head.visible(t);
        widen<S>(head.rows(args.query) + t * args.query.row_stride, query, head.width);
        products_with_rows(head, args.key, query, count, row);
        bool has_factor;
        const Scalar inverse = head.softmax(row, t, count, factor, &has_factor);
        for (int64_t j = 0; has_factor && j < count; ++j) row[j] *= factor[j];
        head.put_row(sum_of_rows(head, args.value, row, count), inverse, args.out, t);
      }
    }
  });
}

template <class S, class T>
static void attention_forward(const MemoryAttentionForward& args) {
  using Scalar = typename S::Scalar;
  // backward has whole rows of scores, and wants nothing
  const int64_t rows = args.batch * args.heads * args.tokens;
  std::memset(args.statistics, 0, 2 * rows * sizeof(Scalar));
  if (args.tokens <= kFewRows) return forward_few<S, T>(args);
  const Split<S> split(args);
  parallel(split.items, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const Head<S, T> head(args, item / split.ranges);
      constexpr int64_t kPanel = Head<S, T>::kPanel;
      const int64_t seen = head.visible(args.tokens - 1);
      Scalar* const keys = scratch_of<S>(kKeyPanels, head.padded_slots * head.row_words);
      Scalar* const values = scratch_of<S>(kValuePanels, words<S, T>(seen) * head.padded_width);
      head.pack_transposed(args.key, seen, keys);
      head.pack(args.value, 0, seen, true, values);
      // not a power of two: rows that far apart would share one set of the first cache
      const int64_t stride = head.padded_slots + S::kLanes;
      Scalar* const scores = scratch_of<S>(kScores, split.block_rows * stride);
      Scalar* const factor = scratch_of<S>(kFactor, head.padded_slots);
      Scalar* const result = scratch_of<S>(kResult, kBlockRows * head.padded_width);
      for (int64_t block = item % split.ranges; block < split.blocks; block += split.ranges) {
        const int64_t first = block * split.block_rows;
        const int64_t rows = smaller(split.block_rows, args.tokens - first);
        const int64_t slots = head.visible(first + rows - 1), padded = round_up(slots, kPanel);
        const Scalar* const query = head.dense(args.query, first, rows, kQueries);
        multiply<S, T>(rows, padded, head.row_words, query, head.row_words, 1, keys,
                       head.row_words * kPanel, scores, stride, false);
        Scalar inverse[kBlockRows];
        for (int64_t i = 0; i < rows; ++i) {
          Scalar* const row = scores + i * stride;
          bool has_factor;
          inverse[i] =
              head.softmax(row, first + i, kTerms<S, T> == 2 ? padded : slots, factor, &has_factor);
          const int64_t count = has_factor ? head.visible(first + i) : 0;
          for (int64_t j = 0; j < count; ++j) row[j] *= factor[j];
        }
        int64_t weight_stride;
        const Scalar* weights = head.by_slots(scores, rows, stride, slots, &weight_stride);
        multiply<S, T>(rows, head.padded_width, words<S, T>(slots), weights, weight_stride, 1,
                       values, words<S, T>(seen) * kPanel, result, head.padded_width, false);
        for (int64_t i = 0; i < rows; ++i) {
          head.put_row(result + i * head.padded_width, inverse[i], args.out, first + i);
        }
      }
    }
  });
}

// The gradient of one (batch, head) from some of its query blocks: dquery's rows are final, dkey
// and dvalue (padded slots, padded width) are this item's part.
template <class S, class T>
static void backward_item(const MemoryAttentionBackward& args, const Head<S, T>& head,
                          const Split<S>& split, int64_t range, typename S::Scalar* dkey,
                          typename S::Scalar* dvalue) {
  using Scalar = typename S::Scalar;
  constexpr int64_t kPanel = Head<S, T>::kPanel;
  const bool needs_dquery = args.dquery != nullptr, needs_bank = dkey != nullptr;
  const int64_t seen = head.visible(args.tokens - 1);
  const int64_t width = head.padded_width, stride = head.padded_slots + S::kLanes;
  Scalar* const keys = scratch_of<S>(kKeyPanels, head.padded_slots * head.row_words);
  Scalar* const values = scratch_of<S>(kValuePanels, head.padded_slots * head.row_words);
  head.pack_transposed(args.key, seen, keys);
  head.pack_transposed(args.value, seen, values);
  Scalar* const key_rows =
      needs_dquery ? scratch_of<S>(kKeyRows, words<S, T>(seen) * width) : nullptr;
  if (needs_dquery) head.pack(args.key, 0, seen, true, key_rows);
  Scalar* const scores = scratch_of<S>(kScores, split.block_rows * stride);
  Scalar* const dscores = scratch_of<S>(kDscores, split.block_rows * stride);
  Scalar* const factor = scratch_of<S>(kFactor, head.padded_slots);
  Scalar* const result = scratch_of<S>(kResult, kBlockRows * width);
  Scalar* const query_panels = scratch_of<S>(kQueryPanels, kBlockRows * width);
  Scalar* const dout_panels = scratch_of<S>(kDoutPanels, kBlockRows * width);
  for (int64_t block = range; block < split.blocks; block += split.ranges) {
    const int64_t first = block * split.block_rows;
    const int64_t rows = smaller(split.block_rows, args.tokens - first);
    const int64_t slots = head.visible(first + rows - 1);
    const int64_t padded = round_up(slots, kPanel);
    // what the products over slots read
    const int64_t end = kTerms<S, T> == 2 ? padded : slots;
    const Scalar* const query = head.dense(args.query, first, rows, kQueries);
    const Scalar* const dout = head.dense(args.dout, first, rows, kDout);
    multiply<S, T>(rows, padded, head.row_words, query, head.row_words, 1, keys,
                   head.row_words * kPanel, scores, stride, false);
    multiply<S, T>(rows, padded, head.row_words, dout, head.row_words, 1, values,
                   head.row_words * kPanel, dscores, stride, false);
    for (int64_t i = 0; i < rows; ++i) {
      head.softmax_backward(scores + i * stride, dscores + i * stride, first + i, end, factor);
    }
    if (needs_dquery) {
      int64_t word_stride;
      const Scalar* const ds = head.by_slots(dscores, rows, stride, slots, &word_stride);
      multiply<S, T>(rows, width, words<S, T>(slots), ds, word_stride, 1, key_rows,
                     words<S, T>(seen) * kPanel, result, width, false);
      for (int64_t i = 0; i < rows; ++i) {
        head.put_row(result + i * width, 1, args.dquery, first + i);
      }
    }
    if (needs_bank) {
      head.pack(args.query, first, rows, false, query_panels);
      head.pack(args.dout, first, rows, false, dout_panels);
      const int64_t depth = words<S, T>(rows);
      multiply<S, T>(slots, width, depth, head.by_rows(scores, rows, stride, slots), 1, stride,
                     dout_panels, depth * kPanel, dvalue, width, true);
      multiply<S, T>(slots, width, depth, head.by_rows(dscores, rows, stride, slots), 1, stride,
                     query_panels, depth * kPanel, dkey, width, true);
    }
  }
}

// One slot's rows of dkey and dvalue, to the dtype and layout of the result.
template <class S, class T>
static void put_bank(const MemoryAttentionBackward& args, int64_t batch_and_head, int64_t slot,
                     const typename S::Scalar* dkey, const typename S::Scalar* dvalue) {
  const int64_t b = batch_and_head / args.heads, h = batch_and_head % args.heads;
  const int64_t index = b * args.slots + slot, size = args.heads * args.width;
  T* const row =
      static_cast<T*>(args.dkey_value) + (args.apart ? index : 2 * index) * size + h * args.width;
  narrow<S>(dkey, row, args.width);
  narrow<S>(dvalue, row + (args.apart ? args.batch * args.slots * size : size), args.width);
}

// The gradient of a few rows: as forward_few, and a slot's row of dkey and of dvalue is a sum of as
// many terms.
template <class S, class T>
static void backward_few(const MemoryAttentionBackward& args) {
  using Scalar = typename S::Scalar;
  parallel(args.batch * args.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const Head<S, T> head(args, item);
      const int64_t width = head.width;
      Scalar* const scores = scratch_of<S>(kScores, args.tokens * head.padded_slots);
      Scalar* const dscores = scratch_of<S>(kDscores, args.tokens * head.padded_slots);
      Scalar* const factor = scratch_of<S>(kFactor, head.padded_slots);
      Scalar* const queries = scratch_of<S>(kQueries, args.tokens * width);
      Scalar* const douts = scratch_of<S>(kDout, args.tokens * width);
      for (int64_t t = 0; t < args.tokens; ++t) {
        Scalar* const p = scores + t * head.padded_slots;
        Scalar* const ds = dscores + t * head.padded_slots;
        widen<S>(head.rows(args.query) + t * args.query.row_stride, queries + t * width, width);
        widen<S>(head.rows(args.dout) + t * args.dout.row_stride, douts + t * width, width);
        const int64_t count = head.visible(t);
        products_with_rows(head, args.key, queries + t * width, count, p);
        products_with_rows(head, args.value, douts + t * width, count, ds);
        head.softmax_backward(p, ds, t, args.slots, factor);
        if (args.dquery == nullptr) continue;
        head.put_row(sum_of_rows(head, args.key, ds, count), 1, args.dquery, t);
      }
      if (args.dkey_value == nullptr) continue;
      Scalar* const dkey = scratch_of<S>(kDkey, width);
      Scalar* const dvalue = scratch_of<S>(kDvalue, width);
      for (int64_t j = 0; j < args.slots; ++j) {
        // no others: their weight is 0, and 0 * NaN is NaN
        const int64_t first = head.takes_part(j) ? head.first_token(j) : args.tokens;
        vectors<S>(width, [&](int64_t k, auto part) __attribute__((always_inline)) {
          auto dk = S::zero(), dv = S::zero();
          for (int64_t t = first; t < args.tokens; ++t) {
            const int64_t at = t * head.padded_slots + j;
            dk = S::fma(S::set(dscores[at]), get<S>(queries + t * width + k, part), dk);
            dv = S::fma(S::set(scores[at]), get<S>(douts + t * width + k, part), dv);
          }
          put<S>(dkey + k, dk, part);
          put<S>(dvalue + k, dv, part);
        });
        put_bank<S, T>(args, item, j, dkey, dvalue);
      }
    }
  });
}

template <class S, class T>
static void attention_backward(const MemoryAttentionBackward& args) {
  using Scalar = typename S::Scalar;
  if (args.tokens <= kFewRows) return backward_few<S, T>(args);
  const Split<S> split(args);
  const bool needs_bank = args.dkey_value != nullptr;
  const int64_t width = round_up(args.width, 2 * S::kLanes);
  const int64_t bank = args.slots * width;  // elements of dkey, or dvalue, of one head
  // with one range a head, its thread's scratch will do
  const bool has_parts = needs_bank && split.ranges > 1;
  const Shared parts(has_parts ? split.items * 2 * bank * sizeof(Scalar) : 0);
  parallel(split.items, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const Head<S, T> head(args, item / split.ranges);
      Scalar *dkey = nullptr, *dvalue = nullptr;
      if (has_parts) {
        dkey = static_cast<Scalar*>(parts.memory) + item * 2 * bank;
        dvalue = dkey + bank;
      } else if (needs_bank) {
        dkey = scratch_of<S>(kDkey, bank);
        dvalue = scratch_of<S>(kDvalue, bank);
      }
      if (needs_bank) {
        std::memset(dkey, 0, bank * sizeof(Scalar));
        std::memset(dvalue, 0, bank * sizeof(Scalar));
      }
      backward_item<S, T>(args, head, split, item % split.ranges, dkey, dvalue);
      for (int64_t j = 0; needs_bank && !has_parts && j < args.slots; ++j) {
        put_bank<S, T>(args, item / split.ranges, j, dkey + j * width, dvalue + j * width);
      }
    }
  });
  if (!has_parts) return;
  const int64_t rows = args.batch * args.heads * args.slots;
  parallel(
      rows, larger<int64_t>(1, kGrain / (split.ranges * width)), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t head = row / args.slots, slot = row % args.slots;
          Scalar* const first =
              static_cast<Scalar*>(parts.memory) + head * split.ranges * 2 * bank + slot * width;
          for (int64_t range = 1; range < split.ranges; ++range) {
            accumulate<S>(first, first + range * 2 * bank, width);
            accumulate<S>(first + bank, first + bank + range * 2 * bank, width);
          }
          put_bank<S, T>(args, head, slot, first, first + bank);
        }
      });
}

template <class S>
void memory_attention_forward(const MemoryAttentionForward& args) {
  if constexpr (sizeof(typename S::Scalar) == 8) {
    attention_forward<S, double>(args);
  } else if (args.dtype == Dtype::bfloat16) {
    attention_forward<S, bfloat16>(args);
  } else if (args.dtype == Dtype::float16) {
    attention_forward<S, float16>(args);
  } else {
    attention_forward<S, float>(args);
  }
}

template <class S>
void memory_attention_backward(const MemoryAttentionBackward& args) {
  if constexpr (sizeof(typename S::Scalar) == 8) {
    attention_backward<S, double>(args);
  } else if (args.dtype == Dtype::bfloat16) {
    attention_backward<S, bfloat16>(args);
  } else if (args.dtype == Dtype::float16) {
    attention_backward<S, float16>(args);
  } else {
    attention_backward<S, float>(args);
  }
}

}  // namespace
}  // namespace lm2::cpu
