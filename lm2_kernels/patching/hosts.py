"""What a host model looks like, and what its calls hold."""

import inspect

import torch
from torch import Tensor, nn

from lm2_kernels.state.segments import gather

CACHE_NAMES = ("cache", "past_key_values")


def pass_key(kwargs: dict) -> Tensor | None:
    """Of a self-attention's arguments, a tensor that each pass of the decoder makes anew, and that
    recomputing a block gets again: its address tells which pass that belongs to.
    """
    value = kwargs.get("position_embeddings")
    while isinstance(value, (tuple, list)):
        value = value[0]
    value = kwargs.get("position_ids") if value is None else value
    return value if isinstance(value, Tensor) else None


def real_tokens(mask: object, batch: int, length: int, num_columns: int) -> Tensor:
    """Which of the pass's L tokens are real, from any mask of transformers: (B, L) bool."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
        if mask is None:
            return torch.ones(batch, length, dtype=torch.bool)
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
        return mask[:, start:num_columns].bool().expand(batch, length)
    # 4-D: bool, True = visible, or added to the scores
    visible = mask if mask.dtype == torch.bool else mask == 0
    visible = visible[:, 0, :, start:num_columns].expand(batch, length, length)
    real = visible[:, -1]
    causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    is_plain = (visible == causal & real[:, None]).all(-1)
    # for some kernels, tokens that would see nothing see everything
    is_plain |= visible.all(-1) & ~real
    if not is_plain.all():
        raise ValueError(
            "add_memory: a 4-D attention_mask must be causal with padding and nothing else: the "
            "memory would mix what a mask of packed sequences, or a window, keeps apart; pass a "
            "2-D mask"
        )
    return real


def refuse_packed(positions: Tensor, order: Tensor | None, lengths: list[int] | None) -> None:
    """Raise ValueError if a row's positions start anew: several sequences in one row."""
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] < 2:
        return
    ascends = None
    if order is not None:
        positions = gather(positions.expand_as(order), order)
        ends = torch.tensor(lengths, device=positions.device)[:, None]
        ascends = torch.arange(1, positions.shape[1], device=positions.device) >= ends
    is_later = positions[:, 1:] > positions[:, :-1]
    if not (is_later if ascends is None else is_later | ascends).all():
        raise ValueError(
            "add_memory: position_ids must ascend along each row: several sequences packed into "
            "one row would share its memory; give each a row, padded, with a 2-D attention_mask"
        )


def is_block(module: nn.Module) -> bool:
    attention = getattr(module, "self_attn", None)
    return (
        isinstance(attention, nn.Module)
        and any(hasattr(attention, name) for name in ("q_proj", "qkv_proj", "q_a_proj"))
        and hasattr(getattr(attention, "o_proj", None), "out_features")
        and any(hasattr(module, name) for name in ("mlp", "block_sparse_moe", "feed_forward"))
    )


def find_blocks(model: nn.Module) -> tuple[str, nn.Module, nn.ModuleList]:
    """The name of the list of blocks, the decoder that owns it, and the list."""
    found = []
    for name, module in model.named_modules():
        for child_name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and any(map(is_block, child)):
                found.append((f"{name}.{child_name}".lstrip("."), module, child))
    if not found:
        raise ValueError(
            f"add_memory: {type(model).__name__} has no list of decoder blocks: looked for an "
            f"nn.ModuleList of modules that have a self_attn (with q_proj or qkv_proj, and o_proj) "
            f"and an mlp"
        )
    if len(found) > 1:
        raise ValueError(
            f"add_memory: {type(model).__name__} has several lists of blocks, "
            f"{[name for name, _, _ in found]}; pass the submodule that owns the one you mean"
        )
    names = inspect.signature(found[0][1].forward).parameters
    if "attention_mask" not in names or not any(name in names for name in CACHE_NAMES):
        raise ValueError(
            f"add_memory: the forward of {type(found[0][1]).__name__}, which owns the blocks, must "
            f"take attention_mask and past_key_values, got {list(names)}"
        )
    return found[0]
