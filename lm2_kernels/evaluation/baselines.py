"""What a memory has to beat: the same decoder without one, with another row's, or with RMT's.

Each is made of the decoder that :class:`lm2_kernels.LM2ForCausalLM` has, takes ``input_ids`` and
``labels`` as it does, and trains in the same loop. :func:`without_memory` and
:func:`full_attention` are configurations of it, and :func:`widened` gives a baseline as many
parameters as the model beside it has.
"""

import dataclasses

import torch
from torch import Tensor, nn

from lm2_kernels.checks import check_int
from lm2_kernels.model.config import LM2Config
from lm2_kernels.model.decoder import LM2ForCausalLM
from lm2_kernels.model.output import LM2Output
from lm2_kernels.state.cache import SegmentCache
from lm2_kernels.state.segments import is_cut

__all__ = [
    "RecurrentMemoryTransformer",
    "ShuffledMemory",
    "full_attention",
    "num_parameters",
    "widened",
    "without_memory",
]


def num_parameters(model: nn.Module) -> int:
    """How many numbers a model learns; what it has under two names counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def without_memory(config: LM2Config) -> LM2Config:
    """The decoder alone: of earlier segments it sees nothing."""
    return dataclasses.replace(config, memory_layers=())


def full_attention(config: LM2Config, length: int) -> LM2Config:
    """The decoder alone, with self-attention over all ``length`` tokens: the ceiling."""
    check_int("full_attention", "length", length, 1)
    return dataclasses.replace(config, memory_layers=(), segment_length=length)


def widened(config: LM2Config, parameters: int) -> LM2Config:
    """The configuration with the MLP's width that brings the model nearest to so many parameters.

    A step of the width is 3 D parameters a block. The width is at least 1.
    """
    check_int("widened", "parameters", parameters, 1)
    with torch.device("meta"):
        now = num_parameters(LM2ForCausalLM(config))
    step = 3 * config.hidden_size * config.num_hidden_layers
    width = config.intermediate_size + round((parameters - now) / step)
    return dataclasses.replace(config, intermediate_size=max(width, 1))


class ShuffledMemory(nn.Module):
    """A model whose rows swap their memories at every border of segments.

    Row b goes on with what row ``b - 1`` has written, from border to border. What a model answers
    by its memory falls to chance by it, and what it answers by other ways does not. There must be
    more rows than borders: else a row would meet again what it has written itself.

    Args:
        model: with memory layers; its parameters are shared, not copied.

    Raises:
        ValueError: the model has no memory layer.
    """

    def __init__(self, model: LM2ForCausalLM):
        super().__init__()
        if model.config.num_banks == 0:
            raise ValueError("ShuffledMemory: the model has no memory layer")
        self.model = model

    def forward(
        self,
        input_ids: Tensor,  # (B, L)
        labels: Tensor | None = None,  # (B, L)
        *,
        bptt_segments: int | None = None,
    ) -> LM2Output:
        """As of :class:`LM2ForCausalLM`, from the model's initial memory.

        Raises:
            ValueError: there are not more rows than borders, or an input does not fit the model.
        """
        model, (batch, length) = self.model, input_ids.shape
        model.check_inputs(input_ids, labels, None, None)
        borders = (length - 1) // model.config.segment_length
        if batch <= borders:
            raise ValueError(
                f"ShuffledMemory: with {borders} borders of segments there must be more than as "
                f"many rows, got {batch}"
            )
        state = model.initial_state(batch, input_ids.device)
        others, parts = [batch - 1, *range(batch - 1)], []
        for number, piece in enumerate(input_ids.split(model.config.segment_length, dim=1)):
            if number > 0:
                state = state.select(others)
            if is_cut(number, bptt_segments):
                state = state.detach()
            hidden, state = model.read(piece, state, keep=False)
            parts.append(hidden)
        return _output(model, torch.cat(parts, dim=1), labels)


class RecurrentMemoryTransformer(nn.Module):
    """RMT (Bulatov, Kuratov, Burtsev 2022, arXiv 2207.06881): memory as tokens of the input.

    A segment is read as ``[memory, its tokens, memory]``: m memory tokens in front, which all may
    read, and the same behind, which read all. What the last m positions come to, behind the
    decoder's last norm, is the next segment's memory. There is nothing else to write with than the
    decoder's own self-attention. The first segment's memory is learned, from normal numbers of the
    embeddings' deviation.

    Args:
        config: of the decoder, which has no memory layers; ``segment_length`` is of tokens alone.
        memory_tokens: m.

    Raises:
        TypeError, ValueError: an option does not fit.
    """

    def __init__(self, config: LM2Config, memory_tokens: int):
        super().__init__()
        check_int("RecurrentMemoryTransformer", "memory_tokens", memory_tokens, 1)
        if config.memory_layers:
            raise ValueError("RecurrentMemoryTransformer: the decoder must have memory_layers=()")
        self.config = config
        self.decoder = LM2ForCausalLM(config)
        self.initial_memory = nn.Parameter(torch.empty(memory_tokens, config.hidden_size))
        nn.init.normal_(self.initial_memory, std=config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,  # (B, L)
        labels: Tensor | None = None,  # (B, L)
        *,
        bptt_segments: int | None = None,
    ) -> LM2Output:
        """As of :class:`LM2ForCausalLM`, from the initial memory.

        Raises:
            TypeError, ValueError: an input does not fit the decoder.
        """
        model = self.decoder
        model.check_inputs(input_ids, labels, None, None)
        memory = self.initial_memory.expand(input_ids.shape[0], -1, -1)
        m, parts = self.initial_memory.shape[0], []
        for number, piece in enumerate(input_ids.split(self.config.segment_length, dim=1)):
            if is_cut(number, bptt_segments):
                memory = memory.detach()
            x = torch.cat([memory, model.model.embed_tokens(piece), memory], dim=1)
            length = x.shape[1]
            cache = SegmentCache({}, None, length, length, keep=False)
            hidden, _ = model.model.run(x, [], cache)
            parts.append(hidden[:, m : length - m])
            memory = hidden[:, length - m :]
        return _output(model, torch.cat(parts, dim=1), labels)


def _output(model: LM2ForCausalLM, hidden: Tensor, labels: Tensor | None) -> LM2Output:
    if labels is None:
        return LM2Output(logits=model.logits(hidden), loss=None, memory=None)
    return LM2Output(logits=None, loss=model.loss(hidden, labels), memory=None)
