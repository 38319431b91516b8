"""Memory attention from PyTorch's own operators, in blocks of query rows, on any device.

The eager backend runs it, and so does any other backend for what its kernels do not cover. One
block of query rows is worked on at a time, with a handful of score-sized temporaries; backward
computes the scores again. Arithmetic is float32 (float64 for float64).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lm2_kernels.backends import dropout
from lm2_kernels.backends.contract import accumulation_dtype

# elements of one block of scores, 16 MiB in float32, unless _MIN_BLOCK_ROWS asks for more
_BLOCK_ELEMENTS = 1 << 22
# fewer rows than this make the matrix products degenerate
_MIN_BLOCK_ROWS = 32


def _row_blocks(
    query: Tensor, num_slots: int, causal: bool, slot_offset: int
) -> Iterator[tuple[int, int, int]]:
    """(first row, end row, end of the slots these rows can see) of each block."""
    batch, num_tokens, num_heads, _ = query.shape
    row_elements = max(1, batch * num_heads * num_slots)
    rows = max(_MIN_BLOCK_ROWS, _BLOCK_ELEMENTS // row_elements)
    for start in range(0, num_tokens, rows):
        end = min(num_tokens, start + rows)
        yield start, end, min(num_slots, slot_offset + end) if causal else num_slots


def _by_head(x: Tensor, slot_mask: Tensor | None = None) -> Tensor:
    """(B, L, H, K) to (B, H, L, K) in the accumulation dtype; masked slots become 0."""
    x = x.transpose(1, 2).to(accumulation_dtype(x))
    if slot_mask is not None:
        # 0 * NaN is NaN: a masked slot takes no part whatever it holds
        x = x.masked_fill(~slot_mask[:, None, :, None], 0.0)
    return x


def _scores(
    query: Tensor,  # (B, H, rows, K)
    key: Tensor,  # (B, H, visible, K)
    slot_mask: Tensor | None,
    causal: bool,
    first_slot: int,  # the last slot that the block's first row sees
    scale: float,
) -> Tensor:
    """Scores of one block, -inf where a row does not see a slot. (B, H, rows, visible)"""
    scores = (query @ key.transpose(-1, -2)).mul_(scale)
    rows, slots = scores.shape[-2:]
    if causal and slots > first_slot + 1:
        hidden = torch.ones(rows, slots, dtype=torch.bool, device=scores.device)
        scores.masked_fill_(hidden.triu_(first_slot + 1), -math.inf)
    if slot_mask is not None:
        scores.masked_fill_(~slot_mask[:, None, None, :slots], -math.inf)
    return scores


def _sees_any(
    slot_mask: Tensor | None, causal: bool, first_slot: int, rows: int, slots: int
) -> Tensor | None:
    """Whether each row of a block sees a slot at all, (B, 1, rows or 1, 1); None if all do."""
    if slot_mask is None:
        return None
    if not causal:
        return slot_mask[:, None, :, None].any(dim=2, keepdim=True)
    num_seen = slot_mask[:, :slots].cumsum(dim=1)
    last = torch.arange(first_slot, first_slot + rows, device=slot_mask.device)
    return (num_seen[:, last.clamp_(max=slots - 1)] > 0)[:, None, :, None]


def _softmax(scores: Tensor, sees_any: Tensor | None) -> Tensor:
    """Softmax of one block of scores; a row that sees no slot becomes 0."""
    probabilities = torch.softmax(scores, dim=-1)
    return probabilities if sees_any is None else probabilities.masked_fill_(~sees_any, 0.0)


def _is_among_largest(scores: Tensor, count: int) -> Tensor:
    """The ``count`` largest of each row; of equal ones the first, which torch.topk leaves open."""
    least = scores.topk(count, dim=-1).values[..., -1:]
    if scores.device.type != "cpu":
        # to ask which rows have ties would be a wait
        return _first_of_ties(scores, least, count)
    largest = scores >= least
    # with all that is seen among them, it does not matter what else is
    is_open = (largest.sum(dim=-1, dtype=torch.int32) != count) & (least[..., 0] > -math.inf)
    largest[is_open] = _first_of_ties(scores[is_open], least[is_open], count)
    return largest


def _first_of_ties(scores: Tensor, least: Tensor, count: int) -> Tensor:
    """What lies above the least, and as many of its equals as are left, the first ones."""
    above, ties = scores > least, scores == least
    left = count - above.sum(dim=-1, keepdim=True)
    return above.logical_or_(ties.logical_and_(ties.cumsum(dim=-1, dtype=torch.int32) <= left))


def _kept(
    scores: Tensor,  # (B, H, rows, visible)
    seed: Tensor | None,
    first_row: int,
    num_tokens: int,
    top_k: int | None,
    dropout_p: float,
) -> Tensor | None:
    """The factor that top-k and dropout put on each probability, or None for all ones."""
    batch, num_heads, rows, visible = scores.shape
    factor = None
    if top_k is not None and top_k < visible:
        # chosen by score, not by probability: forward and backward see the same bits
        factor = _is_among_largest(scores, top_k).to(scores.dtype)
    if seed is not None:
        pair = torch.arange(batch * num_heads, device=scores.device).view(batch, num_heads, 1)
        row = torch.arange(first_row, first_row + rows, device=scores.device)
        keep = dropout.keep_mask(seed, dropout_p, pair * num_tokens + row, visible)
        keep = keep.to(scores.dtype).mul_(1.0 / (1.0 - dropout_p))
        factor = keep if factor is None else factor.mul_(keep)
    return factor


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
    batch, num_tokens, num_heads, _ = query.shape
    num_slots = key.shape[1]
    keys, values = _by_head(key, slot_mask), _by_head(value, slot_mask)
    queries = query.transpose(1, 2)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    # backward has whole rows of scores, and wants nothing
    statistics = torch.zeros(
        batch, num_heads, 2, num_tokens, dtype=accumulation_dtype(query), device=query.device
    )
    for start, end, visible in _row_blocks(query, num_slots, causal, slot_offset):
        rows = queries[:, :, start:end].to(keys.dtype)
        scores = _scores(rows, keys[:, :, :visible], slot_mask, causal, slot_offset + start, scale)
        sees_any = _sees_any(slot_mask, causal, slot_offset + start, end - start, visible)
        factor = _kept(scores, seed, start, num_tokens, top_k, dropout_p)
        probabilities = _softmax(scores, sees_any)
        if factor is not None:
            probabilities.mul_(factor)
        out[:, start:end] = (probabilities @ values[:, :, :visible]).transpose(1, 2)
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
    """See :mod:`lm2_kernels.backends.contract`.

    With A the probabilities, Z their top-k and dropout factor and dA = Z * (dR V^T):
    ``dS = A * (dA - rowsum(dA * A)) * scale``, ``dQ = dS K``, ``dK = dS^T Q``,
    ``dV = (A * Z)^T dR``.
    """
    num_tokens, num_slots = query.shape[1], key.shape[1]
    keys, values = _by_head(key, slot_mask), _by_head(value, slot_mask)
    queries, douts = query.transpose(1, 2), dout.transpose(1, 2)
    dquery, dkey_value = query.new_empty(0), query.new_empty(0)
    if needs_dquery:
        dquery = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if needs_dkey_value:
        dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
    for start, end, visible in _row_blocks(query, num_slots, causal, slot_offset):
        rows = queries[:, :, start:end].to(keys.dtype)
        drows = douts[:, :, start:end].to(keys.dtype)
        scores = _scores(rows, keys[:, :, :visible], slot_mask, causal, slot_offset + start, scale)
        factor = _kept(scores, seed, start, num_tokens, top_k, dropout_p)
        sees_any = _sees_any(slot_mask, causal, slot_offset + start, end - start, visible)
        probabilities = _softmax(scores, sees_any)
        dprobabilities = drows @ values[:, :, :visible].transpose(-1, -2)
        used = probabilities
        if factor is not None:
            used = probabilities * factor
            dprobabilities.mul_(factor)
        if needs_dkey_value:
            dvalues[:, :, :visible] += used.transpose(-1, -2) @ drows
        # equal to rowsum(dR * R), but without the rounding of R
        delta = (dprobabilities * probabilities).sum(dim=-1, keepdim=True)
        dscores = dprobabilities.sub_(delta).mul_(probabilities).mul_(scale)
        if needs_dquery:
            dquery[:, start:end] = (dscores @ keys[:, :, :visible]).transpose(1, 2)
        if needs_dkey_value:
            dkeys[:, :, :visible] += dscores.transpose(-1, -2) @ rows
    if needs_dkey_value:
        dkey_value = torch.stack((dkeys, dvalues), dim=2).permute(0, 3, 2, 1, 4)
        dkey_value = dkey_value.to(key.dtype).contiguous()
    return dquery, dkey_value
