"""Tokens and the slots that they are bound to: token ``t`` to row ``t // tokens_per_slot``.

Of ``T`` tokens that are ``R = ceil(T / tokens_per_slot)`` rows, the last one perhaps of fewer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def num_rows(num_tokens: int, tokens_per_slot: int) -> int:
    """R."""
    return -(-num_tokens // tokens_per_slot)


def counts(num_tokens: int, tokens_per_slot: int, device: torch.device) -> Tensor:
    """How many tokens each row has, (R, 1) int64."""
    rows = torch.arange(num_rows(num_tokens, tokens_per_slot), device=device)
    return (num_tokens - rows * tokens_per_slot).clamp(max=tokens_per_slot)[:, None]


def by_slot(x: Tensor, tokens_per_slot: int, num_tokens: int) -> Tensor:
    """(B, R, tokens_per_slot, ...): rows of tokens slot by slot, with zeros behind the last token.

    Of (B, R, ...) or (B, 1, ...), rows that tokens share, it is (B, R or 1, 1, ...).
    """
    if x.shape[1] != num_tokens:
        return x[:, :, None]
    missing = -num_tokens % tokens_per_slot
    if missing:
        x = F.pad(x, (*(0, 0) * (x.dim() - 2), 0, missing))
    return x.unflatten(1, (-1, tokens_per_slot))


def tokens_of(x: Tensor, num_tokens: int) -> Tensor:
    """(B, T, ...): what :func:`by_slot` made of rows of tokens, without the zeros."""
    return x.flatten(1, 2)[:, :num_tokens]


def sum_by_slot(x: Tensor, tokens_per_slot: int, first: int = 0) -> Tensor:
    """The sum over each row's tokens of (B, T, ...), (B, R, ...).

    ``first``: the place of the first token among those of its row.
    """
    if tokens_per_slot == 1:
        return x
    # no zeros are added to what is not a whole row: that may have far fewer tokens
    head = min(tokens_per_slot - first, x.shape[1]) if first else 0
    end = x.shape[1] - (x.shape[1] - head) % tokens_per_slot
    sums = []
    if head:
        sums.append(x[:, :head].sum(dim=1, keepdim=True))
    if head < end:
        sums.append(x[:, head:end].unflatten(1, (-1, tokens_per_slot)).sum(dim=2))
    if end < x.shape[1]:
        sums.append(x[:, end:].sum(dim=1, keepdim=True))
    return sums[0] if len(sums) == 1 else torch.cat(sums, dim=1)
