"""The eager backend: every op with a hand-derived backward, from PyTorch's own operators.

It runs on every device and dtype PyTorch has, never keeps a (T, N) matrix for backward, and is the
step between the oracle's autograd and the kernels: the same formulas, in readable form.
"""

import torch
from torch import Tensor

from lm2_kernels.backends.composite import (  # noqa: F401 - this backend's own
    memory_attention_backward,
    memory_attention_forward,
)
from lm2_kernels.backends.contract import accumulation_dtype

DEVICES = None


def unsupported_reason(op: str, *tensors: Tensor) -> str | None:
    """Nothing is unsupported: functional has checked the dtypes."""
    return None


def _gates(
    input_gate: Tensor, forget_gate: Tensor, gate_bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    input_gate, forget_gate = input_gate.to(dtype), forget_gate.to(dtype)
    if gate_bias is not None:
        input_bias, forget_bias = gate_bias.to(dtype).chunk(2, dim=-1)
        input_gate, forget_gate = input_gate + input_bias, forget_gate + forget_bias
    return torch.sigmoid(input_gate), torch.sigmoid(forget_gate)


def memory_update_forward(
    hidden: Tensor,
    candidate: Tensor,
    memory: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    output_gate: Tensor | None,
    gate_bias: Tensor | None,
    output: str,
) -> tuple[Tensor, Tensor]:
    """See :mod:`lm2_kernels.backends.contract`."""
    dtype = accumulation_dtype(candidate)
    c, p = candidate.to(dtype), memory.to(dtype)
    i, f = _gates(input_gate, forget_gate, gate_bias, dtype)
    new_memory = i * torch.tanh(c) + f * p
    if output_gate is None:
        shown = new_memory
    else:
        shown = torch.sigmoid(output_gate.to(dtype)) * (c if output == "read" else p)
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
    output: str,
    needs_dcandidate: bool,
    needs_dmemory: bool,
    needs_dgates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :mod:`lm2_kernels.backends.contract`.

    With i, f, g the gates after the sigmoid, u = tanh(C), dM the gradient that reaches M' (release:
    dM' + dout, as the output shows M'):
    ``dC = dM i (1 - u^2)``, ``dP = dM f``, ``dz_i = dM u i (1 - i)``, ``dz_f = dM P f (1 - f)``;
    with an output gate, ``dz_g = dout S g (1 - g)`` and ``dS += dout g`` for what it shows, S.
    """
    dtype = accumulation_dtype(candidate)
    c, p = candidate.to(dtype), memory.to(dtype)
    i, f = _gates(input_gate, forget_gate, gate_bias, dtype)
    u = torch.tanh(c)
    dout = None if doutput is None else doutput.to(dtype)
    dnew = None if dnew_memory is None else dnew_memory.to(dtype)
    if output_gate is None and dout is not None:
        dnew = dout if dnew is None else dnew + dout
    # what never arrived is not 0 times something: that would be NaN for an infinity
    dcandidate = dmemory = dinput_gate = dforget_gate = doutput_gate = torch.zeros_like(c)
    if dnew is not None:
        dcandidate, dmemory = dnew * i * (1 - u * u), dnew * f
        dinput_gate, dforget_gate = dnew * u * i * (1 - i), dnew * p * f * (1 - f)
    if output_gate is not None and dout is not None:
        g = torch.sigmoid(output_gate.to(dtype))
        if output == "read":
            doutput_gate = dout * c * g * (1 - g)
            dcandidate = dcandidate + dout * g
        else:
            doutput_gate = dout * p * g * (1 - g)
            dmemory = dmemory + dout * g
    dgates = [dinput_gate, dforget_gate]
    if output_gate is not None:
        dgates.append(doutput_gate)
    none = candidate.new_empty(0)
    return (
        dcandidate.to(candidate.dtype).contiguous() if needs_dcandidate else none,
        dmemory.to(memory.dtype).clone(memory_format=torch.contiguous_format)
        if needs_dmemory
        else none.clone(),
        torch.stack(dgates, dim=2).to(input_gate.dtype).contiguous()
        if needs_dgates
        else none.clone(),
    )


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
