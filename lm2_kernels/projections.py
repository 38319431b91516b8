"""Projections that share an input, as one matrix product.

``query_proj`` and ``input_gate_proj`` both read ``x``, ``key_proj`` and ``value_proj`` both read
the memory. One product over their stacked weights keeps a GPU busier at small sizes, reads the
input once, and in backward adds up the input's gradient inside the product.

Users keep ordinary ``nn.Linear`` modules: as ``nn.RNN`` does, their parameters are slices of one
buffer (:func:`pack`), and :func:`project` uses the buffer when it finds them side by side. Where
something moved them apart the weights are concatenated, which is slower and just as right.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm2_kernels.autograd import apply


def _stack(tensors: tuple[Tensor, ...], dim: int) -> Tensor | None:
    """Neighbours along ``dim`` in one storage as one tensor, without a copy; None if they are not.

    All have the same shape.
    """
    first = tensors[0]
    step = first.shape[dim] * first.stride(dim)
    for index, tensor in enumerate(tensors):
        if (
            tensor.shape != first.shape
            or tensor.stride() != first.stride()
            or tensor.dtype != first.dtype
            or tensor.untyped_storage()._cdata != first.untyped_storage()._cdata
            or tensor.storage_offset() != first.storage_offset() + index * step
        ):
            return None
    shape = list(first.shape)
    shape[dim] *= len(tensors)
    return first.detach().as_strided(shape, first.stride())


class _StackRows(torch.autograd.Function):
    """``(W_1, W_2, ...) -> [W_1; W_2; ...]``, a view where the rows are neighbours in memory."""

    @staticmethod
    def forward(*tensors: Tensor) -> Tensor:
        stacked = _stack(tensors, 0)
        return torch.cat(tensors) if stacked is None else stacked

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.sizes = [tensor.shape[0] for tensor in inputs]

    @staticmethod
    def backward(ctx, grad):
        return grad.split(ctx.sizes)


class _SplitColumns(torch.autograd.Function):
    """``y -> y_1, y_2, ...``, equal parts of the last axis.

    The kernels write the gradients of neighbouring parts into one buffer: then backward takes that
    buffer, where torch's own split would copy it.
    """

    @staticmethod
    def forward(y: Tensor, parts: int) -> tuple[Tensor, ...]:
        return y.chunk(parts, dim=-1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.shape = output[0].shape

    @staticmethod
    def backward(ctx, *grads):
        # as_strided beyond a tensor's own elements has no right second derivative
        if not torch.is_grad_enabled():
            stacked = _stack(grads, -1)
            if stacked is not None:
                return stacked, None
        return torch.cat(grads, dim=-1), None


def _is_plain(layer: nn.Module) -> bool:
    """An ``nn.Linear`` that nobody replaced, parametrised or hooked."""
    return type(layer) is nn.Linear and not (
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
    )


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """``layer(x)`` for each of several Linear layers of equal shape.

    torch.compile gets the plain layers: it cannot see where parameters lie in memory.
    """
    if torch.compiler.is_compiling() or not all(map(_is_plain, layers)):
        return tuple(layer(x) for layer in layers)
    weight = apply(_StackRows, *(layer.weight for layer in layers))
    bias = None
    if layers[0].bias is not None:
        bias = apply(_StackRows, *(layer.bias for layer in layers))
    return split_columns(F.linear(x, weight, bias), len(layers))


def split_columns(y: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Equal parts of the last axis; their gradients are joined without a copy where they can be."""
    if torch.compiler.is_compiling():
        return y.chunk(parts, dim=-1)
    return apply(_SplitColumns, y, parts)


def pack(*layers: nn.Linear) -> None:
    """Move the parameters of layers of equal shape side by side into one buffer, in place."""
    for name in ("weight", "bias"):
        parameters = [getattr(layer, name) for layer in layers]
        if parameters[0] is None or not _can_pack(parameters):
            continue
        with torch.no_grad():
            buffer = torch.cat([parameter.detach() for parameter in parameters])
            for parameter, rows in zip(parameters, buffer.chunk(len(layers)), strict=True):
                parameter.data = rows


def _can_pack(parameters: list[nn.Parameter]) -> bool:
    first = parameters[0]
    return all(
        type(parameter) is nn.Parameter
        and (parameter.shape, parameter.dtype, parameter.device)
        == (first.shape, first.dtype, first.device)
        for parameter in parameters
    )
