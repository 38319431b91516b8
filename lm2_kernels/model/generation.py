"""Text generation: read the prompts once, then one token at a time from the state."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lm2_kernels.checks import check_int
from lm2_kernels.model.config import LM2Config
from lm2_kernels.state.cache import on_device
from lm2_kernels.state.memory import MemoryState
from lm2_kernels.state.segments import compress, gather

__all__ = ["Generated", "generate"]


@dataclasses.dataclass
class Generated:
    """What :func:`generate` returns."""

    sequences: Tensor  # (B, L + new tokens), the prompts as they came, and what follows
    memory: MemoryState  # after all tokens of each row: the next call goes on from there


class _Model(Protocol):
    """What :func:`generate` asks of a language model."""

    config: LM2Config

    def check_inputs(
        self,
        input_ids: Tensor,
        labels: Tensor | None,
        memory: MemoryState | None,
        attention_mask: Tensor | None,
    ) -> None: ...

    def check_streaming(self) -> None: ...

    def read(
        self, input_ids: Tensor, memory: MemoryState | None, lengths: list[int] | None
    ) -> tuple[Tensor, MemoryState]: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


@torch.no_grad()
def generate(
    model: _Model,
    input_ids: Tensor,  # (B, L)
    *,
    max_new_tokens: int = 20,
    attention_mask: Tensor | None = None,  # (B, L)
    memory: MemoryState | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
    on_token: Callable[[Tensor], object] | None = None,
) -> Generated:
    """Go on with prompts, greedily or by sampling.

    Keys and values of the segment, of self-attention and of the memory reads, are kept and not
    computed again. Step by step the logits are those of one ``forward`` over the whole text, across
    the borders of segments. Call ``model.eval()`` first if it has dropout.

    Args:
        model: the language model.
        input_ids: (B, L) int64, the prompts.
        max_new_tokens: how many tokens to add at most.
        attention_mask: (B, L), nonzero where a token is real. Prompts of different lengths are
            padded on the left, so that what is added follows their last token.
        memory: the state to go on from, as ``forward`` or ``generate`` returned it; None starts
            afresh.
        do_sample: draw from the distribution; otherwise take the likeliest token.
        temperature: divides the logits, above 0. As all that follow, needs ``do_sample``.
        top_k: draw from the k likeliest tokens.
        top_p: draw from the fewest likeliest tokens that together have this probability.
        eos_token_id: a row ends with this token, or one of these. With it, or with ``on_token``,
            each step waits once for the device; else none does.
        pad_token_id: fills rows that have ended; the (first) end token unless given.
        generator: of the draws, on the model's device.
        on_token: called with each step's tokens (B,), on the CPU, as they are made. Returning True
            stops.

    Returns:
        The sequences, and the state after them (end tokens included, padding not).

    Raises:
        TypeError, ValueError: an input or option does not fit, or the model cannot stream.
    """
    model.check_inputs(input_ids, None, memory, attention_mask)
    model.check_streaming()
    check_int("generate", "max_new_tokens", max_new_tokens, 1)
    ends = _check_options(
        model.config.vocab_size, do_sample, temperature, top_k, top_p, eos_token_id, pad_token_id
    )
    lengths, ids = None, input_ids
    if attention_mask is not None:
        real = attention_mask.bool()
        *lengths, is_padded_left = torch.cat([real.sum(dim=1), real[:, -1].all()[None]]).tolist()
        if not is_padded_left:
            raise ValueError(
                "generate: attention_mask hides the last token of a row; pad prompts on the left, "
                "so that what is added follows them"
            )
        order, lengths = compress(real, lengths)
        ids = gather(input_ids, order.to(ids.device, non_blocking=True))
    hidden, state = model.read(ids, memory, lengths)
    if lengths is None:
        last = hidden[:, -1]
    else:
        rows = torch.arange(len(lengths), device=ids.device)
        last = hidden[rows, on_device(lengths, ids.device) - 1]
    tokens, sequences = None, [input_ids]
    ended = [False] * ids.shape[0]
    fill = pad_token_id if pad_token_id is not None else ends[0] if ends else 0
    for step in range(max_new_tokens):
        if step > 0:
            last = hidden[:, 0]
        tokens = _choose(model.logits(last), do_sample, temperature, top_k, top_p, generator)
        if any(ended):
            tokens = torch.where(on_device(ended, ids.device), fill, tokens)
        sequences.append(tokens[:, None])
        # a row that has ended reads nothing more
        alive = [int(not done) for done in ended] if any(ended) else None
        hidden, state = model.read(tokens[:, None], state, alive)
        if not ends and on_token is None:
            continue
        # the only wait for the device in a step, and it has work meanwhile
        shown = tokens.cpu()
        stop = on_token is not None and on_token(shown) is True
        ended = [done or t in ends for done, t in zip(ended, shown.tolist(), strict=True)]
        if stop or all(ended):
            break
    return Generated(torch.cat(sequences, dim=1), state)


def _check_options(
    vocab_size: int,
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
) -> list[int]:
    """Raise unless the options make sense. Returns the end tokens."""
    ends = [] if eos_token_id is None else eos_token_id
    ends = list(ends) if isinstance(ends, Sequence) else [ends]
    for name, ids in (("eos_token_id", ends), ("pad_token_id", [pad_token_id])):
        for token in ids:
            if token is not None:
                check_int("generate", name, token, 0, vocab_size - 1)
    if not do_sample and (temperature != 1.0 or top_k is not None or top_p is not None):
        raise ValueError(
            "generate: temperature, top_k and top_p are for sampling; give do_sample=True too"
        )
    for name, value, high in (("temperature", temperature, math.inf), ("top_p", top_p, 1.0)):
        if value is None and name == "top_p":
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"generate: {name} must be a float, got {type(value).__name__}")
        if not 0.0 < value <= high or math.isinf(value):
            wanted = "above 0" if high > 1.0 else "in (0, 1]"
            raise ValueError(f"generate: {name} must be {wanted}, got {value}")
    if top_k is not None:
        check_int("generate", "top_k", top_k, 1)
    return ends


def _choose(
    logits: Tensor,  # (B, V)
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """The next token of each row. (B,)"""
    if not do_sample:
        return logits.argmax(dim=-1)
    # the largest is 0, however small the temperature
    scores = (logits.float() - logits.amax(-1, keepdim=True).float()) / temperature
    if top_k is None and top_p is None:
        return _draw(scores.softmax(-1), generator)
    probabilities, tokens = scores.softmax(-1).sort(-1, descending=True)
    if top_k is not None:
        probabilities[:, top_k:] = 0.0
    if top_p is not None:
        total = probabilities.sum(dim=-1, keepdim=True)
        # a token stays if those before it have less than top_p: the first one always does
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = torch.where(before < top_p * total, probabilities, 0.0)
    drawn = _draw(probabilities, generator)
    return tokens.gather(1, drawn[:, None])[:, 0]


def _draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """An index of each row, as ``torch.multinomial`` draws it, but for its checks of values."""
    waited = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / waited).argmax(dim=-1)
