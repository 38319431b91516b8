"""The oracle: every op and both layers in plain differentiable PyTorch, equation by equation.

This file is the specification. It imports torch alone, runs in any dtype, materialises what it
likes, and is what every backend is tested against: ``testing`` and ``bench`` compare with it, and
no layer or op computes with it.

Shapes, used everywhere in the package:

=====  ==========================================
``B``  batch
``T``  tokens of the segment
``N``  memory slots
``D``  model width, ``D = H * K``
``H``  memory heads
``K``  head width
=====  ==========================================

``o`` is ``slot_offset``: row ``t`` of the segment is bound to slot ``o + t``.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "memory_attention",
    "memory_update",
    "paper_memory",
    "pooled_gate",
    "release_memory",
    "residual_layer_norm",
    "slot_query_memory",
    "visible_slots",
]


def visible_slots(
    num_tokens: int,
    num_slots: int,
    *,
    causal: bool = True,
    slot_offset: int = 0,
    slot_mask: Tensor | None = None,  # (B, N)
    device: torch.device | None = None,
) -> Tensor:
    """Which slot each token sees: ``(not causal or j <= o + t) and (slot_mask[b, j] or no mask)``.

    Returns:
        (B, 1, T, N) bool, or (1, 1, T, N) without a ``slot_mask``; True = takes part.
    """
    token = torch.arange(num_tokens, device=device)[:, None]
    slot = torch.arange(num_slots, device=device)[None, :]
    visible = torch.ones(num_tokens, num_slots, dtype=torch.bool, device=device)
    if causal:
        visible = slot <= slot_offset + token
    visible = visible[None, None]
    if slot_mask is not None:
        visible = visible & slot_mask[:, None, None, :]
    return visible


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
    keep_mask: Tensor | None = None,  # (B, H, T, N)
) -> Tensor:
    """Tokens read the memory: ``R = dropout(top_k(softmax(Q K^T * scale))) V``.

    Dropout is explicit: ``keep_mask`` says which probabilities stay, and those are divided by
    ``1 - dropout_p``. A token that sees no slot reads 0. Of slots with equal scores, top-k keeps
    the lower ones.

    Returns:
        (B, T, H, K)
    """
    num_tokens, num_slots = query.shape[1], key.shape[1]
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    visible = visible_slots(
        num_tokens,
        num_slots,
        causal=causal,
        slot_offset=slot_offset,
        slot_mask=slot_mask,
        device=query.device,
    )
    if slot_mask is not None:
        # 0 * NaN is NaN: a masked slot takes no part whatever it holds
        key = key.masked_fill(~slot_mask[:, :, None, None], 0.0)
        value = value.masked_fill(~slot_mask[:, :, None, None], 0.0)
    scores = torch.einsum("bthk,bnhk->bhtn", query, key) * scale
    # a row with no visible slot would be softmax of -inf alone: give it any finite row, then zero
    sees_any = visible.any(dim=-1, keepdim=True)
    scores = scores.masked_fill(~visible & sees_any, -math.inf)
    probabilities = torch.softmax(scores, dim=-1) * visible
    if top_k is not None:
        # a stable sort: of equal scores the lower slots; + 0.0, as some sorts put -0.0 below 0.0
        kept = (scores + 0.0).sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
        probabilities = probabilities * torch.zeros_like(probabilities).scatter(-1, kept, 1.0)
    if keep_mask is not None:
        probabilities = probabilities * keep_mask / (1.0 - dropout_p)
    return torch.einsum("bhtn,bnhk->bthk", probabilities, value)


def memory_update(
    hidden: Tensor,  # (B, T, D)
    candidate: Tensor,  # (B, T, D)
    memory: Tensor,  # (B, R, D)
    input_gate: Tensor,  # (B, T, D), (B, R, D) or (B, 1, D)
    forget_gate: Tensor,  # likewise
    output_gate: Tensor | None = None,  # likewise
    *,
    gate_bias: Tensor | None = None,  # (B, T, 2 * D), (B, R, 2 * D) or (B, 1, 2 * D)
    read: Tensor | None = None,  # (B, T, D)
    output: str = "read",
    tokens_per_slot: int = 1,
) -> tuple[Tensor, Tensor]:
    """The gated write: gates come before the sigmoid, rows are already selected.

    Token ``t`` is bound to row ``r = t // tokens_per_slot`` of memory, which has
    ``R = ceil(T / tokens_per_slot)`` rows, and proposes
    ``m_t = sigma(input_gate_t) * tanh(candidate_t) + sigma(forget_gate_t) * memory_r``. The new row
    ``M'_r`` is the mean of its tokens' proposals (the last row may have fewer of them). ``output =
    hidden + m`` without an output gate (release), else ``hidden + sigma(output_gate) * read``
    (paper, ``output="read"``; ``read`` is ``candidate`` unless given) or
    ``hidden + sigma(output_gate) * memory_r`` (paper, ``output="memory"``).
    ``gate_bias`` is added to ``[input_gate | forget_gate]``. Gates have a row a token, a row a
    slot, or one.

    Returns:
        output (B, T, D), new memory (B, R, D)
    """
    num_tokens = hidden.shape[1]

    def by_token(rows: Tensor) -> Tensor:
        return _by_token(rows, tokens_per_slot, num_tokens)

    rows = by_token(memory)
    input_gate, forget_gate = by_token(input_gate), by_token(forget_gate)
    if gate_bias is not None:
        input_bias, forget_bias = by_token(gate_bias).chunk(2, dim=-1)
        input_gate = input_gate + input_bias
        forget_gate = forget_gate + forget_bias
    proposal = torch.sigmoid(input_gate) * torch.tanh(candidate) + torch.sigmoid(forget_gate) * rows
    new_memory = _means(proposal, tokens_per_slot).to(memory.dtype)
    if output_gate is None:
        return (hidden + proposal).to(hidden.dtype), new_memory
    shown = rows if output == "memory" else candidate if read is None else read
    return (hidden + torch.sigmoid(by_token(output_gate)) * shown).to(hidden.dtype), new_memory


def _by_token(rows: Tensor, tokens_per_slot: int, num_tokens: int) -> Tensor:
    """Rows of slots as rows of their tokens; rows of tokens, and a single row, as they are."""
    if rows.shape[1] in (1, num_tokens):
        return rows
    return rows.repeat_interleave(tokens_per_slot, dim=1)[:, :num_tokens]


def _means(x: Tensor, tokens_per_slot: int) -> Tensor:
    """The mean of every ``tokens_per_slot`` rows, of those that are left at the end."""
    if tokens_per_slot == 1:
        return x
    end = x.shape[1] // tokens_per_slot * tokens_per_slot
    means = x[:, :end].unflatten(1, (-1, tokens_per_slot)).mean(dim=2)
    if end == x.shape[1]:
        return means
    return torch.cat([means, x[:, end:].mean(dim=1, keepdim=True)], dim=1)


def residual_layer_norm(
    x: Tensor,  # (B, T, D)
    residual: Tensor,  # (B, T, D)
    weight: Tensor,  # (D,)
    bias: Tensor,  # (D,)
    eps: float = 1e-5,
) -> Tensor:
    """``LayerNorm(x + residual) = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias``.

    Returns:
        (B, T, D) in ``x``'s dtype
    """
    total = x + residual
    mean = total.mean(dim=-1, keepdim=True)
    variance = (total - mean).square().mean(dim=-1, keepdim=True)
    return ((total - mean) / torch.sqrt(variance + eps) * weight + bias).to(x.dtype)


def pooled_gate(
    x: Tensor,  # (B, T, D)
    weight: Tensor,  # (D,)
    *,
    prefix: bool = False,
    pooled_sum: Tensor | None = None,  # (B, D)
    num_pooled: int = 0,
) -> tuple[Tensor, Tensor]:
    """Mean over tokens of ``relu(weight * x)``: of the whole segment, or of tokens ``<= t``.

    With ``prefix``, ``pooled_sum`` is the sum over the ``num_pooled`` tokens of earlier pieces.

    Returns:
        pooled (B, 1, D), or (B, T, D) with ``prefix``; the sum over all tokens so far (B, D)
    """
    active = torch.relu(weight * x)
    # sums of 16-bit values are float32
    active = active.to(torch.promote_types(active.dtype, torch.float32))
    if not prefix:
        return active.mean(dim=1, keepdim=True).to(x.dtype), active.sum(dim=1)
    # term by term: torch.cumsum on a CPU adds float32 in float64, and the oracle in a lower
    # precision is the yardstick for kernels, which do not
    terms = active.unbind(dim=1)
    first = terms[0] if pooled_sum is None else pooled_sum + terms[0]
    running = torch.stack(list(itertools.accumulate(terms[1:], initial=first)), dim=1)
    count = torch.arange(1, x.shape[1] + 1, device=x.device) + num_pooled
    return (running / count[:, None]).to(x.dtype), running[:, -1]


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1))


def _linear(x: Tensor, parameters: dict[str, Tensor], name: str) -> Tensor:
    return F.linear(x, parameters[f"{name}.weight"], parameters.get(f"{name}.bias"))


def _read(
    query: Tensor,  # (B, T, D)
    bank: Tensor,  # (B, N, D)
    parameters: dict[str, Tensor],
    num_heads: int,
    **options: object,
) -> Tensor:
    """What projected queries read of a bank, (B, T, D); options of :func:`memory_attention`."""
    key, value = (_linear(bank, parameters, f"{name}_proj") for name in ("key", "value"))
    query, key, value = (_heads(rows, num_heads) for rows in (query, key, value))
    return memory_attention(query, key, value, **options).flatten(-2)


def _candidate(read: Tensor, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """What is written, before the tanh: what was read, and the token's own term if there is one."""
    if "candidate_proj.weight" not in parameters:
        return read
    return read + _linear(x, parameters, "candidate_proj")


def _write_rows(memory: Tensor, rows: Tensor, slot_offset: int) -> Tensor:
    end = slot_offset + rows.shape[1]
    return torch.cat([memory[:, :slot_offset], rows, memory[:, end:]], dim=1)


def paper_memory(
    x: Tensor,  # (B, T, D)
    memory: Tensor,  # (B, N, D)
    parameters: dict[str, Tensor],
    *,
    num_heads: int,
    slot_offset: int = 0,
    slot_mask: Tensor | None = None,  # (B, N)
    causal: bool = True,
    scale: float | None = None,
    top_k: int | None = None,
    dropout_p: float = 0.0,
    keep_mask: Tensor | None = None,  # (B, H, T, N)
    output: str = "read",
    tokens_per_slot: int = 1,
) -> tuple[Tensor, Tensor]:
    """The memory layer of the paper (arXiv 2502.06049, equations 1 to 6).

    ``parameters`` is a state dict of :class:`lm2_kernels.PaperMemory`; with a ``candidate_proj``
    the candidate is ``R + x Wc`` (``candidate="token"``). With ``tokens_per_slot = c`` (``write=
    "chunk"``) token ``t`` is bound to slot ``o + t // c``, and a slot's new row is the mean of its
    tokens' proposals.

    Returns:
        output (B, T, D), new memory (B, N, D)
    """
    # equations 1 and 2: cross-attention of the tokens over the slots
    read = _read(
        _linear(x, parameters, "query_proj"),
        memory,
        parameters,
        num_heads,
        causal=causal,
        slot_offset=slot_offset,
        slot_mask=slot_mask,
        scale=scale,
        top_k=top_k,
        dropout_p=dropout_p,
        keep_mask=keep_mask,
    )
    rows = memory[:, slot_offset : slot_offset + math.ceil(x.shape[1] / tokens_per_slot)]
    # equation 3 (output gate), 4 (input gate), 5 (forget gate), 6 (update)
    out, new_rows = memory_update(
        x,
        _candidate(read, x, parameters),
        rows,
        _linear(x, parameters, "input_gate_proj"),
        _linear(read, parameters, "forget_gate_proj"),
        _linear(read, parameters, "output_gate_proj"),
        read=read,
        output=output,
        tokens_per_slot=tokens_per_slot,
    )
    return out, _write_rows(memory, new_rows, slot_offset)


def release_memory(
    x: Tensor,  # (B, T, D)
    memory: Tensor,  # (B, N, D)
    parameters: dict[str, Tensor],
    *,
    num_heads: int,
    slot_offset: int = 0,
    slot_mask: Tensor | None = None,  # (B, N)
    causal: bool = True,
    scale: float | None = None,
    top_k: int | None = None,
    dropout_p: float = 0.0,
    keep_masks: list[Tensor] | None = None,  # one (B, H, T, N) a block
    num_blocks: int = 1,
    attention_mlp_layers: int = 2,
    prefix: bool = False,
    pooled_sum: Tensor | None = None,  # (B, D)
    eps: float = 1e-5,
    tokens_per_slot: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The memory layer that the released code computes (design: ``ReleaseMemory``).

    ``parameters`` is a state dict under the released module's names; with a ``candidate_proj`` the
    candidate is ``C_P + x Wc`` (``candidate="token"``). With ``pooled_sum``, the segment began at
    slot 0 and the tokens of the slots before ``slot_offset`` came before. ``tokens_per_slot`` as in
    :func:`paper_memory`; above 1 there is one block, as rows that a token has rewritten are not the
    slot's.

    Returns:
        output (B, T, D), new memory (B, N, D), pooled sum (B, D)
    """
    end = slot_offset + math.ceil(x.shape[1] / tokens_per_slot)
    rows = memory[:, slot_offset:end]
    query = _linear(x, parameters, "query_proj")
    bank = memory
    candidate = _by_token(rows, tokens_per_slot, x.shape[1])
    for block in range(num_blocks):
        read = _read(
            query,
            bank,
            parameters,
            num_heads,
            causal=causal,
            slot_offset=slot_offset,
            slot_mask=slot_mask,
            scale=scale,
            top_k=top_k,
            dropout_p=dropout_p,
            keep_mask=None if keep_masks is None else keep_masks[block],
        )
        attended = residual_layer_norm(
            read,
            candidate,
            parameters["attended_memory_layernorm.weight"],
            parameters["attended_memory_layernorm.bias"],
            eps,
        )
        mixed = attended
        for _ in range(attention_mlp_layers):
            mixed = torch.relu(_linear(mixed, parameters, "attention_mlp.0"))
        candidate = residual_layer_norm(
            mixed,
            attended,
            parameters["attended_memory_layernorm2.weight"],
            parameters["attended_memory_layernorm2.bias"],
            eps,
        )
        if block + 1 < num_blocks:
            bank = _write_rows(bank, candidate, slot_offset)
    pooled, new_sum = pooled_gate(
        x,
        parameters["input_gate_projector.w"],
        prefix=prefix,
        pooled_sum=pooled_sum,
        num_pooled=0 if pooled_sum is None else slot_offset * tokens_per_slot,
    )
    pooled_gates = _linear(pooled, parameters, "input_gate_projector.linear")
    # of no dimension, as released, whatever their shape
    biases = [parameters[name].reshape(()) for name in ("input_bias", "forget_bias")]
    gates = _linear(torch.tanh(rows), parameters, "memory_gate_projector.linear")
    input_gate, forget_gate = gates.chunk(2, dim=-1)
    out, new_rows = memory_update(
        x,
        _candidate(candidate, x, parameters),
        rows,
        input_gate + biases[0],
        forget_gate + biases[1],
        gate_bias=pooled_gates,
        tokens_per_slot=tokens_per_slot,
    )
    return out, _write_rows(memory, new_rows, slot_offset), new_sum


def slot_query_memory(
    x: Tensor,  # (B, T, D)
    memory: Tensor,  # (B, N, D)
    parameters: dict[str, Tensor],
    *,
    num_heads: int,
    pool: str = "proposals",
) -> tuple[Tensor, Tensor]:
    """An experiment, of no layer: slots choose the tokens that write them, by a query of their own.

    Reads, gates and candidate C are those of :func:`paper_memory` without ``causal``. Which token
    writes to a slot is no rule of positions: in each head, slot ``n`` weighs the tokens by ::

        A_nt = softmax_t((M_n + e_n) Wa . x_t Wb / sqrt(K) - softplus(a) |t - centre_n| / c)

    with ``c = T / N`` and ``centre_n = c n + (c - 1) / 2``: with a large ``a``, a chunk of its own.
    The new row is pooled by them, with ``pool="proposals"`` behind the gates and else
    (``"gates"``) before them::

        M'_n = sum_t A_nt sigma(x_t Win) tanh(C_t) + M_n sum_t A_nt sigma(R_t Wf)
        M'_n = sigma(sum_t A_nt x_t Win) tanh(sum_t A_nt C_t) + M_n sigma(sum_t A_nt R_t Wf)

    ``parameters`` is a state dict of :class:`lm2_kernels.PaperMemory` with ``slot_query_proj``
    (Wa), ``token_key_proj`` (Wb), ``slot_embedding`` e (N, D) and ``locality`` a (H,).

    Returns:
        output (B, T, D), new memory (B, N, D)
    """
    read = _read(_linear(x, parameters, "query_proj"), memory, parameters, num_heads, causal=False)
    query = _linear(memory + parameters["slot_embedding"], parameters, "slot_query_proj")
    query = _heads(query, num_heads)
    key = _heads(_linear(x, parameters, "token_key_proj"), num_heads)
    scores = torch.einsum("bnhk,bthk->bhnt", query, key) / math.sqrt(query.shape[-1])
    num_tokens, num_slots = x.shape[1], memory.shape[1]
    c = num_tokens / num_slots
    token = torch.arange(num_tokens, device=x.device)
    centre = torch.arange(num_slots, device=x.device)[:, None] * c + (c - 1.0) / 2.0
    locality = F.softplus(parameters["locality"])[:, None, None]
    weights = torch.softmax(scores - locality * (token - centre).abs() / c, dim=-1)

    def pooled(rows: Tensor) -> Tensor:
        rows = torch.einsum("bhnt,bthk->bnhk", weights, _heads(rows, num_heads))
        return rows.flatten(-2)

    candidate = _candidate(read, x, parameters)
    input_gate = _linear(x, parameters, "input_gate_proj")
    forget_gate = _linear(read, parameters, "forget_gate_proj")
    if pool == "proposals":
        written = pooled(torch.sigmoid(input_gate) * torch.tanh(candidate))
        kept = pooled(torch.sigmoid(forget_gate))
    else:
        written = torch.sigmoid(pooled(input_gate)) * torch.tanh(pooled(candidate))
        kept = torch.sigmoid(pooled(forget_gate))
    shown = torch.sigmoid(_linear(read, parameters, "output_gate_proj")) * read
    return x + shown, written + kept * memory
