"""Memory attention in Triton: tokens read the memory slots.

Four kernels, none of which writes to an address that another program touches: the forward; and for
the backward one each for ``delta``, for dK with dV, and for dQ. (For few slots, forward and dQ have
others, in :mod:`lm2_kernels.backends.triton.few_slots`.) Scores are recomputed tile by tile
and never stored. Letters as in :mod:`lm2_kernels.reference`; ``o`` is ``slot_offset``.

What the backward kernels know of a row are two numbers: the largest of its visible products
``q k``, and the logarithm to base 2 of the sum of ``exp(scale (q k - largest))``. In one number, a
log-sum-exp, the second would be lost beside a large first one, and with it what equal slots share.
Products are compared before they are scaled: so the largest minus itself is 0 at any size, whatever
a compiler contracts, as each kernel has the whole head width in one tile, and the same instruction
adds up its terms (not so in TF32, where kernels may differ in it). The scale's sign is put on the
query, so that kernels see a scale above 0.

What a kernel may not assume: the strides of its inputs (only the last axis is contiguous), or
finite values in slots that are masked off.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lm2_kernels import backends
from lm2_kernels.backends import composite, dropout
from lm2_kernels.backends.triton import few_slots, launch, library, tables
from lm2_kernels.backends.triton.attention_tiles import (
    LOG2_E,
    NOT_SPECIALIZED,
    load_rows,
    load_statistics,
    load_tile,
    probabilities,
    store_result,
    store_rows,
    which_visible,
)
from lm2_kernels.backends.triton.primitives import dropout_keep, dropout_row_keys

# below it a scale is 0
_LEAST_SCALE = torch.finfo(torch.float32).tiny

# a group of heads is scheduled together while what its programs share stays within this many bytes:
# well inside the level 2 cache of the data centre GPUs (40 MB and more)
_GROUP_BYTES = 16 << 20


@triton.jit
def _head_and_block(num_blocks, heads_per_group):
    """Which (batch, head) pair and which of its blocks this program owns.

    The grid is one axis of ``B * H * num_blocks`` programs. Groups of heads follow one another, so
    that the tensors which the programs of a head share are still cached when they are read again.
    Within a group, block 0 of every head comes first, then block 1, and so on: callers number the
    blocks from the one with the most work, and the short ones fill the gaps at the end.
    """
    pid = tl.program_id(0)
    num_pairs = tl.num_programs(0) // num_blocks
    group = pid // (heads_per_group * num_blocks)
    first_pair = group * heads_per_group
    pid_in_group = pid - first_pair * num_blocks
    num_in_group = tl.minimum(heads_per_group, num_pairs - first_pair)
    return first_pair + pid_in_group % num_in_group, pid_in_group // num_in_group


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _memory_attention_fwd_kernel(
    query_ptr,  # (B, T, H, K), as the next two a pointer or a descriptor
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
    heads_per_group: tl.int32,
    HEAD_WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SPECIALIZED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program owns BLOCK_T rows of one head and runs over the slots that they see."""
    num_blocks = tl.cdiv(num_tokens, BLOCK_T)
    pid_bh, pid_t = _head_and_block(num_blocks, heads_per_group)
    # the last rows see the most slots
    pid_t = num_blocks - 1 - pid_t
    # 64-bit, because a batch index times its stride may pass 2^31
    b = (pid_bh // num_heads).to(tl.int64)
    h = (pid_bh % num_heads).to(tl.int64)

    first_token = pid_t * BLOCK_T
    offs_t = first_token + tl.arange(0, BLOCK_T)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_t = offs_t < num_tokens
    # rows bound past the last slot see all of them, and none of the tile's padding
    last_seen = tl.minimum(slot_offset + offs_t, num_slots - 1)
    offs_t64 = offs_t.to(tl.int64)

    if not DESCRIPTORS:
        query_ptr += b * stride_qb + h * stride_qh
        key_ptr += b * stride_kb + h * stride_kh
        value_ptr += b * stride_vb + h * stride_vh

    if HAS_MASK:
        slot_mask_ptr += b * stride_mb
        first_visible = tl.full([BLOCK_N], 2147483647, tl.int32)
    if HAS_DROPOUT:
        rows = pid_bh.to(tl.int64) * num_tokens + offs_t64
        key_a, key_b = dropout_row_keys(tl.load(seed_ptr), rows)

    q = load_tile(
        query_ptr, b, h, first_token, offs_t64, stride_qt, mask_t, offs_k, HEAD_WIDTH, DESCRIPTORS
    )
    scale_log2 = scale * LOG2_E
    row_max = tl.full([BLOCK_T], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)

    end = num_slots
    if CAUSAL:
        end = tl.minimum(num_slots, slot_offset + (pid_t + 1) * BLOCK_T)
    for start in tl.range(0, end, BLOCK_N, warp_specialize=SPECIALIZED):
        slots = start + offs_n
        slots_64 = slots.to(tl.int64)
        mask_n = slots < num_slots
        taken = mask_n
        if HAS_MASK:
            slot_mask = tl.load(slot_mask_ptr + slots_64 * stride_mn, mask=mask_n, other=0)
            taken = slot_mask != 0
            first_visible = tl.minimum(first_visible, tl.where(taken, slots, 2147483647))
        visible = which_visible(slots, taken, last_seen, CAUSAL, HAS_MASK)

        k = load_tile(
            key_ptr, b, h, start, slots_64, stride_kn, mask_n, offs_k, HEAD_WIDTH, DESCRIPTORS
        )
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        products = tl.where(visible, products, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(products, 1))
        # while a row has seen nothing above -inf, the difference would be NaN
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2((products - finite_max[:, None]) * scale_log2)
        alpha = tl.exp2((row_max - finite_max) * scale_log2)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        row_max = new_max
        if HAS_DROPOUT:
            keep = dropout_keep(key_a[:, None], key_b[:, None], slots[None, :], threshold)
            p = tl.where(keep, p, 0.0)

        # a masked slot is not even read: 0 * NaN would reach every row
        v = load_tile(
            value_ptr, b, h, start, slots_64, stride_vn, taken, offs_k, HEAD_WIDTH, DESCRIPTORS
        )
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)

    store_result(
        acc,
        row_max,
        row_sum,
        tl.min(first_visible, 0) if HAS_MASK else None,
        statistics_ptr,
        out_ptr,
        b,
        h,
        pid_bh.to(tl.int64),
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
def _memory_attention_bwd_delta_kernel(
    dout_ptr,  # (B, T, H, K)
    out_ptr,  # (B, T, H, K)
    delta_ptr,  # (B, H, T) contiguous
    stride_dob,
    stride_dot,
    stride_doh,
    stride_ob,
    stride_ot,
    stride_oh,
    num_tokens: tl.int32,
    num_heads: tl.int32,
    HEAD_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Delta = sum over the head of dout * out. One program owns BLOCK_T rows of one head.

    In float32 the sum is taken as a product, in the order in which the other kernels take dout V:
    so the two cancel exactly in a row that sees one slot, as they do in a plain softmax; of TF32 to
    round-off, as kernels may differ in their instruction.
    """
    num_blocks = tl.cdiv(num_tokens, BLOCK_T)
    pid_bh = tl.program_id(0) // num_blocks
    pid_t = tl.program_id(0) % num_blocks
    b = (pid_bh // num_heads).to(tl.int64)
    h = (pid_bh % num_heads).to(tl.int64)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_k = tl.arange(0, BLOCK_K)
    mask_t = offs_t < num_tokens
    offs_t64 = offs_t.to(tl.int64)

    dout_ptr += b * stride_dob + h * stride_doh
    dout_ptrs = dout_ptr + offs_t64[:, None] * stride_dot + offs_k[None, :]
    out_ptr += b * stride_ob + h * stride_oh
    out_ptrs = out_ptr + offs_t64[:, None] * stride_ot + offs_k[None, :]
    dout = load_rows(dout_ptrs, mask_t, offs_k, HEAD_WIDTH, BLOCK_K).to(tl.float32)
    out = load_rows(out_ptrs, mask_t, offs_k, HEAD_WIDTH, BLOCK_K).to(tl.float32)
    if dout_ptr.dtype.element_ty == tl.float32:
        local = tl.arange(0, BLOCK_T)
        products = tl.dot(dout, tl.trans(out), input_precision=PRECISION)
        delta = tl.sum(tl.where(local[:, None] == local[None, :], products, 0.0), 1)
    else:
        delta = tl.sum(dout * out, 1)
    tl.store(delta_ptr + pid_bh.to(tl.int64) * num_tokens + offs_t, delta, mask=mask_t)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _memory_attention_bwd_dkey_value_kernel(
    dout_ptr,  # (B, T, H, K), as the next three a pointer or a descriptor
    query_ptr,  # (B, T, H, K)
    key_ptr,  # (B, N, H, K)
    value_ptr,  # (B, N, H, K)
    slot_mask_ptr,  # (B, N) uint8, or None
    seed_ptr,  # int64 scalar, or None
    statistics_ptr,  # (B, H, 2, T) contiguous
    delta_ptr,  # (B, H, T) contiguous
    dkey_value_ptr,  # (B, N, 2, H, K) contiguous, or (B, num_parts, N, 2, H, K) IN_PARTS
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
    heads_per_group: tl.int32,
    num_parts: tl.int32,
    tokens_per_part: tl.int32,
    HEAD_WIDTH: tl.constexpr,
    IN_PARTS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SPECIALIZED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program owns BLOCK_N slots of one head and runs over the rows that see them.

    IN_PARTS, over those of one part of the tokens: few slots would leave most of a GPU idle. The
    caller adds up the parts.

    Scores are held transposed, (BLOCK_N, BLOCK_T), so that they enter the second products as they
    are.
    """
    # the first slots are seen by the most rows
    num_blocks = tl.cdiv(num_slots, BLOCK_N)
    if IN_PARTS:
        pid_bh, pid_n = _head_and_block(num_blocks * num_parts, heads_per_group)
        part = pid_n % num_parts
        pid_n = pid_n // num_parts
    else:
        pid_bh, pid_n = _head_and_block(num_blocks, heads_per_group)
    b = (pid_bh // num_heads).to(tl.int64)
    h = (pid_bh % num_heads).to(tl.int64)

    first_row = 0
    if CAUSAL:
        # slot n is seen from row n - o on
        first_row = tl.maximum(pid_n * BLOCK_N - slot_offset, 0) // BLOCK_T * BLOCK_T
    end = num_tokens
    bank = b
    if IN_PARTS:
        # whole blocks of rows
        first_row = tl.maximum(first_row, part * tokens_per_part)
        end = tl.minimum((part + 1) * tokens_per_part, num_tokens)
        bank = b * num_parts + part

    first_slot = pid_n * BLOCK_N
    offs_n = first_slot + tl.arange(0, BLOCK_N)
    offs_t = tl.arange(0, BLOCK_T)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < num_slots
    offs_n64 = offs_n.to(tl.int64)

    if not DESCRIPTORS:
        key_ptr += b * stride_kb + h * stride_kh
        value_ptr += b * stride_vb + h * stride_vh
        query_ptr += b * stride_qb + h * stride_qh
        dout_ptr += b * stride_dob + h * stride_doh
    k = load_tile(
        key_ptr, b, h, first_slot, offs_n64, stride_kn, mask_n, offs_k, HEAD_WIDTH, DESCRIPTORS
    )
    v = load_tile(
        value_ptr, b, h, first_slot, offs_n64, stride_vn, mask_n, offs_k, HEAD_WIDTH, DESCRIPTORS
    )
    first_score_row = pid_bh.to(tl.int64) * num_tokens
    statistics_ptr += 2 * first_score_row
    delta_ptr += first_score_row
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    scale_log2 = scale * LOG2_E
    dk = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.range(first_row, end, BLOCK_T, warp_specialize=SPECIALIZED):
        rows = start + offs_t
        rows_64 = rows.to(tl.int64)
        mask_t = rows < num_tokens
        q = load_tile(
            query_ptr, b, h, start, rows_64, stride_qt, mask_t, offs_k, HEAD_WIDTH, DESCRIPTORS
        )
        largest, log_sum = load_statistics(statistics_ptr + rows, num_tokens, mask_t)
        products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = probabilities(products, largest[None, :], log_sum[None, :], scale_log2)
        if CAUSAL:
            p = tl.where(offs_n[:, None] <= (slot_offset + rows)[None, :], p, 0.0)

        dout = load_tile(
            dout_ptr, b, h, start, rows_64, stride_dot, mask_t, offs_k, HEAD_WIDTH, DESCRIPTORS
        )
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        delta = tl.load(delta_ptr + rows, mask=mask_t, other=0.0)
        if HAS_DROPOUT:
            key_a, key_b = dropout_row_keys(seed, first_score_row + rows)
            keep = dropout_keep(key_a[None, :], key_b[None, :], offs_n[:, None], threshold)
            kept = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        else:
            kept = p
        dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    dk = dk * scale
    if HAS_DROPOUT:
        dv = dv * keep_scale
    if HAS_MASK:
        # slots do not mix here: masking the result is enough, whatever the masked slots hold
        slot_mask_ptrs = slot_mask_ptr + b * stride_mb + offs_n64 * stride_mn
        slot_mask = tl.load(slot_mask_ptrs, mask=mask_n, other=0) != 0
        dk = tl.where(slot_mask[:, None], dk, 0.0)
        dv = tl.where(slot_mask[:, None], dv, 0.0)
    dk_rows = (bank * num_slots + offs_n64) * 2 * num_heads + h
    dk_ptrs = dkey_value_ptr + dk_rows[:, None] * HEAD_WIDTH + offs_k[None, :]
    store_rows(dk_ptrs, dk, mask_n, offs_k, HEAD_WIDTH, BLOCK_K)
    dv_ptrs = dk_ptrs + num_heads * HEAD_WIDTH
    store_rows(dv_ptrs, dv, mask_n, offs_k, HEAD_WIDTH, BLOCK_K)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _memory_attention_bwd_dquery_kernel(
    dout_ptr,  # (B, T, H, K), as the next three a pointer or a descriptor
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
    heads_per_group: tl.int32,
    HEAD_WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SPECIALIZED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program owns BLOCK_T rows of one head and runs over the slots that they see."""
    num_blocks = tl.cdiv(num_tokens, BLOCK_T)
    pid_bh, pid_t = _head_and_block(num_blocks, heads_per_group)
    pid_t = num_blocks - 1 - pid_t
    b = (pid_bh // num_heads).to(tl.int64)
    h = (pid_bh % num_heads).to(tl.int64)

    first_token = pid_t * BLOCK_T
    offs_t = first_token + tl.arange(0, BLOCK_T)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_t = offs_t < num_tokens
    # rows bound past the last slot see all of them, and none of the tile's padding
    last_seen = tl.minimum(slot_offset + offs_t, num_slots - 1)
    offs_t64 = offs_t.to(tl.int64)

    if not DESCRIPTORS:
        query_ptr += b * stride_qb + h * stride_qh
        dout_ptr += b * stride_dob + h * stride_doh
        key_ptr += b * stride_kb + h * stride_kh
        value_ptr += b * stride_vb + h * stride_vh
    q = load_tile(
        query_ptr, b, h, first_token, offs_t64, stride_qt, mask_t, offs_k, HEAD_WIDTH, DESCRIPTORS
    )
    dout = load_tile(
        dout_ptr, b, h, first_token, offs_t64, stride_dot, mask_t, offs_k, HEAD_WIDTH, DESCRIPTORS
    )
    score_rows = pid_bh.to(tl.int64) * num_tokens + offs_t64
    delta = tl.load(delta_ptr + score_rows, mask=mask_t, other=0.0)
    scale_log2 = scale * LOG2_E
    statistics_ptr += pid_bh.to(tl.int64) * 2 * num_tokens
    largest, log_sum = load_statistics(statistics_ptr + offs_t, num_tokens, mask_t)

    if HAS_MASK:
        slot_mask_ptr += b * stride_mb
    if HAS_DROPOUT:
        key_a, key_b = dropout_row_keys(tl.load(seed_ptr), score_rows)

    dq = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    end = num_slots
    if CAUSAL:
        end = tl.minimum(num_slots, slot_offset + (pid_t + 1) * BLOCK_T)
    for start in tl.range(0, end, BLOCK_N, warp_specialize=SPECIALIZED):
        slots = start + offs_n
        slots_64 = slots.to(tl.int64)
        mask_n = slots < num_slots
        taken = mask_n
        if HAS_MASK:
            slot_mask = tl.load(slot_mask_ptr + slots_64 * stride_mn, mask=mask_n, other=0)
            taken = slot_mask != 0
        visible = which_visible(slots, taken, last_seen, CAUSAL, HAS_MASK)

        # a masked slot is not even read: 0 * NaN would reach every row
        k = load_tile(
            key_ptr, b, h, start, slots_64, stride_kn, taken, offs_k, HEAD_WIDTH, DESCRIPTORS
        )
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = probabilities(products, largest[:, None], log_sum[:, None], scale_log2)
        v = load_tile(
            value_ptr, b, h, start, slots_64, stride_vn, mask_n, offs_k, HEAD_WIDTH, DESCRIPTORS
        )
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        if HAS_DROPOUT:
            keep = dropout_keep(key_a[:, None], key_b[:, None], slots[None, :], threshold)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = tl.where(visible, p * (dp - delta[:, None]), 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    dq = dq * scale
    dq_rows = (b * num_tokens + offs_t64) * num_heads + h
    dq_ptrs = dquery_ptr + dq_rows[:, None] * HEAD_WIDTH + offs_k[None, :]
    store_rows(dq_ptrs, dq, mask_t, offs_k, HEAD_WIDTH, BLOCK_K)


def _composite_reason(head_width: int, top_k: int | None) -> str | None:
    """Why this call goes to the composite path, or None when the kernels take it."""
    if top_k is not None:
        return "top_k needs whole rows of probabilities"
    if head_width > tables.MAX_HEAD_WIDTH:
        return f"a head width above {tables.MAX_HEAD_WIDTH} does not fit into registers"
    return None


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _mask_strides(mask: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if mask is None else mask.stride()


def _constants(
    config: tables.AttentionConfig,
    head_width: int,
    causal: bool,
    mask: Tensor | None,
    seed: Tensor | None,
    tf32: bool,
) -> dict[str, int | str]:
    """Of every kernel that has scores."""
    by_form: dict[str, int | str] = {}
    if not config.keeps_slots:
        by_form = {
            "DESCRIPTORS": config.by_descriptors,
            "SPECIALIZED": config.form == "specialized",
            "PRECISION": "tf32" if tf32 else "ieee",
        }
    return {
        "HEAD_WIDTH": head_width,
        "CAUSAL": causal,
        "HAS_MASK": mask is not None,
        "HAS_DROPOUT": seed is not None,
        **by_form,
        "BLOCK_T": config.block_tokens,
        "BLOCK_N": config.block_slots,
        "BLOCK_K": _block_k(head_width),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _with_positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float, int]:
    """Query and scale of the same scores, the latter above 0; and what the query was multiplied by.

    That is 0 where float32 has no normal number for the scale, which then is as small as can be:
    products of 0 are 0 at any, and of dQ, which is multiplied by 0 again, nothing overflows.
    """
    sign = (scale >= _LEAST_SCALE) - (scale <= -_LEAST_SCALE)
    if sign == 1:
        return query, scale, sign
    return query * sign, abs(scale) if sign else _LEAST_SCALE, sign


def _heads_per_group(num_pairs: int, rows: int, head_width: int, itemsize: int) -> int:
    """How many of all (batch, head) pairs to schedule together.

    The programs of a pair share two tensors of ``rows`` rows.
    """
    return min(num_pairs, max(1, _GROUP_BYTES // (2 * rows * head_width * itemsize)))


def _is_ragged(*tensors: Tensor) -> bool:
    """Whether a row of some head starts off a 16-byte boundary, as far as the compiler can tell.

    It knows of a stride only whether 16 divides it.
    """
    return any(
        (tensor.storage_offset() * tensor.element_size()) % 16
        or any(s % 16 for s in _strides(tensor))
        for tensor in tensors
    )


def _asks_for_tf32(query: Tensor) -> bool:
    """Whether PyTorch was asked for TF32 products of float32, by
    ``torch.set_float32_matmul_precision`` or a newer way.
    """
    return query.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _takes_tf32(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether there are such kernels: for what forward and backward both see, which have to agree.

    A width that 16 divides: then the output's rows are aligned too.
    """
    is_ragged = query.shape[-1] % 16 != 0 or _is_ragged(query, key, value)
    return tables.takes_tf32(launch.target_of(query), is_ragged)


def _takes_descriptors(mask: Tensor | None, *tensors: Tensor) -> bool:
    """Whether the copy engine can load tiles of these tensors (B, rows, H, K).

    It has no way to leave a masked slot unread. Steps of 0, of an expanded tensor, are not for it.
    """
    return (
        mask is None
        and tensors[0].element_size() == 2
        and not _is_ragged(*tensors)
        and all(t.data_ptr() % 16 == 0 and t.numel() > 0 for t in tensors)
        and all(
            stride > 0 or size == 1
            for t in tensors
            for size, stride in zip(t.shape, t.stride(), strict=True)
        )
    )


def _tiled(tensor: Tensor, rows: int, block_k: int) -> TensorDescriptor:
    """A tensor (B, rows, H, K) as tiles of so many rows of one head."""
    view = tensor.transpose(1, 2)
    # the step along an axis of size 1 is anything
    strides = [max(16, stride) for stride in view.stride()[:3]]
    return TensorDescriptor(tensor, list(view.shape), [*strides, 1], [1, 1, rows, block_k])


def _by_form(
    config: tables.AttentionConfig,
    block_k: int,
    of_tokens: tuple[Tensor, ...],
    of_slots: tuple[Tensor, ...],
) -> tuple[Tensor | TensorDescriptor, ...]:
    """Tensors as a kernel of this form takes them, in order."""
    if not config.by_descriptors:
        return of_tokens + of_slots
    return (
        *(_tiled(tensor, config.block_tokens, block_k) for tensor in of_tokens),
        *(_tiled(tensor, config.block_slots, block_k) for tensor in of_slots),
    )


class _Programs(NamedTuple):
    """How many there are, and what the kernel is told of it.

    Args:
        number: of programs.
        scalars: its last arguments.
    """

    number: int
    scalars: tuple[int, ...]


def _over_tokens(
    config: tables.AttentionConfig, num_pairs: int, key: Tensor, num_tokens: int
) -> _Programs:
    """A program for a block of rows, or that keeps all slots for a part of the tokens."""
    num_slots, _, head_width = key.shape[1:]
    if config.keeps_slots:
        tokens_per_part = tables.attention_run(config, num_pairs, num_tokens)
        num_parts = triton.cdiv(num_tokens, tokens_per_part)
        return _Programs(num_pairs * num_parts, (num_parts, tokens_per_part))
    heads_per_group = _heads_per_group(num_pairs, num_slots, head_width, key.element_size())
    return _Programs(num_pairs * triton.cdiv(num_tokens, config.block_tokens), (heads_per_group,))


def _block_k(head_width: int) -> int:
    # 16: the smallest reduction of a tensor core instruction
    return max(16, 1 << (head_width - 1).bit_length())


def memory_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slot_mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    slot_offset: int,
    scale: float,
    top_k: int | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """See :mod:`lm2_kernels.backends.contract`."""
    if _composite_reason(query.shape[-1], top_k) is not None:
        backends.record("memory_attention_forward", "triton/composite")
        return composite.memory_attention_forward(
            query, key, value, slot_mask, seed, causal, slot_offset, scale, top_k, dropout_p
        )
    batch, num_tokens, num_heads, head_width = query.shape
    num_slots = key.shape[1]
    query, scale, _ = _with_positive_scale(query, scale)
    query, key, value = map(launch.last_contiguous, (query, key, value))
    mask = None if slot_mask is None else slot_mask.view(torch.uint8)
    inputs = (query, key, value, mask, seed)
    asks = _asks_for_tf32(query)
    launches = launch.launches("memory_attention", inputs, causal, scale, dropout_p, asks)
    block_k = _block_k(head_width)

    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    statistics = torch.empty(
        batch, num_heads, 2, num_tokens, dtype=torch.float32, device=query.device
    )
    if batch == 0:
        return out, statistics

    def choice() -> tuple[str | None, tables.AttentionConfig, bool]:
        """PyTorch's kernel if that is the faster one, our configuration, whether ours is TF32's."""
        tf32 = asks and _takes_tf32(query, key, value)
        target, num_pairs, by_library = launch.target_of(query), batch * num_heads, None
        if mask is None and seed is None and query.element_size() == 2:
            by_library = tables.attention_library(target, head_width, num_pairs, num_tokens)
        if by_library and not library.serves(by_library, query, key, value, causal, scale):
            by_library = None
        config = tables.attention_forward(
            target,
            query.dtype,
            block_k,
            _is_ragged(query, key, value, out),
            num_pairs,
            num_tokens,
            num_slots,
            _takes_descriptors(mask, query, key, value),
            seed is not None,
            tf32,
        )
        return by_library, config, tf32

    by_library, config, tf32 = launches.once(choice)
    if by_library and slot_offset == 0:
        backends.record("memory_attention_forward", f"triton/{by_library}")
        return library.forward(by_library, query, key, value, causal, scale)

    def arguments() -> launch.Arguments:
        programs = _over_tokens(config, batch * num_heads, key, num_tokens)
        scalars = (
            *_strides(query, key, value),
            *_mask_strides(mask),
            num_tokens,
            num_slots,
            num_heads,
            slot_offset,
            scale,
            dropout.threshold(dropout_p),
            1.0 / (1.0 - dropout_p),
            *programs.scalars,
        )
        constants = _constants(config, head_width, causal, mask, seed, tf32)
        return (programs.number,), scalars, constants

    tensors = (*_by_form(config, block_k, (query,), (key, value)), mask, seed, out, statistics)
    kernel = _memory_attention_fwd_kernel
    if config.keeps_slots:
        kernel = few_slots.few_slots_fwd_kernel
    launches.run(kernel, tensors, arguments, ("slot_offset", slot_offset))
    return out, statistics


def memory_attention_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slot_mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    statistics: Tensor,
    causal: bool,
    slot_offset: int,
    scale: float,
    top_k: int | None,
    dropout_p: float,
    needs_dquery: bool,
    needs_dkey_value: bool,
) -> tuple[Tensor, Tensor]:
    """See :mod:`lm2_kernels.backends.contract`."""
    if _composite_reason(query.shape[-1], top_k) is not None:
        backends.record("memory_attention_backward", "triton/composite")
        return composite.memory_attention_backward(
            dout,
            query,
            key,
            value,
            slot_mask,
            seed,
            out,
            statistics,
            causal,
            slot_offset,
            scale,
            top_k,
            dropout_p,
            needs_dquery,
            needs_dkey_value,
        )
    batch, num_tokens, num_heads, head_width = query.shape
    num_slots = key.shape[1]
    dquery = query.new_empty(query.shape if needs_dquery else 0)
    packed = (batch, num_slots, 2, num_heads, head_width)
    if batch == 0 or not (needs_dquery or needs_dkey_value):
        return dquery, query.new_empty(packed if needs_dkey_value else 0)
    dkey_value = query.new_empty(0)
    dout, query, key, value, out = map(launch.last_contiguous, (dout, query, key, value, out))
    asks = _asks_for_tf32(query)
    if asks and _is_ragged(dout) and _takes_tf32(query, key, value):
        dout = dout.contiguous()
    query, scale, sign = _with_positive_scale(query, scale)
    delta = torch.empty(batch, num_heads, num_tokens, dtype=torch.float32, device=query.device)
    mask = None if slot_mask is None else slot_mask.view(torch.uint8)
    inputs = (dout, query, key, value, mask, seed, statistics)
    layout = (*inputs, out)
    options = (causal, scale, dropout_p, asks)
    launches = launch.launches("memory_attention_backward", layout, *options)
    tf32 = asks and launches.once(_takes_tf32, query, key, value)
    num_pairs = batch * num_heads
    block_k = _block_k(head_width)

    def known() -> tuple[str, torch.dtype, int, bool, int, bool, bool, bool]:
        return (
            launch.target_of(query),
            query.dtype,
            block_k,
            _is_ragged(dout, query, key, value, out),
            num_slots,
            _takes_descriptors(mask, dout, query, key, value),
            seed is not None,
            tf32,
        )

    def delta_arguments() -> launch.Arguments:
        block_tokens = tables.attention_delta_rows(query.dtype, block_k)
        constants = {
            "HEAD_WIDTH": head_width,
            "PRECISION": "tf32" if tf32 else "ieee",
            "BLOCK_T": block_tokens,
            "BLOCK_K": block_k,
            "num_warps": 4,
        }
        grid = (num_pairs * triton.cdiv(num_tokens, block_tokens),)
        return grid, (*_strides(dout, out), num_tokens, num_heads), constants

    def arguments(config: tables.AttentionConfig, programs: _Programs) -> launch.Arguments:
        """What the two kernels below have in common."""
        scalars = (
            *_strides(dout, query, key, value),
            *_mask_strides(mask),
            num_tokens,
            num_slots,
            num_heads,
            slot_offset,
            scale,
            dropout.threshold(dropout_p),
            1.0 / (1.0 - dropout_p),
            *programs.scalars,
        )
        constants = _constants(config, head_width, causal, mask, seed, tf32)
        return (programs.number,), scalars, constants

    def dquery_config() -> tables.AttentionConfig:
        return tables.attention_dquery(*known())

    def dkey_value_parts() -> tuple[tables.AttentionConfig, int, int, int]:
        """Configuration, programs of a part, number of parts, tokens of one."""
        config = tables.attention_dkey_value(*known())
        num_programs = num_pairs * triton.cdiv(num_slots, config.block_slots)
        tokens_per_part = tables.attention_part(num_programs, num_tokens, config.block_tokens)
        return config, num_programs, triton.cdiv(num_tokens, tokens_per_part), tokens_per_part

    launches.run(_memory_attention_bwd_delta_kernel, (dout, out, delta), delta_arguments)
    others = (mask, seed, statistics, delta)

    def tensors(config: tables.AttentionConfig) -> tuple[Tensor | TensorDescriptor | None, ...]:
        return (*_by_form(config, block_k, (dout, query), (key, value)), *others)

    if needs_dquery:
        dquery_choice = launches.once(dquery_config)

        def dquery_arguments() -> launch.Arguments:
            programs = _over_tokens(dquery_choice, num_pairs, key, num_tokens)
            return arguments(dquery_choice, programs)

        dquery_kernel = _memory_attention_bwd_dquery_kernel
        if dquery_choice.keeps_slots:
            dquery_kernel = few_slots.few_slots_bwd_dquery_kernel
        launches.run(
            dquery_kernel,
            (*tensors(dquery_choice), dquery),
            dquery_arguments,
            ("slot_offset", slot_offset),
        )
    if needs_dkey_value:
        config, num_programs, num_parts, tokens_per_part = launches.once(dkey_value_parts)

        def dkey_value_arguments() -> launch.Arguments:
            heads = _heads_per_group(num_pairs, num_tokens, head_width, query.element_size())
            programs = _Programs(num_programs * num_parts, (heads, num_parts, tokens_per_part))
            grid, scalars, constants = arguments(config, programs)
            constants["IN_PARTS"] = num_parts > 1
            return grid, scalars, constants

        if num_parts > 1:
            shape = (batch, num_parts, *packed[1:])
            sums = query.new_empty(shape, dtype=torch.float32)
        else:
            sums = query.new_empty(packed)
        launches.run(
            _memory_attention_bwd_dkey_value_kernel,
            (*tensors(config), sums),
            dkey_value_arguments,
            ("slot_offset", slot_offset),
        )
        dkey_value = sums.sum(1).to(query.dtype) if num_parts > 1 else sums
    if sign != 1:
        dquery.mul_(sign)
    return dquery, dkey_value
