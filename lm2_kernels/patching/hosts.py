"""What a host model looks like, and what its calls hold.

:data:`HOSTS` is the table: a family of hosts is one :class:`Host`, and nothing else in the package
knows it.
"""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lm2_kernels.state.segments import compress, leave_graph


@dataclasses.dataclass(frozen=True)
class Host:
    """What the models of a family have in common, by structure alone.

    A block is a module with a self-attention and an MLP. What the self-attention returns goes,
    whatever dropout or norm is between, into the residual stream: beside the MLP's output
    (parallel) or before it, which makes no difference to the memory.
    """

    family: str
    """What errors call it."""
    attention: str
    """Of a block: the self-attention."""
    projections: tuple[str, ...]
    """Of the self-attention: it has one of them."""
    output: str
    """Of the self-attention: the output projection."""
    mlp: tuple[str, ...]
    """Of a block: it has one of them."""
    widths: tuple[str, ...] = ("out_features",)
    """Of the output projection: the first that it has is the model's width."""
    cross: tuple[str, ...] = ()
    """Of a block: attentions to another model, with one of which it is refused."""
    returned: int = 0
    """Where the attention's output is in what the self-attention returns, if that is a tuple."""
    caches: tuple[str, ...] = ("cache", "past_key_values")
    """Arguments of the decoder's forward that hold the key/value cache, by version."""
    pass_keys: tuple[str, ...] = ("position_embeddings", "position_ids", "cache_position")
    """Keyword arguments of the self-attention, a tensor or a tuple of them, that each pass of the
    decoder makes anew and that recomputing a block gets again. Without, gradient checkpointing is
    refused in backward."""

    def is_block(self, module: nn.Module) -> bool:
        attention = getattr(module, self.attention, None)
        output = getattr(attention, self.output, None)
        return (
            isinstance(attention, nn.Module)
            and any(hasattr(attention, name) for name in self.projections)
            and any(hasattr(output, name) for name in self.widths)
            and any(hasattr(module, name) for name in self.mlp)
        )

    def width(self, block: nn.Module) -> int:
        output = getattr(self.attention_of(block), self.output)
        return next(getattr(output, name) for name in self.widths if hasattr(output, name))

    def attention_of(self, block: nn.Module) -> nn.Module:
        return getattr(block, self.attention)

    def attended(self, output: Tensor | tuple) -> Tensor:
        """The attention's output, in what the self-attention returned."""
        return output[self.returned] if isinstance(output, tuple) else output

    def replace_attended(self, output: Tensor | tuple, new: Tensor) -> Tensor | tuple:
        """What the self-attention returned, with another output."""
        if not isinstance(output, tuple):
            return new
        return (*output[: self.returned], new, *output[self.returned + 1 :])

    def cache(self, arguments: dict) -> object | None:
        """The key/value cache among the arguments of the decoder's forward."""
        found = (arguments.get(name) for name in self.caches)
        return next((cache for cache in found if cache is not None), None)

    def pass_key(self, kwargs: dict) -> Tensor | None:
        """Of a self-attention's arguments, a tensor whose address tells which pass it belongs to.

        See ``pass_keys``.
        """
        for name in self.pass_keys:
            value = kwargs.get(name)
            while isinstance(value, (tuple, list)):
                value = value[0]
            if isinstance(value, Tensor):
                return value
        return None

    def __str__(self) -> str:
        projections, mlp = " or ".join(self.projections), " or ".join(self.mlp)
        return f"{self.family}: {self.attention} (with {projections}, and {self.output}) and {mlp}"


# each list of blocks is of the first family that knows one of them
HOSTS = (
    Host(
        "Llama, Qwen, Mistral, Gemma, Phi-3 and the like",
        attention="self_attn",
        projections=("q_proj", "qkv_proj", "q_a_proj"),
        output="o_proj",
        mlp=("mlp", "block_sparse_moe", "feed_forward"),
    ),
    Host(
        "GPT-2",
        attention="attn",
        projections=("c_attn",),
        output="c_proj",
        mlp=("mlp",),
        # transformers' Conv1D, a Linear with its weight transposed
        widths=("nf", "out_features"),
        cross=("crossattention",),
    ),
    Host(
        "GPT-NeoX",
        attention="attention",
        projections=("query_key_value",),
        output="dense",
        mlp=("mlp",),
    ),
    Host(
        "Falcon",
        attention="self_attention",
        projections=("query_key_value",),
        output="dense",
        mlp=("mlp",),
    ),
    Host(
        "Phi",
        attention="self_attn",
        projections=("q_proj",),
        output="dense",
        mlp=("mlp",),
    ),
    Host(
        "OPT",
        attention="self_attn",
        projections=("q_proj",),
        output="out_proj",
        mlp=("fc1",),
        cross=("encoder_attn",),
    ),
)


class Blocks(NamedTuple):
    """The blocks of a host model."""

    host: Host
    name: str  # of the list
    decoder: nn.Module  # owns the list
    blocks: nn.ModuleList


def find_blocks(model: nn.Module, hosts: Sequence[Host] | None = None) -> Blocks:
    """The one list of decoder blocks that one of the hosts knows; of :data:`HOSTS` unless given.

    Raises:
        ValueError: there is none, or there are several; or they cannot have a memory.
    """
    hosts = HOSTS if hosts is None else hosts
    found = []
    for name, module in model.named_modules():
        for child_name, child in module.named_children():
            if not isinstance(child, nn.ModuleList):
                continue
            host = next((host for host in hosts if any(map(host.is_block, child))), None)
            if host is not None:
                found.append(Blocks(host, f"{name}.{child_name}".lstrip("."), module, child))
    if not found:
        looked_for = "".join(f"\n  {host}" for host in hosts)
        raise ValueError(
            f"add_memory: {type(model).__name__} has no list of decoder blocks: looked for an "
            f"nn.ModuleList of modules that have, by family,{looked_for}\nFor other names, pass "
            f"host=lm2_kernels.patching.Host(...)"
        )
    # an encoder beside the decoder (of images, of sound) keeps no cache
    decoders = [blocks for blocks in found if _follows_cache(blocks)]
    if not decoders:
        host, _, owner, _ = found[0]
        raise ValueError(
            f"add_memory: the forward of {type(owner).__name__}, which owns the blocks, must take "
            f"attention_mask and {' or '.join(host.caches)}, got {_arguments(owner)}"
        )
    if len(decoders) > 1:
        raise ValueError(
            f"add_memory: {type(model).__name__} has several lists of blocks, "
            f"{[blocks.name for blocks in decoders]}; pass the submodule that owns the one you mean"
        )
    host, name, _, blocks = decoders[0]
    attentions = [host.attention_of(block) for block in blocks if host.is_block(block)]
    if any("residual" in _arguments(attention) for attention in attentions):
        # as BLOOM's
        raise ValueError(
            f"add_memory: the self-attention of the blocks of {name} is given the residual stream "
            f"and adds it: its output, which a memory would read, is not the attention's own"
        )
    for cross in host.cross:
        if any(hasattr(block, cross) for block in blocks):
            raise ValueError(
                f"add_memory: the blocks of {name} have cross-attention ({cross}): what they read "
                f"of another model is not in the memory, and its cache is not followed; take a "
                f"model without"
            )
    return decoders[0]


def _arguments(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _follows_cache(blocks: Blocks) -> bool:
    names = _arguments(blocks.decoder)
    return "attention_mask" in names and any(name in names for name in blocks.host.caches)


_PACKED = (
    "add_memory: position_ids must ascend along each row: several sequences packed into one row "
    "would share its memory; give each a row, padded, with a 2-D attention_mask"
)


def read_tokens(
    mask: object, positions: object, batch: int, length: int, num_columns: int
) -> tuple[Tensor, Tensor, list[int]] | None:
    """Which of the pass's L tokens are real; None if all are. One wait for the device at most.

    Args:
        mask: any attention mask of transformers, or None.
        positions: ``position_ids`` of the pass, or None.
        batch: B.
        length: L.
        num_columns: tokens up to the end of the pass, those of the cache included.

    Returns:
        real (B, L) bool, and of it the order and the lengths of :func:`compress`.

    Raises:
        TypeError, ValueError: the mask does not fit, or several sequences are in one row.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    real, is_plain = None, []
    if mask is not None:
        leave_graph(
            "add_memory: torch.compile(fullgraph=True) and torch.export take no attention_mask, "
            "whose values say how the tokens lie in segments; leave it out where nothing is padded"
        )
        real, is_plain = _real_tokens(mask, batch, length, num_columns)
    is_ascending = []
    if isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] > 1:
        is_ascending = [_ascend(positions, real)]
        if torch.compiler.is_compiling():
            torch._assert_async(is_ascending.pop(), _PACKED)
    if real is None and not is_ascending:
        return None
    lengths = [] if real is None else [real.sum(dim=1)]
    values = _values([*lengths, *is_plain, *is_ascending])
    if is_plain and not values[len(lengths)][0]:
        raise ValueError(
            "add_memory: a 4-D attention_mask must be causal with padding and nothing else: the "
            "memory would mix what a mask of packed sequences, or a window, keeps apart; pass a "
            "2-D mask"
        )
    if is_ascending and not values[-1][0]:
        raise ValueError(_PACKED)
    if real is None or min(values[0], default=length) == length:
        return None
    return real, *compress(real, values[0])


def _values(tensors: list[Tensor]) -> list[list[int]]:
    """What small tensors hold, with one wait for each device that some are on."""
    found = {}
    for device in {tensor.device for tensor in tensors}:
        own = [index for index, tensor in enumerate(tensors) if tensor.device == device]
        flat = torch.cat([tensors[index].reshape(-1).long() for index in own]).tolist()
        for index in own:
            found[index], flat = flat[: tensors[index].numel()], flat[tensors[index].numel() :]
    return [found[index] for index in range(len(tensors))]


def _real_tokens(
    mask: object, batch: int, length: int, num_columns: int
) -> tuple[Tensor, list[Tensor]]:
    """Which tokens are real (B, L) bool; of a 4-D mask also whether it says nothing else."""
    start = num_columns - length
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        what = mask.dim() if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"add_memory: attention_mask must be a 2-D or 4-D tensor, got {what}")
    if mask.shape[0] not in (1, batch) or mask.shape[-1] < num_columns:
        raise ValueError(
            f"add_memory: attention_mask must be ({batch}, {num_columns}), cached tokens included, "
            f"got {tuple(mask.shape)}"
        )
    if mask.dim() == 2:
        return mask[:, start:num_columns].bool().expand(batch, length), []
    # 4-D: bool, True = visible, or added to the scores
    visible = mask if mask.dtype == torch.bool else mask == 0
    visible = visible[:, 0, :, start:num_columns].expand(batch, length, length)
    real = visible[:, -1]
    causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    is_plain = (visible == causal & real[:, None]).all(-1)
    # for some kernels, tokens that would see nothing see everything
    is_plain |= visible.all(-1) & ~real
    return real, [is_plain.all()]


def _ascend(positions: Tensor, real: Tensor | None) -> Tensor:
    """Whether the real tokens' positions (B or 1, L) ascend along each row, a bool scalar.

    Where they start anew, there are several sequences in one row.
    """
    if real is None:
        return (positions[:, 1:] > positions[:, :-1]).all()
    real = real.to(positions.device, non_blocking=True)
    # the largest position before each token, of the real ones
    smallest = torch.iinfo(positions.dtype).min if not positions.is_floating_point() else -torch.inf
    before = positions.expand_as(real).masked_fill(~real, smallest).cummax(dim=1).values[:, :-1]
    return ((positions[:, 1:] > before) | ~real[:, 1:]).all()
