"""What every backend implements: the table of ops, :data:`RESULTS`.

A backend is a module ``lm2_kernels.backends.<name>``, or an object that was given to
:class:`lm2_kernels.backends.register`, that has for each op, or for some, the functions
``<op>_forward`` and ``<op>_backward``. Their signatures, and with them the operators' schemas, are
those of :mod:`lm2_kernels.backends.eager`; what they return is said by the functions of the same
names here, which take some of the arguments, by name, and make empty tensors like the results.

Arguments are positional, already validated and of canonical rank (shapes as in
:mod:`lm2_kernels.reference`); tensors may have any strides whose last axis is contiguous. Results
are new contiguous tensors. ``None`` stands for an optional input that is absent, or for the
gradient of an output that was not used. A gradient that is not needed (``needs_*`` False) comes
back as an empty tensor. float64 is computed in float64, every other dtype is accumulated in
float32.

``DEVICES``: what it runs on, by torch's type of device and in words, as ``{"cuda": "NVIDIA
GPUs"}``; None is any. It is given nothing that lies elsewhere.

Two pairs of functions a backend has or not, forward and backward, :data:`OPTIONAL`. They spare the
release layer's norms passes over what lies beside them. All take what
``residual_layer_norm_forward`` and ``_backward`` take but for ``needs_dx``, as the functions here
say, and the gradients of x and residual have their dtypes. A backend made from another's functions,
with a norm of its own, has these of its own too, or none.

- :data:`NORM_AND_TANH` gives ``tanh(residual)`` besides, in the dtype of the residual. Backward
  takes, before ``needs_dparams``, ``dtanh`` and ``dresidual``, what the residual gets otherwise. It
  gives ``dx``, ``dresidual + dx + dtanh (1 - tanh(residual)^2)``, ``dweight``, ``dbias``.
- :data:`NORM_OF_RELU` is the norm of ``relu(x) + residual``, of which NaN stays NaN. Backward gives
  ``dx``, which is 0 where x is not positive, ``dresidual``, ``dweight``, ``dbias``.

``unsupported_reason(op, *tensors) -> str | None`` says why the backend cannot run ``op`` on these
tensors (or, without tensors, on this machine). It feeds the error text, ``info`` and test skips.
It goes by their shapes, dtypes and devices alone: of a layer it is asked once for each combination.
torch.compile traces it: what it cannot trace goes into a
:func:`lm2_kernels.backends.constant_when_compiled`.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _like(tensor: Tensor, shape: tuple[int, ...], needed: bool, dtype=None) -> Tensor:
    return tensor.new_empty(shape if needed else (0,), dtype=dtype)


def memory_attention_forward(query):
    """``out`` (B, T, H, K), ``statistics`` (B, H, 2, T).

    ``statistics``, float32 (float64 for float64), are two numbers a row for the same backend's
    backward, which alone knows what they are; 0 where it needs none. ``seed`` is an int64 scalar
    tensor on the device, or None without dropout; the keep mask is the one of
    :mod:`lm2_kernels.backends.dropout`.
    """
    batch, num_tokens, num_heads, _ = query.shape
    statistics = query.new_empty(batch, num_heads, 2, num_tokens, dtype=accumulation_dtype(query))
    return query.new_empty(query.shape), statistics


def memory_attention_backward(query, key, needs_dquery, needs_dkey_value):
    """``dquery``, ``dkey_value`` (B, N, 2, H, K): dK and dV in one buffer."""
    batch, num_slots, num_heads, head_width = key.shape
    packed = (batch, num_slots, 2, num_heads, head_width)
    return _like(query, query.shape, needs_dquery), _like(key, packed, needs_dkey_value)


def memory_update_forward(hidden, memory):
    """``output`` (B, T, D), ``new_memory`` (B, R, D) in the dtypes of ``hidden`` and ``memory``.

    ``candidate``, ``read``, the gates and ``gate_bias`` share the activation dtype; ``hidden`` and
    ``memory`` have it or float32. Gates have T rows, R (one for ``tokens_per_slot`` tokens), or 1.
    """
    return hidden.new_empty(hidden.shape), memory.new_empty(memory.shape)


def memory_update_backward(
    candidate,
    memory,
    input_gate,
    output_gate,
    needs_dcandidate,
    needs_dmemory,
    needs_dgates,
    needs_dslot_gates,
    needs_dread,
):
    """``dcandidate``, ``dmemory`` (B, R, D), ``dgates`` (B, T, G, D), ``dslot_gates``, ``dread``.

    ``dgates`` are of the input, forget and (G = 3) output gate, token by token. ``dslot_gates``
    (B, R, G, D), float32 (float64 for float64), are their sums over the tokens of a slot, for gates
    that tokens share; they are asked for only where a slot has several (R < T). The gradient of
    ``hidden`` is ``doutput`` itself. ``read`` is there only where it is what is shown; where it is
    None that is ``candidate``, and ``needs_dread`` is False.
    """
    batch, num_tokens, width = candidate.shape
    gates = (2 if output_gate is None else 3, width)
    of_slots = (*memory.shape[:2], *gates)
    return (
        _like(candidate, candidate.shape, needs_dcandidate),
        _like(memory, memory.shape, needs_dmemory),
        _like(input_gate, (batch, num_tokens, *gates), needs_dgates),
        _like(input_gate, of_slots, needs_dslot_gates, accumulation_dtype(input_gate)),
        _like(candidate, candidate.shape, needs_dread),
    )


def residual_layer_norm_forward(x):
    """``out``; ``mean`` and ``rstd`` (B, T), float32 (float64 for float64)."""
    statistic = x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x))
    return x.new_empty(x.shape), statistic, torch.empty_like(statistic)


def residual_layer_norm_backward(x, residual, weight, needs_dx, needs_dparams):
    """``dx``, ``dweight``, ``dbias``; ``dx`` serves both summands: float32 where they differ."""
    dtype = x.dtype if x.dtype == residual.dtype else accumulation_dtype(x)
    return (
        _like(x, x.shape, needs_dx, dtype),
        _like(weight, weight.shape, needs_dparams),
        _like(weight, weight.shape, needs_dparams),
    )


def pooled_gate_forward(x, prefix):
    """``pooled`` (B, T or 1, D); ``new_sum`` (B, D), float32 (float64 for float64)."""
    batch, num_tokens, width = x.shape
    pooled = x.new_empty(batch, num_tokens if prefix else 1, width)
    return pooled, x.new_empty(batch, width, dtype=accumulation_dtype(x))


def pooled_gate_backward(x, weight, needs_dx, needs_dweight, needs_dpooled_sum):
    """``dx``, ``dweight``, ``dpooled_sum`` (B, D) in ``new_sum``'s dtype."""
    batch, _, width = x.shape
    return (
        _like(x, x.shape, needs_dx),
        _like(weight, weight.shape, needs_dweight),
        _like(x, (batch, width), needs_dpooled_sum, accumulation_dtype(x)),
    )


# the table: what a backend's functions return, by their names
RESULTS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    function.__name__: function
    for function in (
        memory_attention_forward,
        memory_attention_backward,
        memory_update_forward,
        memory_update_backward,
        residual_layer_norm_forward,
        residual_layer_norm_backward,
        pooled_gate_forward,
        pooled_gate_backward,
    )
}
NORM = "residual_layer_norm"
NORM_AND_TANH = "residual_layer_norm_and_tanh"
NORM_OF_RELU = "residual_layer_norm_of_relu"
_OP_OF = {NORM_AND_TANH: NORM, NORM_OF_RELU: NORM}


def _of_both_summands(
    x: Tensor, residual: Tensor, weight: Tensor, needs_dparams: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x and residual, each in its dtype, of weight and of bias."""
    dx, *of_parameters = residual_layer_norm_backward(x, x, weight, True, needs_dparams)
    return dx, residual.new_empty(residual.shape), *of_parameters


def residual_layer_norm_and_tanh_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``out``, ``mean``, ``rstd``, ``tanh`` (B, T, D)."""
    return *residual_layer_norm_forward(x), residual.new_empty(residual.shape)


def residual_layer_norm_and_tanh_backward(
    dout: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dtanh: Tensor,
    dresidual: Tensor,
    needs_dparams: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``dx``, ``dresidual``, ``dweight``, ``dbias``."""
    return _of_both_summands(x, residual, weight, needs_dparams)


def residual_layer_norm_of_relu_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``out``, ``mean``, ``rstd``."""
    return residual_layer_norm_forward(x)


def residual_layer_norm_of_relu_backward(
    dout: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs_dparams: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``dx``, ``dresidual``, ``dweight``, ``dbias``."""
    return _of_both_summands(x, residual, weight, needs_dparams)


# what a backend may have besides, by names too, with all of their arguments
OPTIONAL: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    function.__name__: function
    for function in (
        residual_layer_norm_and_tanh_forward,
        residual_layer_norm_and_tanh_backward,
        residual_layer_norm_of_relu_forward,
        residual_layer_norm_of_relu_backward,
    )
}


def op_and_way(function: str) -> tuple[str, str]:
    """The op whose work a backend's function does, and "forward" or "backward"."""
    name, _, way = function.rpartition("_")
    return _OP_OF.get(name, name), way


OPS = tuple(name.removesuffix("_forward") for name in RESULTS if name.endswith("_forward"))
