"""One ``torch.autograd.Function`` per op, blind to which backend runs it.

Each saves what its docstring says and nothing else, runs only the kernels that the gradients asked
for need (dK and dV come from one, as do all gates, and weight with bias), and refuses what it
cannot differentiate: double backward, forward mode and vmap raise NotImplementedError.
"""

import functools
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lm2_kernels.backends import check_mark, cpp, mark
from lm2_kernels.operators import run


class _Refusals:
    """Clear refusals in place of torch's general ones."""

    @staticmethod
    def jvp(ctx, *tangents):
        _refuse_forward_mode()

    @staticmethod
    def vmap(info, in_dims, *args):
        _refuse_vmap()


def _refuse_forward_mode() -> NoReturn:
    raise NotImplementedError(
        "lm2_kernels: forward-mode differentiation is not supported; use reverse mode, or the "
        "ops of lm2_kernels.reference"
    )


def _refuse_vmap() -> NoReturn:
    raise NotImplementedError(
        "lm2_kernels: vmap is not supported; the ops take a batch dimension, or use the ops of "
        "lm2_kernels.reference"
    )


class _FirstOrderOnly(_Refusals, torch.autograd.Function):
    """Runs a backward function and refuses to be differentiated again.

    ``once_differentiable`` would let a gradient penalty pass with a wrong result when the incoming
    gradient needs no gradient itself.
    """

    @staticmethod
    def forward(op, function, *args):
        return function(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx, *grads):
        _refuse_double_backward(ctx.op)


def _refuse_double_backward(op: str) -> NoReturn:
    raise NotImplementedError(
        f"{op}: double backward is not supported; for second derivatives use the ops of "
        f"lm2_kernels.reference"
    )


def _forward(op: str, *args) -> tuple[Tensor, ...]:
    *args, backend = args
    return run(backend, f"{op}_forward", *args)


# private to PyTorch; without it nothing is known to be one
_is_legacy_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda tensor: False)


def first_order(op: str, function: Callable, *args):
    """``function(*args)`` within a backward, which refuses to be differentiated again."""
    # grad mode is on in a backward only under create_graph=True
    if torch.is_grad_enabled():
        return _FirstOrderOnly.apply(op, function, *args)
    return function(*args)


def refuse_mapped(args: tuple) -> None:
    """is_grads_batched and vectorize=True map over a backward by an older vmap, which no Function
    is told of.
    """
    if any(isinstance(arg, Tensor) and _is_legacy_batched(arg) for arg in args):
        _refuse_vmap()


def _run_backward(ctx, function: str, *args):
    refuse_mapped(args)
    if getattr(ctx, "is_of_operator", False):
        return getattr(torch.ops.lm2_kernels, function)(*args, ctx.backend)
    backward = functools.partial(run, ctx.backend, function)
    return first_order(function.removesuffix("_backward"), backward, *args)


# Function -> the same with refusals, and what applies that fast
_with_refusals: dict[type, tuple[type, Callable]] = {}


def apply(function: type[torch.autograd.Function], *args):
    """``function.apply``, refusing forward mode and vmap by name.

    Where no gradient is wanted it is ``function.forward`` alone; and for torch.compile, which then
    sees one operator with its own backward, and takes one tensor in several places.
    """
    # private to PyTorch: without it, the slow way is right whatever is active
    is_forward_mode = getattr(forward_ad, "_current_level", 0) >= 0
    if torch.compiler.is_compiling():
        if is_forward_mode:
            # torch would drop the tangents of an operator without a word
            _refuse_forward_mode()
        return function.forward(*args)
    if function not in _with_refusals:
        refusing = type(function.__name__, (_Refusals, function), {})
        # what Function.apply calls when no torch.func transform is active, after it has inspected
        # forward's signature for defaults: at 60 to 80 us a call, more than some kernels take
        _with_refusals[function] = refusing, super(torch.autograd.Function, refusing).apply
    refusing, fast_apply = _with_refusals[function]
    if is_forward_mode or torch._C._are_functorch_transforms_active():
        return refusing.apply(*args)
    if not torch.is_grad_enabled():
        # nothing to save, nothing to differentiate
        return function.forward(*args)
    return fast_apply(*args)


class MemoryAttentionFunction(torch.autograd.Function):
    """``(query, key, value, slot_mask, seed, ...) -> (out, statistics)``.

    Saves query, key, value and out by reference, statistics (8 B H T bytes), a mark of the backend,
    as no other understands them, and the slot mask and seed if there are any: nothing of size
    (T, N). The dropout mask is recomputed from the seed.
    """

    @staticmethod
    def forward(*args) -> tuple[Tensor, ...]:
        return _forward("memory_attention", *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, slot_mask, seed, *ctx.options, ctx.backend = inputs
        out, statistics = output
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        # a graph names its backend
        made_by = None if getattr(ctx, "is_of_operator", False) else mark((ctx.backend,))
        ctx.save_for_backward(query, key, value, slot_mask, seed, out, statistics, made_by)

    @staticmethod
    def backward(ctx, dout, _):
        if dout is None:
            return (None,) * 11
        needs_dquery, needs_dkey, needs_dvalue = ctx.needs_input_grad[:3]
        needs_dkey_value = needs_dkey or needs_dvalue
        # read once: checkpointing unpacks what was saved a single time
        *saved, made_by = ctx.saved_tensors
        if made_by is not None:
            check_mark("memory_attention", made_by, (ctx.backend,))
        dquery, dkey_value = _run_backward(
            ctx,
            "memory_attention_backward",
            dout,
            *saved,
            *ctx.options,
            needs_dquery,
            needs_dkey_value,
        )
        dkey, dvalue = dkey_value.unbind(2) if needs_dkey_value else (None, None)
        return (
            dquery if needs_dquery else None,
            dkey if needs_dkey else None,
            dvalue if needs_dvalue else None,
            *(None,) * 8,
        )


class MemoryUpdateFunction(torch.autograd.Function):
    """``(hidden, candidate, memory, gates, gate_bias, read, ...) -> (output, new_memory)``.

    Saves candidate, memory, the gates before their sigmoid, gate_bias and read, all by reference:
    no bytes of its own. The gradient of hidden is the gradient of output, not a copy.
    """

    @staticmethod
    def forward(*args) -> tuple[Tensor, ...]:
        return _forward("memory_update", *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *saved, ctx.output, ctx.tokens_per_slot, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)

    @staticmethod
    def backward(ctx, doutput, dnew_memory):
        if doutput is None and dnew_memory is None:
            return (None,) * 11
        # read once: checkpointing unpacks what was saved a single time
        saved = ctx.saved_tensors
        candidate, memory, input_gate, forget_gate, output_gate, gate_bias, read = saved
        # no gradient, rather than zeros, for what the outputs that were used do not depend on
        has_output_gate = output_gate is not None
        is_written = dnew_memory is not None or not has_output_gate
        is_shown = doutput is not None and has_output_gate
        reached = (
            doutput is not None,
            is_written or (is_shown and ctx.output == "read" and read is None),
            is_written or (is_shown and ctx.output == "memory"),
            is_written,
            is_written,
            is_shown,
            is_written,
            is_shown,
        )
        needs = [need and here for need, here in zip(ctx.needs_input_grad, reached, strict=False)]
        needs_dhidden, needs_dcandidate, needs_dmemory, *needs_gates, needs_dread = needs
        gates = (input_gate, forget_gate, output_gate, gate_bias)
        # by the several tokens of a slot
        num_tokens = candidate.shape[1]
        shared = [False] * 4
        if memory.shape[1] != num_tokens:
            shared = [
                # a bool where sizes are symbols, too
                needed and bool(gate.shape[1] != num_tokens)
                for gate, needed in zip(gates, needs_gates, strict=True)
            ]
        dcandidate, dmemory, dgates, dread = None, None, [None] * 4, None
        if needs_dcandidate or needs_dmemory or needs_dread or any(needs_gates):
            dcandidate, dmemory, of_tokens, of_slots, dread = _run_backward(
                ctx,
                "memory_update_backward",
                doutput,
                dnew_memory,
                *saved,
                ctx.output,
                ctx.tokens_per_slot,
                needs_dcandidate,
                needs_dmemory,
                needs_gates != shared,
                any(shared),
                needs_dread,
            )
            dgates = [
                _gate_gradient(of_slots if is_shared else of_tokens, index, gate)
                if needed
                else None
                for index, gate, needed, is_shared in zip(
                    (slice(0, 1), slice(1, 2), slice(2, 3), slice(0, 2)),
                    gates,
                    needs_gates,
                    shared,
                    strict=True,
                )
            ]
        return (
            doutput if needs_dhidden else None,
            dcandidate if needs_dcandidate else None,
            dmemory if needs_dmemory else None,
            *dgates,
            dread if needs_dread else None,
            None,
            None,
            None,
        )


def _gate_gradient(packed: Tensor, index: slice, gate: Tensor) -> Tensor:
    """One gate's part of (B, T or R, G, D), summed where the gate has one row."""
    grad = packed[:, :, index].flatten(2)
    if gate.shape[1] != grad.shape[1]:
        grad = grad.sum(dim=1, keepdim=True)
    return grad if grad.dtype == gate.dtype else grad.to(gate.dtype)


class ResidualLayerNormFunction(torch.autograd.Function):
    """``(x, residual, weight, bias, eps) -> (out, mean, rstd)``.

    Saves x, residual and weight by reference, mean and rstd (8 B T bytes).
    """

    @staticmethod
    def forward(*args) -> tuple[Tensor, ...]:
        return _forward("residual_layer_norm", *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, residual, weight, _, _, ctx.backend = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, residual, weight, mean, rstd)

    @staticmethod
    def backward(ctx, dout, *_):
        if dout is None:
            return (None,) * 6
        # read once: checkpointing unpacks what was saved a single time
        x, residual, *saved = ctx.saved_tensors
        needs_x, needs_residual, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        dx, dweight, dbias = _run_backward(
            ctx,
            "residual_layer_norm_backward",
            dout,
            x,
            residual,
            *saved,
            needs_x or needs_residual,
            needs_weight or needs_bias,
        )
        return (
            dx.to(x.dtype) if needs_x else None,
            dx.to(residual.dtype) if needs_residual else None,
            dweight if needs_weight else None,
            dbias if needs_bias else None,
            None,
            None,
        )


class PooledGateFunction(torch.autograd.Function):
    """``(x, weight, pooled_sum, prefix, num_pooled) -> (pooled, new_sum)``.

    Saves x and weight by reference: no bytes of its own.
    """

    @staticmethod
    def forward(*args) -> tuple[Tensor, ...]:
        return _forward("pooled_gate", *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, ctx.prefix, ctx.num_pooled, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, dpooled, dnew_sum):
        if dpooled is None and dnew_sum is None:
            return (None,) * 6
        needs = ctx.needs_input_grad[:3]
        grads = _run_backward(
            ctx,
            "pooled_gate_backward",
            dpooled,
            dnew_sum,
            *ctx.saved_tensors,
            ctx.prefix,
            ctx.num_pooled,
            *needs,
        )
        grads = [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]
        return *grads, None, None, None


def _register(op: str, function: type[torch.autograd.Function]) -> None:
    """Give the operators behind ``function`` its backward: for torch.compile, and for those who
    call them directly.

    It calls operators in its turn, so that whoever traces it sees those alone.
    """

    def setup_context_of(backend: tuple[str, ...]) -> Callable:
        def setup_context(ctx, inputs, output):
            ctx.is_of_operator = True
            function.setup_context(ctx, (*inputs, *backend), output)

        return setup_context

    def backward(ctx, *grads):
        # the compiled backend's own operators have no argument for the backend
        return function.backward(ctx, *grads)[:-1]

    def refuse(ctx, *grads):
        _refuse_double_backward(op)

    register = torch.library.register_autograd
    register(f"lm2_kernels::{op}_forward", function.backward, setup_context=setup_context_of(()))
    register(f"lm2_kernels::{op}_backward", refuse)
    if cpp.has(f"{op}_forward"):
        register(
            f"{cpp.NAMESPACE}::{op}_forward", backward, setup_context=setup_context_of(("cpp",))
        )


FUNCTIONS = {
    "memory_attention": MemoryAttentionFunction,
    "memory_update": MemoryUpdateFunction,
    "residual_layer_norm": ResidualLayerNormFunction,
    "pooled_gate": PooledGateFunction,
}
for _op, _function in FUNCTIONS.items():
    _register(_op, _function)
