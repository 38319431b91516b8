"""What kernels of the attention have in common: tiles of rows, and what is kept of a row."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# arguments that change from call to call, and nothing in the code depends on their divisibility
NOT_SPECIALIZED = [
    "num_tokens",
    "num_slots",
    "num_heads",
    "slot_offset",
    "scale",
    "threshold",
    "keep_scale",
    "heads_per_group",
    "num_parts",
    "tokens_per_part",
]


@triton.jit
def load_rows(ptrs, mask_rows, offs_k, HEAD_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load a tile of rows of one head: (rows, BLOCK_K), zeros where masked or past the width."""
    if HEAD_WIDTH == BLOCK_K:
        return tl.load(ptrs, mask=mask_rows[:, None], other=0.0)
    return tl.load(ptrs, mask=mask_rows[:, None] & (offs_k < HEAD_WIDTH)[None, :], other=0.0)


@triton.jit
def load_tile(
    source,
    b,
    h,
    first_row,
    rows_64,
    stride,
    mask_rows,
    offs_k,
    HEAD_WIDTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """A tile of rows of one head, (rows, BLOCK_K), zeros where there are none.

    ``source`` is where the head's rows begin, with their ``stride``: rows off the mask are zeros,
    too. Or, if DESCRIPTORS, it describes (B, H, rows, K).
    """
    if DESCRIPTORS:
        tile = source.load([b.to(tl.int32), h.to(tl.int32), first_row, 0])
        tile = tl.reshape(tile, rows_64.shape[0], offs_k.shape[0])
    else:
        ptrs = source + rows_64[:, None] * stride + offs_k[None, :]
        tile = load_rows(ptrs, mask_rows, offs_k, HEAD_WIDTH, offs_k.shape[0])
    return tile


@triton.jit
def store_rows(ptrs, tile, mask_rows, offs_k, HEAD_WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    tile = tile.to(ptrs.dtype.element_ty)
    if HEAD_WIDTH == BLOCK_K:
        tl.store(ptrs, tile, mask=mask_rows[:, None])
    else:
        tl.store(ptrs, tile, mask=mask_rows[:, None] & (offs_k < HEAD_WIDTH)[None, :])


@triton.jit
def which_visible(slots, taken, last_seen, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr):
    """(rows, slots). Slots past the last one are off ``taken``, and above every ``last_seen``."""
    if CAUSAL:
        visible = slots[None, :] <= last_seen[:, None]
        if HAS_MASK:
            visible = visible & taken[None, :]
    else:
        visible = taken[None, :]
    return visible


@triton.jit
def store_result(
    acc,
    row_max,
    row_sum,
    first_visible,
    statistics_ptr,
    out_ptr,
    b,
    h,
    pair,
    offs_t,
    offs_t64,
    mask_t,
    offs_k,
    num_tokens,
    num_slots,
    num_heads,
    slot_offset,
    keep_scale,
    HEAD_WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    """Store the result of some rows of one head, and what the backward kernels know of them.

    ``pair``: of batch entry and head; ``offs_t64``, ``mask_t``: of ``offs_t``, as callers have them
    (computed again, they cost warp-specialised kernels the registers of 22 words).
    ``acc``: weighted sums of values, with weights that sum to ``row_sum``; ``row_max``: the largest
    visible products; ``first_visible``: HAS_MASK, the first slot that is not masked off.
    """
    # visible scores that are all -inf leave 0 / 0 = NaN, as softmax does
    log_sum = tl.log2(row_sum)
    if HAS_MASK:
        if CAUSAL:
            sees_any = first_visible <= slot_offset + offs_t
        else:
            sees_any = (first_visible < num_slots) & mask_t
        log_sum = tl.where(sees_any, log_sum, float("inf"))
        row_sum = tl.where(sees_any, row_sum, 1.0)
    factor = 1.0 / row_sum
    if HAS_DROPOUT:
        factor = factor * keep_scale
    acc = acc * factor[:, None]

    statistics_ptrs = statistics_ptr + pair * 2 * num_tokens + offs_t
    tl.store(statistics_ptrs, row_max, mask=mask_t)
    tl.store(statistics_ptrs + num_tokens, log_sum, mask=mask_t)
    out_rows = (b * num_tokens + offs_t64) * num_heads + h
    out_ptrs = out_ptr + out_rows[:, None] * HEAD_WIDTH + offs_k[None, :]
    store_rows(out_ptrs, acc, mask_t, offs_k, HEAD_WIDTH, offs_k.shape[0])


@triton.jit
def load_statistics(ptrs, num_tokens, mask_t):
    """The largest products of some rows, and the logarithms of their sums.

    The latter is +inf for a row that is not there or sees no slot: it has no probabilities.
    """
    largest = tl.load(ptrs, mask=mask_t, other=0.0)
    return largest, tl.load(ptrs + num_tokens, mask=mask_t, other=float("inf"))


@triton.jit
def probabilities(products, largest, log_sum, scale_log2):
    # a NaN becomes 0: what counts in such a row is its sum, NaN or +inf
    below = tl.minimum(products - largest, 0.0, propagate_nan=tl.PropagateNan.NONE)
    return tl.exp2(below * scale_log2 - log_sum)
