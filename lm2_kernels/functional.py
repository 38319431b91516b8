"""The public ops: check the inputs, then :mod:`lm2_kernels.unchecked`.

Every check happens before anything is computed, and every message names the op, what was expected,
what came, and the way out. Only an autocast's casts come earlier, as dtypes and the backend are
judged by the tensors that the op will compute with.
"""

import torch
from torch import Tensor

from lm2_kernels import backends, unchecked
from lm2_kernels.checks import (
    check_bool,
    check_dropout,
    check_dtypes,
    check_eps,
    check_int,
    check_mixed,
    check_nonempty,
    check_pooled_sum,
    check_scale,
    check_shape,
    check_slot_mask,
    check_tensors,
)
from lm2_kernels.chunks import num_rows


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, the tensors in its dtype, as torch does for its own matrix products."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if backends.autocast_dtype(device) is None:
        return tensors
    return tuple(
        tensor if tensor is None else tensor.to(backends.computed_dtype(tensor))
        for tensor in tensors
    )


def memory_attention(
    query: Tensor,  # (B, T, H, K)
    key: Tensor,  # (B, N, H, K)
    value: Tensor,  # (B, N, H, K)
    *,
    causal: bool = True,
    slot_offset: int = 0,
    slot_mask: Tensor | None = None,  # (B, N)
    scale: float | None = None,
    top_k: int | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Tokens read the memory slots by cross-attention.

    ``R = dropout(top_k(softmax(Q K^T * scale))) V`` per head, over the slots a token sees: token
    ``t`` sees slot ``j`` iff (``causal`` is False or ``j <= slot_offset + t``) and (``slot_mask``
    is None or ``slot_mask[b, j]``). A token that sees no slot reads 0 and passes no gradient.
    Source: LM2 (arXiv 2502.06049) equations 1 and 2; slot offset and mask are our definition.

    Accumulates in float32 (float64 for float64). Any strides with a contiguous last axis are taken
    without a copy. What a slot hidden by ``slot_mask`` holds never matters, NaN included; a
    non-finite value in a slot that only ``causal`` hides can reach earlier tokens through
    ``0 * NaN``, as in any blocked attention, and values near the largest number of float32 can
    overflow, where their sum before it is normalised does. Under autocast the inputs are cast as
    ``scaled_dot_product_attention`` casts its own. The dropout mask is a function of a seed drawn
    from the device's default generator (``torch.manual_seed``), the same in every backend.

    Args:
        query: (B, T, H, K).
        key: (B, N, H, K).
        value: (B, N, H, K).
        causal: whether the slot of a later token is hidden.
        slot_offset: the slot that token 0 is bound to; tokens bound past the last slot see all.
        slot_mask: (B, N) bool, True = takes part, as in ``scaled_dot_product_attention``.
        scale: factor on the scores, ``1 / sqrt(K)`` unless given.
        top_k: keep the k largest probabilities of each row, zero the others, do not renormalise;
            of slots with equal scores the lower ones are kept, on every backend.
        dropout_p: probability to zero a probability, after top-k; the others are divided by
            ``1 - dropout_p``. The caller decides about training and evaluation.
        backend: the name of one, or "auto"; None takes the default (``use_backend``).

    Returns:
        (B, T, H, K) in ``query``'s dtype.

    Raises:
        TypeError: not a tensor, an unsupported dtype or layout, dtypes that differ.
        ValueError: a wrong rank or size, several devices, an option out of range.
        RuntimeError: a backend asked for by name cannot run this call; the text says why.
    """
    op = "memory_attention"
    check_tensors(op, query=query, key=key, value=value)
    check_shape(op, "query", query, "(B, T, H, K)", (None,) * 4)
    batch, _, num_heads, head_width = query.shape
    check_shape(op, "key", key, "(B, N, H, K)", (batch, None, num_heads, head_width))
    num_slots = key.shape[1]
    check_shape(op, "value", value, "(B, N, H, K)", (batch, num_slots, num_heads, head_width))
    check_nonempty(op, "query", query, {"tokens T": 1, "heads H": 2, "head width K": 3})
    check_nonempty(op, "key", key, {"slots N": 1})
    if slot_mask is not None:
        check_slot_mask(op, slot_mask, batch, num_slots, query.device)
    check_bool(op, "causal", causal)
    check_int(op, "slot_offset", slot_offset, 0)
    if top_k is not None:
        check_int(op, "top_k", top_k, 1, num_slots)
    check_dropout(op, dropout_p)
    if scale is not None:
        check_scale(op, scale)
    query, key, value = _autocast(query, key, value)
    check_dtypes(op, query.dtype, (), query=query, key=key, value=value)
    return unchecked.memory_attention(
        query,
        key,
        value,
        causal=causal,
        slot_offset=slot_offset,
        slot_mask=slot_mask,
        scale=scale,
        top_k=top_k,
        dropout_p=dropout_p,
        backend=backend,
    )


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The gated write of the rows that a segment is bound to, and what the layer shows.

    Token ``t`` is bound to row ``r = t // tokens_per_slot`` of the
    ``R = ceil(T / tokens_per_slot)`` rows, and proposes for it
    ``m_t = sigma(input_gate_t) * tanh(candidate_t) + sigma(forget_gate_t) * memory_r``. The new row
    ``M'_r`` is the mean of its tokens' proposals: ``m_t`` itself at one token per slot. The last
    row may have fewer tokens than the others.

    Without ``output_gate``, ``output = hidden + m`` (the released code); with it,
    ``output = hidden + sigma(output_gate) * read`` (the paper's equations 3 to 6, where ``read`` is
    ``candidate``; ``output="memory"`` shows ``memory_r`` instead, equation 3 read literally).
    Several tokens per slot and a ``read`` besides the candidate are our definition.

    Accumulates in float32 (float64 for float64). ``hidden`` and ``memory`` may be float32 while the
    others are bfloat16 or float16.

    Args:
        hidden: (B, T, D), what the output is added to.
        candidate: (B, T, D), what is written: the read R (paper), the attended memory (release),
            either perhaps with a term of the token.
        memory: (B, R, D), the rows as they were.
        input_gate: before the sigmoid, with a row a token (B, T, D), a row a slot (B, R, D), or one
            for all (B, 1, D).
        forget_gate: likewise.
        output_gate: likewise, or None.
        gate_bias: added to ``[input_gate | forget_gate]``, (B, T or R or 1, 2 D): the pooled part
            of the released gates, added inside the kernel.
        read: (B, T, D), what an output gate shows, where that is not the candidate.
        output: "read" or "memory"; ignored without ``output_gate``.
        tokens_per_slot: how many tokens are bound to a row.
        backend: the name of one, or "auto"; None takes the default (``use_backend``).

    Returns:
        output (B, T, D) in ``hidden``'s dtype, new memory (B, R, D) in ``memory``'s dtype.

    Raises:
        TypeError: not a tensor, an unsupported dtype or layout, dtypes that do not go together.
        ValueError: a wrong rank or size, several devices, an unknown ``output``, a ``read`` that is
            not shown.
        RuntimeError: a backend asked for by name cannot run this call; the text says why.
    """
    op = "memory_update"
    tensors = {
        "hidden": hidden,
        "candidate": candidate,
        "memory": memory,
        "input_gate": input_gate,
        "forget_gate": forget_gate,
        "output_gate": output_gate,
        "gate_bias": gate_bias,
        "read": read,
    }
    check_tensors(op, optional=("output_gate", "gate_bias", "read"), **tensors)
    check_shape(op, "hidden", hidden, "(B, T, D)", (None,) * 3)
    batch, num_tokens, width = hidden.shape
    check_nonempty(op, "hidden", hidden, {"tokens T": 1, "width D": 2})
    check_int(op, "tokens_per_slot", tokens_per_slot, 1)
    rows, legend = num_rows(num_tokens, tokens_per_slot), "T or 1"
    if tokens_per_slot > 1:
        legend = "T or R or 1"
    check_shape(op, "candidate", candidate, "(B, T, D)", (batch, num_tokens, width))
    row_legend = "(B, T, D)" if tokens_per_slot == 1 else "(B, R = ceil(T / tokens_per_slot), D)"
    check_shape(op, "memory", memory, row_legend, (batch, rows, width))
    for name, columns, last in (
        ("input_gate", width, "D"),
        ("forget_gate", width, "D"),
        ("output_gate", width, "D"),
        ("gate_bias", 2 * width, "2 * D"),
    ):
        gate = tensors[name]
        if gate is None:
            continue
        shared = gate.dim() == 3 and gate.shape[1] in (1, rows)
        own = gate.shape[1] if shared else num_tokens
        check_shape(op, name, gate, f"(B, {legend}, {last})", (batch, own, columns))
    if output not in ("read", "memory"):
        raise ValueError(f"{op}: output must be 'read' or 'memory', got {output!r}")
    if read is not None:
        check_shape(op, "read", read, "(B, T, D)", (batch, num_tokens, width))
        if output_gate is None or output == "memory":
            raise ValueError(
                f"{op}: read is what an output gate shows with output='read'; without an "
                f"output_gate, or with output='memory', leave it out"
            )
    candidate, input_gate, forget_gate, output_gate, gate_bias, read = _autocast(
        candidate, input_gate, forget_gate, output_gate, gate_bias, read
    )
    check_dtypes(
        op,
        candidate.dtype,
        ("hidden", "memory"),
        hidden=hidden,
        memory=memory,
        input_gate=input_gate,
        forget_gate=forget_gate,
        output_gate=output_gate,
        gate_bias=gate_bias,
        read=read,
    )
    return unchecked.memory_update(
        hidden,
        candidate,
        memory,
        input_gate,
        forget_gate,
        output_gate,
        gate_bias=gate_bias,
        read=read,
        output=output,
        tokens_per_slot=tokens_per_slot,
        backend=backend,
    )


def residual_layer_norm(
    x: Tensor,  # (B, T, D)
    residual: Tensor,  # (B, T, D)
    weight: Tensor,  # (D,)
    bias: Tensor,  # (D,)
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Add and normalise: ``LayerNorm(x + residual)``.

    ``(s - mean(s)) / sqrt(var(s) + eps) * weight + bias`` with ``s = x + residual`` over the last
    axis, in float32 (float64 for float64) with a two-pass variance. Source: the released code.

    Args:
        x: (B, T, D), the branch; gives the result its dtype.
        residual: (B, T, D), the stream; float32 or ``x``'s dtype.
        weight: (D,), any floating-point dtype.
        bias: (D,), ``weight``'s dtype.
        eps: added to the variance, above 0.
        backend: the name of one, or "auto"; None takes the default (``use_backend``).

    Returns:
        (B, T, D) in ``x``'s dtype.

    Raises:
        TypeError: not a tensor, an unsupported dtype or layout, dtypes that do not go together.
        ValueError: a wrong rank or size, several devices, ``eps`` not above 0.
        RuntimeError: a backend asked for by name cannot run this call; the text says why.
    """
    op = "residual_layer_norm"
    check_tensors(op, x=x, residual=residual, weight=weight, bias=bias)
    check_shape(op, "x", x, "(B, T, D)", (None,) * 3)
    check_nonempty(op, "x", x, {"tokens T": 1, "width D": 2})
    check_shape(op, "residual", residual, "(B, T, D)", tuple(x.shape))
    check_shape(op, "weight", weight, "(D,)", (x.shape[-1],))
    check_shape(op, "bias", bias, "(D,)", (x.shape[-1],))
    check_eps(op, eps)
    check_mixed(op, x=x.dtype, residual=residual.dtype)
    check_mixed(op, x=x.dtype, weight=weight.dtype)
    check_dtypes(op, weight.dtype, (), weight=weight, bias=bias)
    return unchecked.residual_layer_norm(x, residual, weight, bias, eps, backend=backend)


def pooled_gate(
    x: Tensor,  # (B, T, D)
    weight: Tensor,  # (D,)
    *,
    prefix: bool = False,
    pooled_sum: Tensor | None = None,  # (B, D)
    num_pooled: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean over tokens of ``relu(weight * x)``, the input of the released code's pooled gate.

    Of the whole segment (the released code: early tokens see later ones), or with ``prefix`` of the
    tokens ``<= t`` (our causal repair): ``(pooled_sum + sum_{u<=t} relu(weight * x_u)) /
    (num_pooled + t + 1)``. Sums are float32 (float64 for float64).

    Args:
        x: (B, T, D).
        weight: (D,), any floating-point dtype.
        prefix: running mean in place of the segment's mean.
        pooled_sum: (B, D) float32 (float64 for float64), the sum over earlier pieces of the
            segment; only with ``prefix``.
        num_pooled: how many tokens ``pooled_sum`` holds.
        backend: the name of one, or "auto"; None takes the default (``use_backend``).

    Returns:
        pooled (B, 1, D), or (B, T, D) with ``prefix``, in ``x``'s dtype; the sum over all tokens so
        far (B, D), float32 (float64 for float64).

    Raises:
        TypeError: not a tensor, an unsupported dtype or layout, dtypes that do not go together.
        ValueError: a wrong rank or size, several devices, ``pooled_sum`` without ``prefix``.
        RuntimeError: a backend asked for by name cannot run this call; the text says why.
    """
    op = "pooled_gate"
    check_tensors(op, optional=("pooled_sum",), x=x, weight=weight, pooled_sum=pooled_sum)
    check_shape(op, "x", x, "(B, T, D)", (None,) * 3)
    check_nonempty(op, "x", x, {"tokens T": 1, "width D": 2})
    check_shape(op, "weight", weight, "(D,)", (x.shape[-1],))
    check_mixed(op, x=x.dtype, weight=weight.dtype)
    check_bool(op, "prefix", prefix)
    check_int(op, "num_pooled", num_pooled, 0)
    if pooled_sum is not None:
        if not prefix:
            raise ValueError(
                f"{op}: pooled_sum needs prefix=True: the mean of a whole segment cannot be "
                f"continued"
            )
        check_pooled_sum(op, pooled_sum, x)
    elif num_pooled:
        raise ValueError(f"{op}: num_pooled is {num_pooled} but no pooled_sum was given")
    return unchecked.pooled_gate(
        x,
        weight,
        prefix=prefix,
        pooled_sum=pooled_sum,
        num_pooled=num_pooled,
        backend=backend,
    )


def initial_memory(
    batch: int,
    slots: int,
    dim: int | None = None,
    kind: str = "identity",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A memory bank to start from.

    Args:
        batch: B, may be 0.
        slots: N.
        dim: D, the model width; ``slots`` unless given.
        kind: "identity" (slot n holds the unit vector ``e_(n mod D)``, as the released code starts)
            or "zeros". For a learned start, make the result an ``nn.Parameter`` and expand it.
        device: where; torch's default unless given.
        dtype: which; torch's default unless given.

    Returns:
        (B, N, D), a tensor of its own (not an expanded view).

    Raises:
        TypeError: a size is not an int, or ``dtype`` is not a floating-point one.
        ValueError: a size is out of range, or ``kind`` is unknown.
    """
    op = "initial_memory"
    dim = slots if dim is None else dim
    check_int(op, "batch", batch, 0)
    check_int(op, "slots", slots, 1)
    check_int(op, "dim", dim, 1)
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"{op}: dtype must be a floating-point dtype, got {dtype}")
    if kind not in ("identity", "zeros"):
        raise ValueError(f"{op}: kind must be 'identity' or 'zeros', got {kind!r}")
    memory = torch.zeros(batch, slots, dim, device=device, dtype=dtype)
    if kind == "identity":
        slot = torch.arange(slots, device=device)
        memory[:, slot, slot % dim] = 1.0
    return memory
