"""The ops for callers who have checked their inputs: choose the backend, call the Function.

What may be asked is what :mod:`lm2_kernels.functional` lets through, in the dtypes that an autocast
casts to; a kernel that is handed anything else may read beyond its tensors.
"""

import math

import torch
from torch import Tensor

from lm2_kernels.autograd import (
    MemoryAttentionFunction,
    MemoryUpdateFunction,
    PooledGateFunction,
    ResidualLayerNormFunction,
    apply,
)
from lm2_kernels.backends import select


def contiguous_rows(tensor: Tensor) -> Tensor:
    """The tensor with a contiguous last axis: itself, or a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def default_scale(query: Tensor) -> float:
    """What ``scale=None`` is, of queries (B, T, H, K)."""
    return 1.0 / math.sqrt(query.shape[-1])


def draw_seed(device: torch.device) -> Tensor:
    """A dropout seed as a tensor on the device: no synchronisation, and a replayed CUDA graph
    draws a new one.
    """
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def memory_attention(
    query: Tensor,  # (B, T, H, K)
    key: Tensor,  # (B, N, H, K)
    value: Tensor,  # (B, N, H, K)
    *,
    causal: bool,
    slot_offset: int,
    slot_mask: Tensor | None,  # (B, N)
    scale: float | None,
    top_k: int | None,
    dropout_p: float,
    backend: str | None,
) -> Tensor:
    """See :func:`lm2_kernels.memory_attention`."""
    name = select("memory_attention", (query, key, value), backend)
    out, _ = apply(
        MemoryAttentionFunction,
        contiguous_rows(query),
        contiguous_rows(key),
        contiguous_rows(value),
        slot_mask,
        draw_seed(query.device) if dropout_p > 0.0 else None,
        causal,
        # further on every token sees every slot, and a kernel's 32-bit sums stay small
        min(slot_offset, key.shape[1]),
        default_scale(query) if scale is None else float(scale),
        top_k,
        float(dropout_p),
        name,
    )
    return out


def memory_update(
    hidden: Tensor,  # (B, T, D)
    candidate: Tensor,  # (B, T, D)
    memory: Tensor,  # (B, R, D)
    input_gate: Tensor,  # (B, T or R or 1, D)
    forget_gate: Tensor,  # (B, T or R or 1, D)
    output_gate: Tensor | None = None,  # (B, T or R or 1, D)
    *,
    gate_bias: Tensor | None = None,  # (B, T or R or 1, 2 * D)
    read: Tensor | None = None,  # (B, T, D)
    output: str = "read",
    tokens_per_slot: int = 1,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`lm2_kernels.memory_update`."""
    name = select("memory_update", (hidden, candidate, memory), backend)
    return apply(
        MemoryUpdateFunction,
        contiguous_rows(hidden),
        contiguous_rows(candidate),
        contiguous_rows(memory),
        contiguous_rows(input_gate),
        contiguous_rows(forget_gate),
        None if output_gate is None else contiguous_rows(output_gate),
        None if gate_bias is None else contiguous_rows(gate_bias),
        None if read is None else contiguous_rows(read),
        output,
        tokens_per_slot,
        name,
    )


def residual_layer_norm(
    x: Tensor,  # (B, T, D)
    residual: Tensor,  # (B, T, D)
    weight: Tensor,  # (D,)
    bias: Tensor,  # (D,)
    eps: float,
    *,
    backend: str | None,
) -> Tensor:
    """See :func:`lm2_kernels.functional.residual_layer_norm`."""
    name = select("residual_layer_norm", (x, residual, weight, bias), backend)
    rows = (
        contiguous_rows(x),
        contiguous_rows(residual),
        contiguous_rows(weight),
        contiguous_rows(bias),
    )
    out, _, _ = apply(ResidualLayerNormFunction, *rows, eps, name)
    return out


def pooled_gate(
    x: Tensor,  # (B, T, D)
    weight: Tensor,  # (D,)
    *,
    prefix: bool,
    pooled_sum: Tensor | None,  # (B, D)
    num_pooled: int,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`lm2_kernels.functional.pooled_gate`."""
    name = select("pooled_gate", (x, weight), backend)
    pooled_sum = None if pooled_sum is None else contiguous_rows(pooled_sum)
    return apply(
        PooledGateFunction,
        contiguous_rows(x),
        contiguous_rows(weight),
        pooled_sum,
        prefix,
        num_pooled,
        name,
    )
