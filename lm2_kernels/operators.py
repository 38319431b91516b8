"""The backends' functions as ``torch.library`` operators: what torch.compile sees.

Eager calls skip this layer (the dispatcher costs more than some kernels); a compiled graph holds
``torch.ops.lm2_kernels.<op>_forward`` and ``_backward`` with the backend's name as the last
argument, so every backend is traced the same way. The compiled backend's own operators
(``torch.ops.lm2_kernels_cpp``) get the same shape functions.
"""

from collections.abc import Callable

import torch

from lm2_kernels import backends
from lm2_kernels.backends import extension
from lm2_kernels.backends.composite import accumulation_dtype


def run(backend: str, function: str, *args):
    """Call a backend's function: directly, or through its operator inside a compiled graph."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.lm2_kernels, function)(*args, backend)
    return backends.call(backend, function, *args)


def _operator(arguments: str, results: int) -> Callable[[Callable], Callable]:
    """Register the operator of a backend function; the decorated function gives result shapes."""

    def register(fake: Callable) -> Callable:
        function = fake.__name__

        def implementation(*args):
            return backends.call(args[-1], function, *args[:-1])

        def fake_with_backend(*args):
            return fake(*args[:-1])

        schema = f"({arguments}, str backend) -> ({', '.join(['Tensor'] * results)})"
        torch.library.custom_op(
            f"lm2_kernels::{function}", implementation, mutates_args=(), schema=schema
        ).register_fake(fake_with_backend)
        if extension.cpu_reason() is None:
            torch.library.register_fake(f"lm2_kernels_cpp::{function}", fake)
        return fake

    return register


@_operator(
    "Tensor query, Tensor key, Tensor value, Tensor? slot_mask, Tensor? seed, bool causal, "
    "SymInt slot_offset, float scale, int? top_k, float dropout_p",
    results=2,
)
def memory_attention_forward(query, *_):
    batch, num_tokens, num_heads, _ = query.shape
    lse = query.new_empty(batch, num_heads, num_tokens, dtype=accumulation_dtype(query))
    return query.new_empty(query.shape), lse


@_operator(
    "Tensor dout, Tensor query, Tensor key, Tensor value, Tensor? slot_mask, Tensor? seed, "
    "Tensor out, Tensor lse, bool causal, SymInt slot_offset, float scale, int? top_k, "
    "float dropout_p, bool needs_dquery, bool needs_dkey_value",
    results=2,
)
def memory_attention_backward(dout, query, key, *args):
    *_, needs_dquery, needs_dkey_value = args
    batch, num_slots, num_heads, head_width = key.shape
    packed = (batch, num_slots, 2, num_heads, head_width)
    return (
        query.new_empty(query.shape if needs_dquery else (0,)),
        key.new_empty(packed if needs_dkey_value else (0,)),
    )


@_operator(
    "Tensor hidden, Tensor candidate, Tensor memory, Tensor input_gate, Tensor forget_gate, "
    "Tensor? output_gate, Tensor? gate_bias, str output",
    results=2,
)
def memory_update_forward(hidden, candidate, memory, *_):
    return hidden.new_empty(hidden.shape), memory.new_empty(memory.shape)


@_operator(
    "Tensor? doutput, Tensor? dnew_memory, Tensor candidate, Tensor memory, Tensor input_gate, "
    "Tensor forget_gate, Tensor? output_gate, Tensor? gate_bias, str output, "
    "bool needs_dcandidate, bool needs_dmemory, bool needs_dgates",
    results=3,
)
def memory_update_backward(doutput, dnew_memory, candidate, memory, input_gate, *args):
    _, output_gate, *_, needs_dcandidate, needs_dmemory, needs_dgates = args
    batch, num_tokens, width = candidate.shape
    gates = (batch, num_tokens, 2 if output_gate is None else 3, width)
    return (
        candidate.new_empty(candidate.shape if needs_dcandidate else (0,)),
        memory.new_empty(memory.shape if needs_dmemory else (0,)),
        input_gate.new_empty(gates if needs_dgates else (0,)),
    )


@_operator("Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps", results=3)
def residual_layer_norm_forward(x, *_):
    statistic = x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x))
    return x.new_empty(x.shape), statistic, torch.empty_like(statistic)


@_operator(
    "Tensor dout, Tensor x, Tensor residual, Tensor weight, Tensor mean, Tensor rstd, "
    "bool needs_dx, bool needs_dparams",
    results=3,
)
def residual_layer_norm_backward(dout, x, residual, weight, mean, rstd, *args):
    needs_dx, needs_dparams = args
    dtype = x.dtype if x.dtype == residual.dtype else accumulation_dtype(x)
    parameter = weight.shape if needs_dparams else (0,)
    return (
        x.new_empty(x.shape if needs_dx else (0,), dtype=dtype),
        weight.new_empty(parameter),
        weight.new_empty(parameter),
    )


@_operator("Tensor x, Tensor weight, Tensor? pooled_sum, bool prefix, SymInt num_pooled", results=2)
def pooled_gate_forward(x, weight, pooled_sum, prefix, *_):
    batch, num_tokens, width = x.shape
    pooled = x.new_empty(batch, num_tokens if prefix else 1, width)
    return pooled, x.new_empty(batch, width, dtype=accumulation_dtype(x))


@_operator(
    "Tensor? dpooled, Tensor? dnew_sum, Tensor x, Tensor weight, bool prefix, SymInt num_pooled, "
    "bool needs_dx, bool needs_dweight, bool needs_dpooled_sum",
    results=3,
)
def pooled_gate_backward(dpooled, dnew_sum, x, weight, *args):
    *_, needs_dx, needs_dweight, needs_dpooled_sum = args
    batch, _, width = x.shape
    total = (batch, width) if needs_dpooled_sum else (0,)
    return (
        x.new_empty(x.shape if needs_dx else (0,)),
        weight.new_empty(weight.shape if needs_dweight else (0,)),
        x.new_empty(total, dtype=accumulation_dtype(x)),
    )
