"""What a causal language model promises, as checks to run on any model.

Each check takes a function that calls the model, for instance
``lambda ids: model(ids).logits``, so the model may be anything, and raises
:class:`InvariantError` with the place and size of the largest violation. Two results count as equal
when they differ by no more than ``tolerance`` times the largest magnitude of what was expected; the
default is 256 ulps of the results' dtype, far below what a real violation shows.

Put the model into evaluation mode first: dropout breaks every one of these promises.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "InvariantError",
    "check_batch_independence",
    "check_causality",
    "check_padding",
    "check_streaming",
]

_ULPS = 256


class InvariantError(AssertionError):
    """A model breaks a promise; the text says which, where and by how much."""


@torch.no_grad()
def check_causality(
    function: Callable[[Tensor], Tensor],
    inputs: Tensor,
    positions: Sequence[int] | None = None,
    *,
    tolerance: float | None = None,
) -> None:
    """No output depends on a later input: ``function(inputs)[:, :t]`` is the same whatever
    ``inputs[:, t:]`` holds.

    Args:
        function: (B, L, ...) -> (B, L, ...).
        inputs: (B, L) token ids, of at least two kinds, or (B, L, D) hidden states. The later
            tokens are replaced by others among them.
        positions: the t to try, from 1 to L - 1; unless given, about eight over the whole length.
        tolerance: see the module.

    Raises:
        InvariantError: an output changed.
    """
    length = inputs.shape[1]
    positions = _spaced(length) if positions is None else list(positions)
    if not positions:
        raise ValueError("check_causality: no position to try; give two tokens or more")
    want = function(inputs)
    for position in positions:
        if not 0 < position < length:
            raise ValueError(f"check_causality: positions must be from 1 to {length - 1}")
        changed = inputs.clone()
        changed[:, position:] = _other(inputs)[:, position:]
        if (changed == inputs)[:, position:].all():
            raise ValueError("check_causality: all tokens are alike, so none can be exchanged")
        got = function(changed)[:, :position]
        _compare(
            got,
            want[:, :position],
            f"causality: outputs before token {position} change with the tokens from there on",
            tolerance,
        )


@torch.no_grad()
def check_streaming(
    function: Callable[[Tensor, object], tuple[Tensor, object]],
    inputs: Tensor,
    sizes: Sequence[int] | None = None,
    *,
    tolerance: float | None = None,
) -> None:
    """One pass equals pieces, the state of each handed to the next.

    Args:
        function: ``(piece (B, T, ...), state) -> (outputs (B, T, ...), state)``; the first state is
            None.
        inputs: (B, L, ...).
        sizes: lengths of the pieces, adding up to L; unless given a first piece of L // 3, then one
            token at a time, then the rest at once.
        tolerance: see the module.

    Raises:
        InvariantError: an output differs.
    """
    length = inputs.shape[1]
    if sizes is None:
        first = max(length // 3, 1)
        sizes = [first, *[1] * ((length - first) // 2)]
        sizes.append(length - sum(sizes))
    if sum(sizes) != length:
        raise ValueError(f"check_streaming: sizes must add up to {length}, got {list(sizes)}")
    want, _ = function(inputs, None)
    state, start = None, 0
    for size in sizes:
        if size == 0:
            continue
        got, state = function(inputs[:, start : start + size], state)
        _compare(
            got,
            want[:, start : start + size],
            f"streaming: tokens {start} to {start + size - 1} differ from those of one pass",
            tolerance,
        )
        start += size


@torch.no_grad()
def check_padding(
    function: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    lengths: Sequence[int] | None = None,
    *,
    sides: Sequence[str] = ("left", "right"),
    tolerance: float | None = None,
) -> None:
    """A padded row computes what it computes alone.

    Args:
        function: ``(inputs (B, L, ...), attention_mask (B, L) int64) -> (B, L, ...)``.
        inputs: (B, L, ...), every token real; what a row has beyond its length becomes its padding.
        lengths: real tokens of each row; unless given from L down to about L / 2.
        sides: where the padding is.
        tolerance: see the module.

    Raises:
        InvariantError: an output differs.
    """
    batch, length = inputs.shape[:2]
    if lengths is None:
        lengths = [max(length - row * max(length // (2 * batch), 1), 1) for row in range(batch)]
    for side in sides:
        columns = torch.arange(length, device=inputs.device)
        counts = torch.tensor(lengths, device=inputs.device)[:, None]
        real = columns >= length - counts if side == "left" else columns < counts
        together = function(inputs, real.long())
        for row in range(batch):
            alone = inputs[row : row + 1, real[row]]
            want = function(alone, torch.ones_like(real[:1, : alone.shape[1]], dtype=torch.int64))
            _compare(
                together[row, real[row]],
                want[0],
                f"padding: row {row}, of {lengths[row]} tokens, changes with {side} padding",
                tolerance,
            )


@torch.no_grad()
def check_batch_independence(
    function: Callable[[Tensor], Tensor], inputs: Tensor, *, tolerance: float | None = None
) -> None:
    """A row computes the same alone, with the others, and with them in another order.

    Args:
        function: (B, L, ...) -> (B, L, ...).
        inputs: (B, L, ...), B >= 2.
        tolerance: see the module.

    Raises:
        InvariantError: an output differs.
    """
    if inputs.shape[0] < 2:
        raise ValueError("check_batch_independence: one row has no others")
    want = function(inputs)
    got = function(inputs.flip(0)).flip(0)
    _compare(got, want, "batch: rows change with the order of the rows", tolerance)
    for row in range(inputs.shape[0]):
        _compare(
            function(inputs[row : row + 1])[0],
            want[row],
            f"batch: row {row} changes with the rows beside it",
            tolerance,
        )


def _spaced(length: int) -> list[int]:
    step = max((length - 1) // 8, 1)
    return sorted({1, *range(step, length, step), length - 1} & set(range(1, length)))


def _other(tokens: Tensor) -> Tensor:
    """At every place another token."""
    if tokens.is_floating_point():
        return 1.0 - tokens.flip(1)
    other = tokens.flip(1)
    # a reversal may leave tokens as they are: those take the smallest or largest id there is
    low, high = tokens.min(), tokens.max()
    return torch.where(other == tokens, torch.where(tokens == low, high, low), other)


def _compare(got: Tensor, want: Tensor, promise: str, tolerance: float | None) -> None:
    if got.shape != want.shape:
        raise InvariantError(f"{promise}: got shape {tuple(got.shape)} for {tuple(want.shape)}")
    if want.numel() == 0:
        return
    if tolerance is None:
        tolerance = _ULPS * torch.finfo(want.dtype).eps
    error = (got.double() - want.double()).abs()
    scale = want.double().abs().max()
    if not scale.isfinite():
        raise InvariantError(f"{promise}: what was expected is not finite")
    worst = int(error.nan_to_num(torch.inf).argmax())
    largest, bound = error.flatten()[worst].item(), tolerance * scale.item()
    # a NaN is not <= anything
    if not largest <= bound:
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
        raise InvariantError(f"{promise}, by {largest:.3g} at {place} (allowed: {bound:.3g})")
