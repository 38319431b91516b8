"""The eager backend: every op with a hand-derived backward, from PyTorch's own operators.

It runs on every device and dtype PyTorch has, never keeps a (T, N) matrix for backward, and is the
step between the oracle's autograd and the kernels: the same formulas, in readable form.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lm2_kernels.backends.composite import (  # noqa: F401 - this backend's own
    memory_attention_backward,
    memory_attention_forward,
)
from lm2_kernels.backends.contract import accumulation_dtype
from lm2_kernels.chunks import by_slot, counts, sum_by_slot, tokens_of

DEVICES = None


def unsupported_reason(op: str, *tensors: Tensor) -> str | None:
    """Nothing is unsupported: functional has checked the dtypes."""
    return None


def _by_slot(
    candidate: Tensor,
    memory: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    gate_bias: Tensor | None,
    tokens_per_slot: int,
) -> tuple[Callable[[Tensor], Tensor], int, tuple[Tensor, ...]]:
    """What lays tensors out slot by slot, how many tokens a slot has; and so laid out C, P, i, f.

    Of more tokens per slot than there are, it is those that there are.
    """
    dtype, num_tokens = accumulation_dtype(candidate), candidate.shape[1]
    tokens_per_slot = min(tokens_per_slot, num_tokens)

    def view(x: Tensor) -> Tensor:
        return by_slot(x.to(dtype), tokens_per_slot, num_tokens)

    input_gate, forget_gate = view(input_gate), view(forget_gate)
    if gate_bias is not None:
        input_bias, forget_bias = view(gate_bias).chunk(2, dim=-1)
        input_gate, forget_gate = input_gate + input_bias, forget_gate + forget_bias
    rows = memory.to(dtype)[:, :, None]
    opened = view(candidate), rows, torch.sigmoid(input_gate), torch.sigmoid(forget_gate)
    return view, tokens_per_slot, opened


def memory_update_forward(
    hidden: Tensor,
    candidate: Tensor,
    memory: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    output_gate: Tensor | None,
    gate_bias: Tensor | None,
    read: Tensor | None,
    output: str,
    tokens_per_slot: int,
) -> tuple[Tensor, Tensor]:
    """See :mod:`lm2_kernels.backends.contract`."""
    dtype, num_tokens = accumulation_dtype(candidate), candidate.shape[1]
    view, tokens_per_slot, (c, p, i, f) = _by_slot(
        candidate, memory, input_gate, forget_gate, gate_bias, tokens_per_slot
    )
    proposal = tokens_of(i * torch.tanh(c) + f * p, num_tokens)
    new_memory = sum_by_slot(proposal, tokens_per_slot)
    if tokens_per_slot > 1:
        new_memory = new_memory / counts(num_tokens, tokens_per_slot, memory.device)
    if output_gate is None:
        shown = proposal
    else:
        s = p if output == "memory" else c if read is None else view(read)
        shown = tokens_of(torch.sigmoid(view(output_gate)) * s.expand(c.shape), num_tokens)
    out = (hidden.to(dtype) + shown).to(hidden.dtype)
    # arithmetic keeps the axes' order in memory, the contract is a plain contiguous tensor
    return out.contiguous(), new_memory.to(memory.dtype).contiguous()


def memory_update_backward(
    doutput: Tensor | None,
    dnew_memory: Tensor | None,
    candidate: Tensor,
    memory: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    output_gate: Tensor | None,
    gate_bias: Tensor | None,
    read: Tensor | None,
    output: str,
    tokens_per_slot: int,
    needs_dcandidate: bool,
    needs_dmemory: bool,
    needs_dgates: bool,
    needs_dslot_gates: bool,
    needs_dread: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :mod:`lm2_kernels.backends.contract`.

    With i, f, g the gates after the sigmoid, u = tanh(C), P the token's row, n how many tokens it
    has, and dm the gradient that reaches the token's proposal, dM' / n (release: + dout, as the
    output shows the proposal):
    ``dC = dm i (1 - u^2)``, ``dP = sum of dm f``, ``dz_i = dm u i (1 - i)``,
    ``dz_f = dm P f (1 - f)``; with an output gate, ``dz_g = dout S g (1 - g)`` and ``dS += dout g``
    for what it shows, S. Sums are over the row's tokens; so are those of a gate they share.
    """
    dtype, num_tokens = accumulation_dtype(candidate), candidate.shape[1]
    view, tokens_per_slot, (c, p, i, f) = _by_slot(
        candidate, memory, input_gate, forget_gate, gate_bias, tokens_per_slot
    )
    u = torch.tanh(c)
    dout = None if doutput is None else view(doutput)
    dnew = None if dnew_memory is None else dnew_memory.to(dtype)
    if dnew is not None and tokens_per_slot > 1:
        dnew = dnew / counts(num_tokens, tokens_per_slot, memory.device)
    dm = None if dnew is None else dnew[:, :, None]
    if output_gate is None and dout is not None:
        dm = dout if dm is None else dm + dout
    # what never arrived is not 0 times something: that would be NaN for an infinity
    dcandidate = drow = dinput_gate = dforget_gate = doutput_gate = dread = torch.zeros_like(c)
    if dm is not None:
        dcandidate, drow = dm * i * (1 - u * u), (dm * f).expand(c.shape)
        dinput_gate, dforget_gate = dm * u * i * (1 - i), dm * p * f * (1 - f)
        dforget_gate = dforget_gate.expand(c.shape)
    if output_gate is not None and dout is not None:
        g = torch.sigmoid(view(output_gate))
        s = p if output == "memory" else c if read is None else view(read)
        doutput_gate = dout * s * g * (1 - g)
        if output == "memory":
            drow = drow + dout * g
        elif read is None:
            dcandidate = dcandidate + dout * g
        else:
            dread = dout * g
    dgates = [dinput_gate, dforget_gate]
    if output_gate is not None:
        dgates.append(doutput_gate)

    def of_tokens(x: Tensor, dtype: torch.dtype, needed: bool) -> Tensor:
        return _owned(tokens_of(x, num_tokens) if needed else x.new_empty(0), dtype)

    def of_slots(x: Tensor, dtype: torch.dtype, needed: bool) -> Tensor:
        sums = sum_by_slot(tokens_of(x, num_tokens), tokens_per_slot) if needed else x.new_empty(0)
        return _owned(sums, dtype)

    packed = torch.stack(dgates, dim=3) if needs_dgates or needs_dslot_gates else dread
    return (
        of_tokens(dcandidate, candidate.dtype, needs_dcandidate),
        of_slots(drow, memory.dtype, needs_dmemory),
        of_tokens(packed, input_gate.dtype, needs_dgates),
        of_slots(packed, dtype, needs_dslot_gates),
        of_tokens(dread, candidate.dtype, needs_dread),
    )


def _owned(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype, contiguous and sharing its memory with no other."""
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


def residual_layer_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :mod:`lm2_kernels.backends.contract`."""
    dtype = accumulation_dtype(x)
    total = x.to(dtype) + residual.to(dtype)
    mean = total.mean(dim=-1)
    centred = total - mean[..., None]
    rstd = torch.rsqrt(centred.square().mean(dim=-1) + eps)
    out = centred * rstd[..., None] * weight.to(dtype) + bias.to(dtype)
    return out.to(x.dtype).contiguous(), mean.contiguous(), rstd.contiguous()


def residual_layer_norm_backward(
    dout: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs_dx: bool,
    needs_dparams: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :mod:`lm2_kernels.backends.contract`.

    With n the normalised sum and g = dout * weight:
    ``dx = rstd * (g - mean(g) - n mean(g n))``, ``dweight = sum(dout n)``, ``dbias = sum(dout)``.
    """
    dtype = accumulation_dtype(x)
    dout = dout.to(dtype)
    centred = x.to(dtype) + residual.to(dtype) - mean[..., None]
    # a large mean has lost digits: what is left of it must not count as signal
    centred = centred - centred.mean(dim=-1, keepdim=True)
    normed = centred * rstd[..., None]
    none = x.new_empty(0)
    dx, dweight, dbias = none, none.clone(), none.clone()
    if needs_dx:
        g = dout * weight.to(dtype)
        dx = g - g.mean(dim=-1, keepdim=True) - normed * (g * normed).mean(dim=-1, keepdim=True)
        dx = (dx * rstd[..., None]).to(x.dtype if x.dtype == residual.dtype else dtype)
        dx = dx.contiguous()
    if needs_dparams:
        dweight = (dout * normed).sum(dim=(0, 1)).to(weight.dtype)
        dbias = dout.sum(dim=(0, 1)).to(weight.dtype)
    return dx, dweight, dbias


def pooled_gate_forward(
    x: Tensor, weight: Tensor, pooled_sum: Tensor | None, prefix: bool, num_pooled: int
) -> tuple[Tensor, Tensor]:
    """See :mod:`lm2_kernels.backends.contract`."""
    dtype = accumulation_dtype(x)
    active = torch.relu(weight.to(dtype) * x.to(dtype))
    if not prefix:
        total = active.sum(dim=1)
        return (total / x.shape[1]).to(x.dtype)[:, None], total
    running = active.cumsum(dim=1)
    if pooled_sum is not None:
        running = running + pooled_sum.to(dtype)[:, None]
    pooled = (running / _count(x, num_pooled, dtype)).to(x.dtype)
    return pooled.contiguous(), running[:, -1].contiguous()


def _count(x: Tensor, num_pooled: int, dtype: torch.dtype) -> Tensor:
    """How many tokens each prefix mean is over. (T, 1)"""
    token = torch.arange(1, x.shape[1] + 1, dtype=dtype, device=x.device)
    return (token + num_pooled)[:, None]


def pooled_gate_backward(
    dpooled: Tensor | None,
    dnew_sum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    prefix: bool,
    num_pooled: int,
    needs_dx: bool,
    needs_dweight: bool,
    needs_dpooled_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :mod:`lm2_kernels.backends.contract`.

    da is the gradient of relu(w x): dpooled / T, or with ``prefix`` the sum over later tokens of
    dpooled / count, plus dnew_sum. ``dx = da w [w x > 0]``, ``dw = sum(da x [w x > 0])``,
    ``dpooled_sum = sum_t dpooled / count + dnew_sum``.
    """
    dtype = accumulation_dtype(x)
    dactive = torch.zeros((), dtype=dtype, device=x.device).expand(x.shape)
    if dpooled is not None and prefix:
        share = dpooled.to(dtype) / _count(x, num_pooled, dtype)
        dactive = share.flip(1).cumsum(dim=1).flip(1)
    elif dpooled is not None:
        dactive = (dpooled.to(dtype) / x.shape[1]).expand(x.shape)
    if dnew_sum is not None:
        dactive = dactive + dnew_sum.to(dtype)[:, None]
    none = x.new_empty(0)
    dx, dweight, dpooled_sum = none, none.clone(), none.clone()
    w, values = weight.to(dtype), x.to(dtype)
    # "not <= 0" instead of "> 0": a NaN stays
    masked = torch.where(w * values <= 0, 0.0, dactive)
    if needs_dx:
        dx = (masked * w).to(x.dtype).contiguous()
    if needs_dweight:
        dweight = (masked * values).sum(dim=(0, 1)).to(weight.dtype)
    if needs_dpooled_sum:
        dpooled_sum = dactive[:, 0].contiguous()
    return dx, dweight, dpooled_sum
