"""Memory attention in Triton where slots are few: a program keeps all of them, and tokens pass by.

In the kernels of :mod:`lm2_kernels.backends.triton.memory_attention` a program owns rows of tokens
and runs over slots. Of few slots that run is one or two steps long: a program loads, computes and
stores, one after the other, and most of the time is the way of queries and results through memory.
Here a program owns all slots of a head and a part of its tokens, so that the next queries are
loaded while it computes, and each slot is loaded once a program. What a row is given is the same:
its softmax needs no second step, as it sees all scores at once.

dK and dV, for which programs own slots, have few slots' tokens in parts already.
"""

import triton
import triton.language as tl

from lm2_kernels.backends.triton.attention_tiles import (
    LOG2_E,
    NOT_SPECIALIZED,
    load_statistics,
    load_tile,
    probabilities,
    store_result,
    store_rows,
    which_visible,
)
from lm2_kernels.backends.triton.primitives import dropout_keep, dropout_row_keys


@triton.jit
def _part_of_head(num_tokens, num_heads, num_parts, tokens_per_part):
    """Batch entry and head of this program, in 64 bits for strides, its first token and its last.

    The parts of a head follow one another: they share its slots.
    """
    pid_bh = tl.program_id(0) // num_parts
    start = tl.program_id(0) % num_parts * tokens_per_part
    b = (pid_bh // num_heads).to(tl.int64)
    h = (pid_bh % num_heads).to(tl.int64)
    return b, h, start, tl.minimum(start + tokens_per_part, num_tokens)


@triton.jit
def _slots_of_head(
    key_ptr,
    value_ptr,
    slot_mask_ptr,
    b,
    h,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_mb,
    stride_mn,
    num_slots,
    HEAD_WIDTH: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """All slots of one head, which of them take part, and their keys and values."""
    slots = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    slots_64 = slots.to(tl.int64)
    taken = slots < num_slots
    if HAS_MASK:
        slot_mask_ptrs = slot_mask_ptr + b * stride_mb + slots_64 * stride_mn
        taken = tl.load(slot_mask_ptrs, mask=taken, other=0) != 0
    # a masked slot is not even read: 0 * NaN would reach every row
    key_ptr += b * stride_kb + h * stride_kh
    k = load_tile(key_ptr, b, h, 0, slots_64, stride_kn, taken, offs_k, HEAD_WIDTH, False)
    value_ptr += b * stride_vb + h * stride_vh
    v = load_tile(value_ptr, b, h, 0, slots_64, stride_vn, taken, offs_k, HEAD_WIDTH, False)
    return slots, taken, k, v


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def few_slots_fwd_kernel(
    query_ptr,  # (B, T, H, K)
    key_ptr,  # (B, N, H, K)
    value_ptr,  # (B, N, H, K)
    slot_mask_ptr,  # (B, N) uint8, or None
    seed_ptr,  # int64 scalar, or None
    out_ptr,  # (B, T, H, K) contiguous
    statistics_ptr,  # (B, H, 2, T) contiguous
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_mb,
    stride_mn,
    num_tokens: tl.int32,
    num_slots: tl.int32,
    num_heads: tl.int32,
    slot_offset: tl.int32,
    scale: tl.float32,
    threshold: tl.int64,
    keep_scale: tl.float32,
    num_parts: tl.int32,
    tokens_per_part: tl.int32,
    HEAD_WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program owns all slots of one head, at most BLOCK_N, and runs over a part of its rows."""
    b, h, first_token, end = _part_of_head(num_tokens, num_heads, num_parts, tokens_per_part)
    slots, taken, k, v = _slots_of_head(
        key_ptr,
        value_ptr,
        slot_mask_ptr,
        b,
        h,
        stride_kb,
        stride_kn,
        stride_kh,
        stride_vb,
        stride_vn,
        stride_vh,
        stride_mb,
        stride_mn,
        num_slots,
        HEAD_WIDTH,
        HAS_MASK,
        BLOCK_N,
        BLOCK_K,
    )
    offs_k = tl.arange(0, BLOCK_K)
    first_visible = 0
    if HAS_MASK:
        first_visible = tl.min(tl.where(taken, slots, 2147483647), 0)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    query_ptr += b * stride_qb + h * stride_qh
    scale_log2 = scale * LOG2_E

    for start in tl.range(first_token, end, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        mask_t = offs_t < num_tokens
        offs_t64 = offs_t.to(tl.int64)
        # rows bound past the last slot see all of them, and none of the tile's padding
        last_seen = tl.minimum(slot_offset + offs_t, num_slots - 1)
        visible = which_visible(slots, taken, last_seen, CAUSAL, HAS_MASK)

        q = load_tile(query_ptr, b, h, 0, offs_t64, stride_qt, mask_t, offs_k, HEAD_WIDTH, False)
        products = tl.where(visible, tl.dot(q, tl.trans(k)), float("-inf"))
        row_max = tl.max(products, 1)
        # -inf minus itself would be NaN in a row that sees nothing above it
        finite_max = tl.where(row_max == float("-inf"), 0.0, row_max)
        p = tl.exp2((products - finite_max[:, None]) * scale_log2)
        row_sum = tl.sum(p, 1)
        if HAS_DROPOUT:
            key_a, key_b = dropout_row_keys(seed, (b * num_heads + h) * num_tokens + offs_t64)
            keep = dropout_keep(key_a[:, None], key_b[:, None], slots[None, :], threshold)
            p = tl.where(keep, p, 0.0)
        store_result(
            tl.dot(p.to(v.dtype), v),
            row_max,
            row_sum,
            first_visible,
            statistics_ptr,
            out_ptr,
            b,
            h,
            b * num_heads + h,
            offs_t,
            offs_t64,
            mask_t,
            offs_k,
            num_tokens,
            num_slots,
            num_heads,
            slot_offset,
            keep_scale,
            HEAD_WIDTH,
            CAUSAL,
            HAS_MASK,
            HAS_DROPOUT,
        )


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def few_slots_bwd_dquery_kernel(
    dout_ptr,  # (B, T, H, K)
    query_ptr,  # (B, T, H, K)
    key_ptr,  # (B, N, H, K)
    value_ptr,  # (B, N, H, K)
    slot_mask_ptr,  # (B, N) uint8, or None
    seed_ptr,  # int64 scalar, or None
    statistics_ptr,  # (B, H, 2, T) contiguous
    delta_ptr,  # (B, H, T) contiguous
    dquery_ptr,  # (B, T, H, K) contiguous
    stride_dob,
    stride_dot,
    stride_doh,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_mb,
    stride_mn,
    num_tokens: tl.int32,
    num_slots: tl.int32,
    num_heads: tl.int32,
    slot_offset: tl.int32,
    scale: tl.float32,
    threshold: tl.int64,
    keep_scale: tl.float32,
    num_parts: tl.int32,
    tokens_per_part: tl.int32,
    HEAD_WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program owns all slots of one head, at most BLOCK_N, and runs over a part of its rows."""
    b, h, first_token, end = _part_of_head(num_tokens, num_heads, num_parts, tokens_per_part)
    slots, taken, k, v = _slots_of_head(
        key_ptr,
        value_ptr,
        slot_mask_ptr,
        b,
        h,
        stride_kb,
        stride_kn,
        stride_kh,
        stride_vb,
        stride_vn,
        stride_vh,
        stride_mb,
        stride_mn,
        num_slots,
        HEAD_WIDTH,
        HAS_MASK,
        BLOCK_N,
        BLOCK_K,
    )
    offs_k = tl.arange(0, BLOCK_K)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    dout_ptr += b * stride_dob + h * stride_doh
    query_ptr += b * stride_qb + h * stride_qh
    scale_log2 = scale * LOG2_E
    first_score_row = (b * num_heads + h) * num_tokens
    statistics_ptr += 2 * first_score_row
    delta_ptr += first_score_row

    for start in tl.range(first_token, end, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        mask_t = offs_t < num_tokens
        offs_t64 = offs_t.to(tl.int64)
        # rows bound past the last slot see all of them, and none of the tile's padding
        last_seen = tl.minimum(slot_offset + offs_t, num_slots - 1)
        visible = which_visible(slots, taken, last_seen, CAUSAL, HAS_MASK)

        q = load_tile(query_ptr, b, h, 0, offs_t64, stride_qt, mask_t, offs_k, HEAD_WIDTH, False)
        dout = load_tile(dout_ptr, b, h, 0, offs_t64, stride_dot, mask_t, offs_k, HEAD_WIDTH, False)
        largest, log_sum = load_statistics(statistics_ptr + offs_t, num_tokens, mask_t)
        delta = tl.load(delta_ptr + offs_t, mask=mask_t, other=0.0)
        products = tl.dot(q, tl.trans(k))
        p = probabilities(products, largest[:, None], log_sum[:, None], scale_log2)
        dp = tl.dot(dout, tl.trans(v))
        if HAS_DROPOUT:
            key_a, key_b = dropout_row_keys(seed, first_score_row + offs_t64)
            keep = dropout_keep(key_a[:, None], key_b[:, None], slots[None, :], threshold)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = tl.where(visible, p * (dp - delta[:, None]), 0.0)
        dq = tl.dot(ds.to(k.dtype), k) * scale
        dq_rows = (b * num_tokens + offs_t64) * num_heads + h
        dq_ptrs = dquery_ptr + dq_rows[:, None] * HEAD_WIDTH + offs_k[None, :]
        store_rows(dq_ptrs, dq, mask_t, offs_k, HEAD_WIDTH, BLOCK_K)
