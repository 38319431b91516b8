"""Inputs of any length, in segments: what a model and a layer in somebody else's model share.

The tokens of a segment read the memory as the segment found it. A *piece* is what one step reads of
a segment: tokens of rows that stand at the same place in their segments, or one token of each row.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lm2_kernels.state.cache import SegmentCache, on_device
from lm2_kernels.state.memory import MemoryState

__all__ = ["Rule", "compress", "gather", "is_cut", "leave_graph", "run_segments", "spread"]

# (piece (B, T, ...), what it reads of each bank, cache) -> (output (B, T, D), what it writes);
# see MemoryState.piece and MemoryState.after
Step = Callable[[Tensor, list[Tensor], SegmentCache], tuple[Tensor, Sequence[Tensor]]]


class Rule(NamedTuple):
    """How a model takes its input in segments; see :class:`SegmentCache`."""

    segment_length: int
    tokens_per_slot: int = 1
    causal: bool = True


def is_cut(segments: int, bptt_segments: int | None) -> bool:
    """Whether gradients end before a segment of which so many came before in the call."""
    return bptt_segments is not None and segments > 0 and segments % bptt_segments == 0


def leave_graph(text: str) -> None:
    """Where a graph of torch.compile or torch.export cannot go on.

    torch.compile breaks the graph, and all is as without it; with ``fullgraph`` it raises the text.

    Args:
        text: a constant.

    Raises:
        NotImplementedError: under torch.export, with the text.
    """
    if torch.compiler.is_dynamo_compiling():
        torch._dynamo.graph_break(msg=text)
    elif torch.compiler.is_compiling():
        raise NotImplementedError(text)


def compress(attention_mask: Tensor, lengths: list[int] | None = None) -> tuple[Tensor, list[int]]:
    """Where each row's real tokens are, whatever the side of the padding.

    Args:
        attention_mask: (B, L), nonzero where a token is real.
        lengths: how many are, if that is known; else the device is waited for.

    Returns:
        order (B, L): the real tokens' columns, ascending, then the others'; and how many are real.

    Raises:
        ValueError: no token is real.
    """
    real = attention_mask.bool()
    if lengths is None:
        lengths = real.sum(dim=1).tolist()
    if max(lengths, default=1) == 0:
        raise ValueError("attention_mask: at least one token must be real (nonzero), none is")
    return torch.argsort((~real).to(torch.uint8), dim=1, stable=True), lengths


def gather(x: Tensor, order: Tensor) -> Tensor:
    """The columns of (B, L, ...) in :func:`compress`'s order."""
    return x.gather(1, order.view(*order.shape, *[1] * (x.dim() - 2)).expand_as(x))


def spread(x: Tensor, order: Tensor, lengths: Sequence[int]) -> Tensor:
    """The inverse of :func:`gather` for (B, L, D), with zeros at the padding."""
    lengths = on_device(lengths, x.device)[:, None]
    real = torch.arange(x.shape[1], device=x.device) < lengths
    x = torch.where(real[:, :, None], x, 0.0)
    return torch.zeros_like(x).scatter(1, order[:, :, None].expand_as(x), x)


def run_segments(
    step: Step,
    inputs: Tensor,  # (B, L, ...)
    state: MemoryState,
    rule: Rule,
    lengths: Sequence[int] | None = None,
    *,
    keep: bool,
    bptt_segments: int | None = None,
) -> tuple[Tensor, MemoryState]:
    """Read ``inputs`` from where the state stands, segment by segment.

    Args:
        step: computes one piece.
        inputs: (B, L, ...), each row's real tokens first.
        state: of batch B.
        rule: how.
        lengths: how many tokens of each row are real; None is all.
        keep: whether the returned state stands where the tokens end; else it stands between two
            segments.
        bptt_segments: detach the state before every ``bptt_segments``-th segment.

    Returns:
        The outputs (B, L, D), of no meaning at the padding, and the state.
    """
    length = inputs.shape[1]
    longest = length if lengths is None else max(lengths, default=length)
    outputs, state = _run(step, inputs[:, :longest], state, rule, lengths, keep, bptt_segments, 0)
    if longest < length:
        padding = outputs.new_zeros(outputs.shape[0], length - longest, *outputs.shape[2:])
        outputs = torch.cat([outputs, padding], dim=1)
    return outputs, state if keep else state.end_segment()


def _run(
    step: Step,
    inputs: Tensor,
    state: MemoryState,
    rule: Rule,
    lengths: Sequence[int] | None,
    keep: bool,
    bptt_segments: int | None,
    segments: int,
) -> tuple[Tensor, MemoryState]:
    """:func:`run_segments` after so many segments of the call."""
    outputs, segment_length = [], rule.segment_length
    while inputs.shape[1] > 0:
        if is_cut(segments, bptt_segments):
            state = state.detach()
        if state.start is None and inputs.shape[1] > 1:
            output, state = _run_groups(
                step, inputs, state, rule, lengths, keep, bptt_segments, segments
            )
            outputs.append(output)
            break
        num_tokens = inputs.shape[1]
        # not min: for a length that a graph has as a symbol, its bounds decide
        if state.start is None or num_tokens > segment_length - state.start:
            num_tokens = 1 if state.start is None else segment_length - state.start
        here, left = _cut(lengths, num_tokens)
        # a row that has no more tokens must not lose its place while the others go on
        stays = keep or (here is not None and num_tokens < inputs.shape[1])
        # a whole segment leaves nothing open
        stays = stays and not (here is None and num_tokens == segment_length)
        banks, cache = state.piece(num_tokens, **rule._asdict(), lengths=here, keep=stays)
        output, written = step(inputs[:, :num_tokens], banks, cache)
        state = state.after(cache, written)
        outputs.append(output)
        inputs, lengths, segments = inputs[:, num_tokens:], left, segments + 1
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), state


def _cut(
    lengths: Sequence[int] | None, num_tokens: int
) -> tuple[list[int] | None, list[int] | None]:
    """How many of the next tokens are real (None: all), and how many after them."""
    if lengths is None:
        return None, None
    here = [min(length, num_tokens) for length in lengths]
    left = [length - first for length, first in zip(lengths, here, strict=True)]
    return (None if min(here, default=num_tokens) == num_tokens else here), left


def _run_groups(
    step: Step,
    inputs: Tensor,
    state: MemoryState,
    rule: Rule,
    lengths: Sequence[int] | None,
    keep: bool,
    bptt_segments: int | None,
    segments: int,
) -> tuple[Tensor, MemoryState]:
    """Rows at different places in their segments: those at one place together."""
    batch, longest = inputs.shape[:2]
    lengths = [longest] * batch if lengths is None else lengths
    groups: dict[int | None, list[int]] = {}
    for row, (start, length) in enumerate(zip(state.position.tolist(), lengths, strict=True)):
        groups.setdefault(start if length > 0 else None, []).append(row)
    outputs, states = None, []
    for start, rows in groups.items():
        part = state.select(rows)
        if start is not None:
            own = [lengths[row] for row in rows]
            index = on_device(rows, inputs.device)
            output, part = _run(
                step,
                inputs[index, : max(own)],
                part,
                rule,
                own,
                keep,
                bptt_segments,
                segments,
            )
            if outputs is None:
                outputs = output.new_zeros(batch, longest, *output.shape[2:])
            outputs[index, : max(own)] = output
        states.append(part)
    order = [row for rows in groups.values() for row in rows]
    places = sorted(range(batch), key=order.__getitem__)
    return outputs, MemoryState.cat(states).select(places)
