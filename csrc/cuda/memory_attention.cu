// memory_attention in CUDA C++: forward and backward, bf16, fp16 (tensor cores) and exact float32.
//
// Every pass has one form: a block owns some rows of one (batch, head), 16 a warp, of queries or of
// slots, loops over tiles of the other kind, computes the tile's scores S from the two, turns them
// into weights W, and adds W Y to what it owns:
//
//   pass      owns      other     W                        Y
//   forward   queries   slots     P, by online softmax     V
//   delta     queries   slots     none: row sums of P and of P * dP (float32 only)
//   dquery    queries   slots     dS = P (dP - delta)      K
//   dkey      slots     queries   dS^T                     Q
//   dvalue    slots     queries   (P * dropout)^T          dO
//
// with dP = dO V^T; dkey and dvalue are one pass where there are registers for both results.
// Nothing is shared between blocks: no atomics, and the same bits every time.
//
// For few slots a block has no more warps than its rows need, and a tile leaves out groups of 8
// slots past the last one. dkey and dvalue are one launch; where that would be too few blocks to
// fill a GPU, each block takes a part of the tokens, and another kernel adds up the parts' sums.
//
// P comes from two numbers a row that the forward pass leaves: the largest visible product q k, and
// the logarithm of the sum of exp(scale (q k - largest)). Every pass adds up the terms of a product
// in one order, so that the largest one is found again bit for bit.
// In float32 delta is the row sum of P * dP, so that a one-hot row cancels as in a plain softmax;
// in 16 bits it is rowsum(dO * O).
//
// Layout: (B, T or N, H, K) by strides; tiles lie in shared memory, zero where a slot is masked or
// a row or column is not there.
#include <algorithm>

#include "../dropout.h"
#include "cuda.h"
#include "simt.h"

namespace lm2::cuda {
namespace {

// Below it a scale is 0: float32's least normal number.
constexpr double kLeastScale = 0x1p-126;

// What fills a GPU of 108 to 148 multiprocessors: 8 warps on each, for which its registers suffice.
constexpr int64_t kWarpsInFlight = 8 * 132;
// A part has so many tokens or more, and there are so many parts or none: fewer would not be worth
// adding up the sums, which takes another launch.
constexpr int64_t kLeastTokens = 128, kLeastParts = 4;

// the last is the two before it
enum class Pass { forward, delta, dquery, dkey, dvalue, dkey_value };

// Whether a pass computes dP, and so owns rows of two tensors.
constexpr bool needs_dp(Pass pass) { return pass != Pass::forward && pass != Pass::dvalue; }

// What a kernel is given beside the arguments of the op.
struct Job {
  MemoryAttention args;
  View dout;
  const float* statistics;  // (B, H, 2, T)
  float* new_statistics;    // where the forward pass writes them
  float* delta;             // (B, H, T)
  void* result;             // out, dquery or dkey_value
  int64_t parts;            // of the tokens, for dkey and dvalue
  int64_t part_tokens;      // of each part but the last, a multiple of every kOther
  float* sums;              // (B, parts, N, 2, H, K), where there is more than one part
  bool vectors;             // rows start at multiples of 16 bytes and are whole ones
  int stages;               // 2 where tiles are copied a step ahead of what is computed
};

template <class T, int kWidth>
struct Tiles {
  static constexpr bool kIsFloat = sizeof(T) == 4;
  // at most: blocks that own fewer rows have fewer
  static constexpr int kWarps = kIsFloat ? (kWidth == 256 ? 1 : 2) : 4;
  static constexpr int kOther = kIsFloat ? (kWidth == 256 ? 8 : 16) : (kWidth == 256 ? 16 : 32);
  // 16 bytes more than a power of two: rows start in different banks
  static constexpr int kStride = kWidth + 16 / static_cast<int>(sizeof(T));
  // of what is left out where a tile ends early: the products with weights take 16 rows
  static constexpr int kUnit = kIsFloat ? 8 : 16;
  static_assert(kOther % kUnit == 0);
  // dkey and dvalue in one pass, where there are registers for both results
  static constexpr bool kMerged = !kIsFloat && kWidth < 256;

  // Of a block where tiles of this many stages are loaded: one stage is what sm_75 has, with 64 KiB
  // of shared memory a block.
  static constexpr int most_warps(int stages) {
    return kWidth == 256 && !kIsFloat && stages == 1 ? 2 : kWarps;
  }

  static constexpr int bytes(int warps, bool owns_two, int stages) {
    const int rows = (owns_two ? 2 : 1) * 16 * warps + 2 * stages * kOther;
    // float32 hands its weights from lane to lane through memory
    const int weights = kIsFloat ? 16 * warps * (kOther + 1) : 0;
    return (rows * kStride + weights) * static_cast<int>(sizeof(T));
  }
  static_assert(bytes(most_warps(1), true, 1) <= 64 * 1024);
  // what sm_86, sm_89 and sm_120 have
  static_assert(kIsFloat || bytes(most_warps(2), true, 2) <= 99 * 1024);
};

__device__ __forceinline__ int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__device__ __forceinline__ int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// The rows of one (batch, head) in global memory.
template <class T>
struct Rows {
  const T* start;
  int64_t stride, count;
  int width;
  const uint8_t* mask;  // null: all of them count
  int64_t mask_stride;

  __device__ __forceinline__ Rows(const Job& job, const View& view, int64_t b, int64_t h,
                                  bool are_slots)
      : start(static_cast<const T*>(view.data) + b * view.batch_stride + h * view.head_stride),
        stride(view.row_stride),
        count(are_slots ? job.args.slots : job.args.tokens),
        width(static_cast<int>(job.args.width)),
        mask(are_slots && job.args.slot_mask != nullptr
                 ? job.args.slot_mask + b * job.args.mask_batch_stride
                 : nullptr),
        mask_stride(job.args.mask_slot_stride) {}

  // 0 * NaN is NaN: a masked slot must not come near.
  __device__ __forceinline__ bool has(int64_t row, int column) const {
    return column < width && row < count && (mask == nullptr || mask[row * mask_stride] != 0);
  }

  __device__ __forceinline__ const T* at(int64_t row, int column) const {
    return start + row * stride + column;
  }
};

// Rows [first, first + rows) into shared memory, zeros where there are none, a Unit at a time.
template <class Unit, class T, int kWidth>
__device__ __forceinline__ void load_units(T* tile, const Rows<T>& source, int64_t first,
                                           int rows) {
  constexpr int kStride = Tiles<T, kWidth>::kStride;
  constexpr int kUnit = static_cast<int>(sizeof(Unit) / sizeof(T)), kUnits = kWidth / kUnit;
  // a thread's loads in flight: a block of one warp has many, and nobody else to hide them
  constexpr int kBatch = 4;
  const int threads = blockDim.x;
  for (int start = threadIdx.x; start < rows * kUnits; start += kBatch * threads) {
    Unit batch[kBatch] = {};
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = start + j * threads, row = i / kUnits, column = i % kUnits * kUnit;
      if (row < rows && source.has(first + row, column)) {
        batch[j] = *reinterpret_cast<const Unit*>(source.at(first + row, column));
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = start + j * threads, row = i / kUnits, column = i % kUnits * kUnit;
      if (row < rows) *reinterpret_cast<Unit*>(tile + row * kStride + column) = batch[j];
    }
  }
}

// The same by copies that land later.
template <class T, int kWidth>
__device__ __forceinline__ void copy_units(T* tile, const Rows<T>& source, int64_t first,
                                           int rows) {
  constexpr int kUnit = 16 / static_cast<int>(sizeof(T)), kUnits = kWidth / kUnit;
  for (int i = threadIdx.x; i < rows * kUnits; i += blockDim.x) {
    const int row = i / kUnits, column = i % kUnits * kUnit;
    const bool there = source.has(first + row, column);
    lm2_copy_async(tile + row * Tiles<T, kWidth>::kStride + column,
                   there ? source.at(first + row, column) : source.start, there);
  }
}

template <class T, int kWidth>
__device__ __forceinline__ void load_tile(T* tile, const Job& job, const View& view, int64_t b,
                                          int64_t h, int64_t first, int rows, bool are_slots) {
  const Rows<T> source(job, view, b, h, are_slots);
  if (!job.vectors) {
    load_units<T, T, kWidth>(tile, source, first, rows);
    return;
  }
  if constexpr (!Tiles<T, kWidth>::kIsFloat) {
    if (job.stages > 1) {
      copy_units<T, kWidth>(tile, source, first, rows);
      return;
    }
  }
  load_units<float4, T, kWidth>(tile, source, first, rows);
}

// Whether a tile that ends after `count` rows reaches the row `start`. All threads agree.
__device__ __forceinline__ bool reaches(int start, int count) {
  return start == 0 || start < count;
}

template <class T>
__device__ __forceinline__ uint32_t as_pair(T low, T high) {
  union {
    T values[2];
    uint32_t bits;
  } pair;
  pair.values[0] = low;
  pair.values[1] = high;
  return pair.bits;
}

// sum (16 x kOther) = owned rows times the first `count` other rows, over the head's width; 0 for
// whole groups of 8 past them.
template <class T, int kWidth>
__device__ __forceinline__ void scores_of(float (&sum)[Tiles<T, kWidth>::kOther / 8][4],
                                          const T* owned, const T* other, int count) {
  using Tile = Tiles<T, kWidth>;
  constexpr int kStride = Tile::kStride, kTiles = Tile::kOther / 8;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0.0f;
  if constexpr (Tile::kIsFloat) {
    const int g = lane / 4, t = lane % 4;
    // a chain of 32 terms at a time: shorter chains round less
    for (int start = 0; start < kWidth; start += 32) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (!reaches(8 * n, count)) continue;
        float part[4] = {};
        for (int k = start; k < start + 32; ++k) {
          const float a0 = owned[g * kStride + k], a1 = owned[(g + 8) * kStride + k];
          const float b0 = other[(8 * n + 2 * t) * kStride + k];
          const float b1 = other[(8 * n + 2 * t + 1) * kStride + k];
          part[0] = fmaf(a0, b0, part[0]);
          part[1] = fmaf(a0, b1, part[1]);
          part[2] = fmaf(a1, b0, part[2]);
          part[3] = fmaf(a1, b1, part[3]);
        }
        for (int i = 0; i < 4; ++i) sum[n][i] += part[i];
      }
    }
  } else {
    // the rows that this lane names of the left operand, and of two tiles of the right one
    const T* const left = owned + lane % 16 * kStride + lane / 16 * 8;
    const T* const right = other + (lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8;
#pragma unroll 4
    for (int k = 0; k < kWidth; k += 16) {
      uint32_t a[4];
      lm2_load_matrices<false>(a, left + k);
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        if (!reaches(8 * n, count)) continue;
        uint32_t b[4];
        lm2_load_matrices<false>(b, right + 8 * n * kStride + k);
        lm2_mma_m16n8k16<T>(sum[n], a, {b[0], b[1]});
        // of whole groups past the last row there are 0s, whatever lies there
        if (reaches(8 * (n + 1), count)) lm2_mma_m16n8k16<T>(sum[n + 1], a, {b[2], b[3]});
      }
    }
  }
}

// result (16 x kWidth) += weights (16 x kOther) times other rows, in whole units up to `count`.
template <class T, int kWidth>
__device__ __forceinline__ void add_weighted(
    float (&result)[kWidth / 8][4], const float (&weights)[Tiles<T, kWidth>::kOther / 8][4],
    const T* other, int count, float* shared_weights) {
  using Tile = Tiles<T, kWidth>;
  constexpr int kStride = Tile::kStride, kOther = Tile::kOther;
  const int lane = threadIdx.x % 32;
  if constexpr (Tile::kIsFloat) {
    const int g = lane / 4, t = lane % 4;
    float* const w = shared_weights + threadIdx.x / 32 * 16 * (kOther + 1);
    __syncwarp();
#pragma unroll
    for (int n = 0; n < kOther / 8; ++n) {
      for (int i = 0; i < 4; ++i) {
        w[(g + i / 2 * 8) * (kOther + 1) + 8 * n + 2 * t + i % 2] = weights[n][i];
      }
    }
    __syncwarp();
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) {
      float part[4] = {};
#pragma unroll
      for (int start = 0; start < kOther; start += 8) {
        if (!reaches(start, count)) continue;
        for (int k = start; k < start + 8; ++k) {
          const float a0 = w[g * (kOther + 1) + k], a1 = w[(g + 8) * (kOther + 1) + k];
          const float b0 = other[k * kStride + 8 * n + 2 * t];
          const float b1 = other[k * kStride + 8 * n + 2 * t + 1];
          part[0] = fmaf(a0, b0, part[0]);
          part[1] = fmaf(a0, b1, part[1]);
          part[2] = fmaf(a1, b0, part[2]);
          part[3] = fmaf(a1, b1, part[3]);
        }
      }
      for (int i = 0; i < 4; ++i) result[n][i] += part[i];
    }
  } else {
#pragma unroll
    for (int k = 0; k < kOther; k += 16) {
      if (!reaches(k, count)) continue;
      // where a product's result lies is where the next one's left operand is wanted
      const auto& low = weights[k / 8];
      const auto& high = weights[k / 8 + 1];
      const uint32_t a[4] = {as_pair(from_float<T>(low[0]), from_float<T>(low[1])),
                             as_pair(from_float<T>(low[2]), from_float<T>(low[3])),
                             as_pair(from_float<T>(high[0]), from_float<T>(high[1])),
                             as_pair(from_float<T>(high[2]), from_float<T>(high[3]))};
      const T* const right = other + (k + lane % 16) * kStride + lane / 16 * 8;
#pragma unroll
      for (int n = 0; n < kWidth / 8; n += 2) {
        uint32_t b[4];
        lm2_load_matrices<true>(b, right + 8 * n);
        lm2_mma_m16n8k16<T>(result[n], a, {b[0], b[1]});
        lm2_mma_m16n8k16<T>(result[n + 1], a, {b[2], b[3]});
      }
    }
  }
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

template <class T>
__device__ __forceinline__ float exponential(float x) {
  // the fast one is right to well below a 16-bit rounding
  return sizeof(T) == 4 ? expf(x) : __expf(x);
}

// Per token what the backward passes need of it.
struct Token {
  float largest, log_sum, delta;
  dropout::RowKeys keys;
};

template <class T, int kWidth, Pass kPass>
__device__ __forceinline__ void attention(const Job& job) {
  using Tile = Tiles<T, kWidth>;
  constexpr int kOther = Tile::kOther, kStride = Tile::kStride;
  const bool ahead = !Tile::kIsFloat && job.stages > 1;
  constexpr bool kMerged = kPass == Pass::dkey_value;
  constexpr bool kOwnsSlots = kPass == Pass::dkey || kPass == Pass::dvalue || kMerged;
  constexpr bool kNeedsDp = needs_dp(kPass);
  const MemoryAttention& args = job.args;
  const int own_rows = 16 * static_cast<int>(blockDim.x / 32);
  LM2_DYNAMIC_SHARED(T, shared);
  T* const owned1 = shared;                                  // Q, or K
  T* const owned2 = owned1 + kNeedsDp * own_rows * kStride;  // dO, or V, where it is needed
  T* const others = owned2 + own_rows * kStride;             // (stages, 2): K and V, or Q and dO
  constexpr int kTile = kOther * kStride;
  float* const weights_memory = reinterpret_cast<float*>(others + 2 * kTile);

  const int64_t owned_count = kOwnsSlots ? args.slots : args.tokens;
  const int64_t blocks = divide_up(owned_count, own_rows);
  const int64_t parts = kOwnsSlots ? job.parts : 1, part = blockIdx.x / blocks % parts;
  const int64_t head_index = blockIdx.x / blocks / parts;
  const int64_t b = head_index / args.heads, h = head_index % args.heads;
  // those with most to do first: the last tokens see the most slots, the first slots are seen most
  const int64_t block = blockIdx.x % blocks;
  const int64_t first = (kOwnsSlots ? block : blocks - 1 - block) * own_rows;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;

  load_tile<T, kWidth>(owned1, job, kOwnsSlots ? args.key : args.query, b, h, first, own_rows,
                       kOwnsSlots);
  if constexpr (kNeedsDp) {
    load_tile<T, kWidth>(owned2, job, kOwnsSlots ? args.value : job.dout, b, h, first, own_rows,
                         kOwnsSlots);
  }

  // its sign is put on the product; of a scale of 0 too, as 0 times what is hidden, -inf, is NaN
  const float sign = args.scale >= kLeastScale ? 1.0f : args.scale <= -kLeastScale ? -1.0f : 0.0f;
  const float scale = sign == 0.0f ? 1.0f : static_cast<float>(fabs(args.scale));
  const int64_t first_row = head_index * args.tokens;
  const auto token_of = [&](int64_t index) {
    Token token = {0.0f, 0.0f, 0.0f, {0, 0}};
    if (index >= args.tokens) return token;
    if constexpr (kPass != Pass::forward) {
      const float* const row = job.statistics + 2 * first_row + index;
      token.largest = row[0];
      token.log_sum = row[args.tokens];
      if constexpr (kNeedsDp && kPass != Pass::delta) token.delta = job.delta[first_row + index];
    }
    if (args.seed != nullptr) token.keys = dropout::row_keys(*args.seed, first_row + index);
    return token;
  };
  // of the two owned rows of this thread; of the other kind they change from tile to tile
  Token tokens[2];
  if constexpr (!kOwnsSlots) {
    for (int i = 0; i < 2; ++i) tokens[i] = token_of(first + 16 * warp + g + 8 * i);
  }

  // merged: dkey, and then dvalue
  float result[kMerged ? 2 : 1][kPass == Pass::delta ? 1 : kWidth / 8][4] = {};
  // forward: the running maximum and sum; delta: the sums of P and of P * dP
  float running[2][2] = {{kPass == Pass::forward ? -INFINITY : 0.0f, 0.0f},
                         {kPass == Pass::forward ? -INFINITY : 0.0f, 0.0f}};

  // forward: whether a row sees any slot
  bool seen[2] = {false, false};

  int64_t begin = 0, end = args.slots;
  if constexpr (kOwnsSlots) {
    begin = part * job.part_tokens;
    end = smaller(begin + job.part_tokens, args.tokens);
  }
  if (args.causal) {
    if constexpr (kOwnsSlots) {
      begin = larger(begin, (first - args.slot_offset) / kOther * kOther);
    } else {
      end = smaller(end, args.slot_offset + smaller(first + own_rows, args.tokens));
    }
  }
  const auto count_of = [&](int64_t tile) { return static_cast<int>(smaller(kOther, end - tile)); };
  const auto load_others = [&](int64_t tile, T* other) {
    const int rows = (count_of(tile) + Tile::kUnit - 1) / Tile::kUnit * Tile::kUnit;
    load_tile<T, kWidth>(other + kTile, job, kOwnsSlots ? job.dout : args.value, b, h, tile, rows,
                         !kOwnsSlots);
    load_tile<T, kWidth>(other, job, kOwnsSlots ? args.query : args.key, b, h, tile, rows,
                         !kOwnsSlots);
    if (ahead) lm2_copies_end();
  };
  if (ahead) {
    if (begin < end) {
      load_others(begin, others);
    } else {
      lm2_copies_end();
    }
  }
  int stage = 0;
  for (int64_t tile = begin; tile < end; tile += kOther) {
    const int count = count_of(tile);
    T* const other1 = others + stage * 2 * kTile;  // K, or Q
    T* const other2 = other1 + kTile;              // V, or dO
    if (ahead) {
      stage ^= 1;
      if (tile + kOther < end) {
        load_others(tile + kOther, others + stage * 2 * kTile);
        lm2_copies_landed<1>();
      } else {
        lm2_copies_landed<0>();
      }
    } else {
      load_others(tile, others);
    }
    __syncthreads();
    float s[kOther / 8][4];
    scores_of<T, kWidth>(s, owned1 + 16 * warp * kStride, other1, count);
    float dp[kNeedsDp ? kOther / 8 : 1][4];
    if constexpr (kNeedsDp) {
      scores_of<T, kWidth>(dp, owned2 + 16 * warp * kStride, other2, count);
    }
    const float factor = static_cast<float>(args.scale);
    const float keep_factor = static_cast<float>(args.keep_factor);
#pragma unroll
    for (int n = 0; n < kOther / 8; ++n) {
      if (!reaches(8 * n, count)) continue;
      Token columns[2];
      if constexpr (kOwnsSlots) {
        for (int i = 0; i < 2; ++i) columns[i] = token_of(tile + 8 * n + 2 * t + i);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t own = first + 16 * warp + g + i / 2 * 8;
        const int64_t other = tile + 8 * n + 2 * t + i % 2;
        const int64_t token_index = kOwnsSlots ? other : own;
        const int64_t slot = kOwnsSlots ? own : other;
        bool visible = token_index < args.tokens && slot < args.slots &&
                       (!args.causal || slot <= args.slot_offset + token_index);
        if (visible && args.slot_mask != nullptr) {
          visible = args.slot_mask[b * args.mask_batch_stride + slot * args.mask_slot_stride] != 0;
        }
        const float x = visible ? s[n][i] * sign : -INFINITY;
        if constexpr (kPass == Pass::forward) {
          s[n][i] = x;
          seen[i / 2] = seen[i / 2] || visible;
        } else {
          const Token& token = kOwnsSlots ? columns[i % 2] : tokens[i / 2];
          // 0 where a difference is NaN: what counts in such a row is its sum
          const float below = fminf(x - token.largest, 0.0f) * scale;
          const float p = visible ? exponential<T>(below - token.log_sum) : 0.0f;
          float keep = 1.0f;
          if (args.seed != nullptr) {
            const uint32_t bits = dropout::bits(token.keys, static_cast<uint32_t>(slot));
            keep = bits >= args.drop_threshold ? keep_factor : 0.0f;
          }
          // keep_factor comes last: here it could exceed float16
          const float kept = keep == 0.0f ? 0.0f : p;
          if constexpr (kPass == Pass::dvalue) {
            s[n][i] = kept;
          } else if constexpr (kPass == Pass::delta) {
            running[i / 2][0] += p;
            if (visible) running[i / 2][1] += p * (dp[n][i] * keep);
          } else {
            s[n][i] = visible ? p * (dp[n][i] * keep - token.delta) * factor : 0.0f;
            if constexpr (kMerged) dp[n][i] = kept;
          }
        }
      }
    }
    if constexpr (kPass == Pass::forward) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float most = running[row][0];
#pragma unroll
        for (int n = 0; n < kOther / 8; ++n) {
          if (!reaches(8 * n, count)) continue;
          most = fmaxf(most, fmaxf(s[n][2 * row], s[n][2 * row + 1]));
        }
        most = quad_max(most);
        // nothing seen yet: any finite shift leaves the zeros zero
        const float shift = most == -INFINITY ? 0.0f : most;
        const float shrink = exponential<T>((running[row][0] - shift) * scale);
        float sum = 0.0f;
        const int64_t own = first + 16 * warp + g + 8 * row;
#pragma unroll
        for (int n = 0; n < kOther / 8; ++n) {
          if (!reaches(8 * n, count)) continue;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& x = s[n][2 * row + i];
            x = exponential<T>((x - shift) * scale);
            sum += x;
            if (args.seed != nullptr && own < args.tokens) {
              const uint32_t slot = static_cast<uint32_t>(tile + 8 * n + 2 * t + i);
              if (dropout::bits(tokens[row].keys, slot) < args.drop_threshold) x = 0.0f;
            }
          }
        }
        running[row][0] = most;
        running[row][1] = running[row][1] * shrink + sum;
#pragma unroll
        for (int n = 0; n < kWidth / 8; ++n) {
          result[0][n][2 * row] *= shrink;
          result[0][n][2 * row + 1] *= shrink;
        }
      }
    }
    if constexpr (kPass != Pass::delta) {
      constexpr bool kTakesFirst = kPass == Pass::dquery || kPass == Pass::dkey || kMerged;
      const T* const y = kTakesFirst ? other1 : other2;
      add_weighted<T, kWidth>(result[0], s, y, count, weights_memory);
    }
    if constexpr (kMerged) {
      add_weighted<T, kWidth>(result[1], dp, other2, count, weights_memory);
    }
    // before a tile is written over
    __syncthreads();
  }
  // of a block that no token sees
  if (ahead) lm2_copies_landed<0>();

#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int64_t own = first + 16 * warp + g + 8 * row;
    const float keep_factor = args.seed != nullptr ? static_cast<float>(args.keep_factor) : 1.0f;
    float factor = kPass == Pass::forward ? keep_factor : 1.0f;
    if constexpr (kPass == Pass::forward) {
      const float sum = quad_sum(running[row][1]);
      // a sum of 0 does not tell: scores of -inf have that too, and are NaN like any softmax
      const bool any = quad_max(seen[row] ? 1.0f : 0.0f) != 0.0f;
      factor = any ? factor / sum : 0.0f;
      if (t == 0 && own < args.tokens) {
        float* const statistics = job.new_statistics + 2 * first_row + own;
        statistics[0] = running[row][0];
        statistics[args.tokens] = any ? logf(sum) : INFINITY;
      }
    } else if constexpr (kPass == Pass::delta) {
      const float sum = quad_sum(running[row][0]), product = quad_sum(running[row][1]);
      if (t == 0 && own < args.tokens) {
        job.delta[first_row + own] = sum == 0.0f ? 0.0f : product / sum;
      }
      continue;
    }
    if (own >= owned_count) continue;
    const auto write = [&]<class S>(S* out, const auto& values, float times) {
#pragma unroll
      for (int n = 0; n < (kPass == Pass::delta ? 1 : kWidth / 8); ++n) {
        for (int i = 0; i < 2; ++i) {
          const int column = 8 * n + 2 * t + i;
          if (column < args.width) out[column] = from_float<S>(values[n][2 * row + i] * times);
        }
      }
    };
    if constexpr (kOwnsSlots) {
      // (B, parts, N, 2, H, K)
      const int64_t slot_row = (b * parts + part) * args.slots + own;
      const int64_t dkey = (2 * slot_row * args.heads + h) * args.width;
      const int64_t dvalue = dkey + args.heads * args.width;
      const auto write_both = [&](auto* out) {
        if constexpr (kPass != Pass::dvalue) write(out + dkey, result[0], 1.0f);
        if constexpr (kPass != Pass::dkey) write(out + dvalue, result[kMerged], keep_factor);
      };
      if (parts > 1) {
        write_both(job.sums);
      } else {
        write_both(static_cast<T*>(job.result));
      }
    } else {
      const int64_t offset = ((b * args.tokens + own) * args.heads + h) * args.width;
      write(static_cast<T*>(job.result) + offset, result[0], factor);
    }
  }
}

template <class T, int kWidth, Pass kPass>
__global__ void __launch_bounds__(Tiles<T, kWidth>::kWarps * 32, 1)
    attention_kernel(const Job job) {
  // the 1: as many registers as it takes, rather than more blocks on a multiprocessor
  if constexpr (kPass == Pass::dkey_value && !Tiles<T, kWidth>::kMerged) {
    // two passes are one launch
    if (blockIdx.y == 0) {
      attention<T, kWidth, Pass::dkey>(job);
    } else {
      attention<T, kWidth, Pass::dvalue>(job);
    }
  } else {
    attention<T, kWidth, kPass>(job);
  }
}

// dkey_value (B, size) = the sum of its parts (B, parts, size).
template <class T>
__global__ void __launch_bounds__(256)
    add_parts_kernel(T* dkey_value, const float* sums, int64_t batch, int64_t parts, int64_t size) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (index >= batch * size) return;
  const float* const first = sums + index / size * parts * size + index % size;
  float sum = 0.0f;
  for (int64_t part = 0; part < parts; ++part) sum += first[part * size];
  dkey_value[index] = from_float<T>(sum);
}

// delta[row] = rowsum(dO * O): a warp a row.
template <class T>
__global__ void __launch_bounds__(128)
    delta_kernel(const MemoryAttentionBackward args, float* delta) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const bool is_there = row < args.batch * args.heads * args.tokens;
  float sum = 0.0f;
  if (is_there) {
    const int64_t token = row % args.tokens, head_index = row / args.tokens;
    const int64_t b = head_index / args.heads, h = head_index % args.heads;
    const auto start = [&](const View& view) {
      return static_cast<const T*>(view.data) + b * view.batch_stride + token * view.row_stride +
             h * view.head_stride;
    };
    const T* const dout = start(args.dout);
    const T* const out = start(args.out);
    for (int64_t k = lane; k < args.width; k += 32) {
      sum += to_float(dout[k]) * to_float(out[k]);
    }
  }
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (is_there && lane == 0) delta[row] = sum;
}

bool has_vectors(const View& view, int64_t width) {
  if (!view) return true;
  const int64_t size = view.dtype == Dtype::float32 ? 4 : 2, vector = 16 / size;
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && width % vector == 0 &&
         view.batch_stride % vector == 0 && view.row_stride % vector == 0 &&
         view.head_stride % vector == 0;
}

// How rows of one (batch, head) are shared out.
struct Split {
  int64_t blocks;
  int warps;  // of a block
};

// 16 a warp, and evenly.
template <class Tile>
Split split_of(const Job& job, int64_t rows) {
  const int64_t groups = divide_up(rows, 16);
  const int64_t blocks = divide_up(groups, Tile::most_warps(job.stages));
  return {blocks, static_cast<int>(divide_up(groups, blocks))};
}

template <class T, int kWidth, Pass kPass>
cudaError_t launch(const Job& job, cudaStream_t stream) {
  using Tile = Tiles<T, kWidth>;
  constexpr bool kOwnsSlots = kPass == Pass::dkey_value;
  const Split split = split_of<Tile>(job, kOwnsSlots ? job.args.slots : job.args.tokens);
  const int64_t blocks =
      split.blocks * (kOwnsSlots ? job.parts : 1) * job.args.batch * job.args.heads;
  if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
  const auto kernel = attention_kernel<T, kWidth, kPass>;
  const int most_bytes = Tile::bytes(Tile::most_warps(job.stages), needs_dp(kPass), job.stages);
  if (most_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes);
    if (error != cudaSuccess) {
      cudaGetLastError();  // or a later launch would report it
      return error;
    }
  }
  LM2_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks), kOwnsSlots && !Tile::kMerged ? 2 : 1),
             dim3(split.warps * 32), Tile::bytes(split.warps, needs_dp(kPass), job.stages), stream,
             job);
  return cudaGetLastError();
}

// In how many parts of the tokens dkey and dvalue are summed: as many as fill a GPU.
template <class Tile>
void choose_parts(Job& job) {
  const MemoryAttention& args = job.args;
  const Split split = split_of<Tile>(job, args.slots);
  const int64_t passes = Tile::kMerged ? 1 : 2;
  const int64_t warps = passes * split.blocks * split.warps * args.batch * args.heads;
  int64_t parts = std::min(kWarpsInFlight / warps, args.tokens / kLeastTokens);
  if (parts < kLeastParts) parts = 1;
  job.part_tokens = round_up(divide_up(args.tokens, parts), 32);
  job.parts = divide_up(args.tokens, job.part_tokens);
}

// Floats that the parts leave: no more than 17 MB, as there are parts of few slots alone.
int64_t sums_of(const Job& job) {
  const MemoryAttention& args = job.args;
  return job.parts > 1 ? job.parts * args.batch * args.slots * 2 * args.heads * args.width : 0;
}

template <class T, int kWidth>
cudaError_t backward(Job job, const MemoryAttentionBackward& args, cudaStream_t stream) {
  const int64_t rows = args.batch * args.heads * args.tokens;
  job.delta = static_cast<float*>(args.workspace);
  cudaError_t error = cudaSuccess;
  if constexpr (sizeof(T) == 4) {
    error = launch<T, kWidth, Pass::delta>(job, stream);
  } else {
    if (!fits_grid((rows + 3) / 4)) return cudaErrorInvalidConfiguration;
    LM2_LAUNCH(delta_kernel<T>, dim3(static_cast<unsigned>((rows + 3) / 4)), dim3(128), 0, stream,
               args, job.delta);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess && args.dquery != nullptr) {
    job.result = args.dquery;
    error = launch<T, kWidth, Pass::dquery>(job, stream);
  }
  if (error == cudaSuccess && args.dkey_value != nullptr) {
    job.result = args.dkey_value;
    choose_parts<Tiles<T, kWidth>>(job);
    job.sums = job.delta + rows;
    error = launch<T, kWidth, Pass::dkey_value>(job, stream);
    if (error == cudaSuccess && job.parts > 1) {
      const int64_t size = args.slots * 2 * args.heads * args.width;
      const int64_t blocks = divide_up(args.batch * size, 256);
      if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
      LM2_LAUNCH(add_parts_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(256), 0, stream,
                 static_cast<T*>(args.dkey_value), job.sums, args.batch, job.parts, size);
      error = cudaGetLastError();
    }
  }
  return error;
}

// Of the current device: from sm_80 on it copies a tile while it computes with another, and has the
// shared memory for both.
int stages_here() {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 8 ? 2 : 1;
}

Job job_of(const MemoryAttention& args, const View& dout) {
  Job job = {};
  job.args = args;
  job.dout = dout;
  job.vectors = true;
  job.stages = args.dtype == Dtype::float32 ? 1 : stages_here();
  for (const View& view : {args.query, args.key, args.value, dout}) {
    job.vectors = job.vectors && has_vectors(view, args.width);
  }
  return job;
}

// Calls run<T, kWidth>() for the op's dtype and the tile that holds its head width.
template <class Run>
cudaError_t dispatch(const MemoryAttention& args, const Run& run) {
  if (args.top_k != 0 || args.width > 256) return cudaErrorInvalidValue;
  const auto by_width = [&](auto type) {
    using T = decltype(type);
    if (args.width <= 64) return run.template operator()<T, 64>();
    if (args.width <= 128) return run.template operator()<T, 128>();
    return run.template operator()<T, 256>();
  };
  switch (args.dtype) {
    case Dtype::float32:
      return by_width(float());
    case Dtype::float16:
      return by_width(__half());
    case Dtype::bfloat16:
      return by_width(__nv_bfloat16());
    case Dtype::float64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t memory_attention_forward(const MemoryAttentionForward& args, cudaStream_t stream) {
  Job job = job_of(args, View{});
  job.result = args.out;
  job.new_statistics = static_cast<float*>(args.statistics);
  return dispatch(
      args, [&]<class T, int kWidth>() { return launch<T, kWidth, Pass::forward>(job, stream); });
}

cudaError_t memory_attention_backward(const MemoryAttentionBackward& args, cudaStream_t stream) {
  Job job = job_of(args, args.dout);
  job.statistics = static_cast<const float*>(args.statistics);
  return dispatch(args,
                  [&]<class T, int kWidth>() { return backward<T, kWidth>(job, args, stream); });
}

int64_t workspace_bytes(const MemoryAttentionBackward& args) {
  Job job = job_of(args, args.dout);
  if (args.dkey_value != nullptr) {
    dispatch(args, [&]<class T, int kWidth>() {
      choose_parts<Tiles<T, kWidth>>(job);
      return cudaSuccess;
    });
  }
  return (args.batch * args.heads * args.tokens + sums_of(job)) * 4;  // delta, sums
}

}  // namespace lm2::cuda
