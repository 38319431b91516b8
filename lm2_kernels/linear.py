"""Projections that share an input, as one matrix product.

``query_proj`` and ``input_gate_proj`` both read ``x``, ``key_proj`` and ``value_proj`` both read
the memory. One product over their stacked weights keeps a GPU busier at small sizes, reads the
input once, and in backward adds up the input's gradient inside the product.

Users keep ordinary ``nn.Linear`` modules: as ``nn.RNN`` does, their parameters are slices of one
buffer (:func:`pack`), and :func:`project` takes the buffer when it finds them side by side. Where
something moved them apart, replaced or hooked one of them, and under torch.compile, which cannot
see where parameters lie, each layer is called by itself: slower at small sizes, and just as right.

On a CPU the products go the faster of two ways (:mod:`lm2_kernels.backends.cpu_products`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm2_kernels.autograd import apply
from lm2_kernels.backends import computed_dtype, cpu_products

# fewer are done on a CPU while Python prepares to do them together
_MIN_MULTIPLICATIONS = 1 << 22


def _are_neighbours(tensors: tuple[Tensor, ...], dim: int) -> bool:
    """Whether they lie side by side along ``dim`` in one storage."""
    first = tensors[0]
    shape, stride, dtype = first.shape, first.stride(), first.dtype
    storage, offset = first.untyped_storage()._cdata, first.storage_offset()
    for tensor in tensors[1:]:
        offset += shape[dim] * stride[dim]
        if (
            tensor.storage_offset() != offset
            or tensor.shape != shape
            or tensor.stride() != stride
            or tensor.dtype != dtype
            or tensor.untyped_storage()._cdata != storage
        ):
            return False
    return True


def _stack(tensors: tuple[Tensor, ...], dim: int) -> Tensor | None:
    """Neighbours along ``dim`` as one tensor, without a copy; else None."""
    if not _are_neighbours(tensors, dim):
        return None
    first = tensors[0].detach()
    if len(tensors) == 1:
        return first
    shape = list(first.shape)
    shape[dim] *= len(tensors)
    return first.as_strided(shape, first.stride())


def _stacked(tensors: tuple[Tensor, ...], dim: int) -> Tensor:
    """As ``torch.cat``, without a copy where that is possible.

    Under create_graph it is ``torch.cat``: a view beyond a tensor's own elements has no derivative.
    """
    stacked = None if torch.is_grad_enabled() else _stack(tensors, dim)
    return torch.cat(tensors, dim) if stacked is None else stacked


class _PackedLinear(torch.autograd.Function):
    """``x -> x [W_1; W_2; ...]^T + [b_1, b_2, ...]`` with weights that lie side by side.

    With ``relu``, the ReLU of that. Saves by reference x, the weights and, with ``relu``, the
    result.
    """

    @staticmethod
    def forward(x: Tensor, num_layers: int, relu: bool, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[:num_layers], parameters[num_layers:]
        # under autocast x has its dtype already
        weight = _stacked(weights, 0).to(x.dtype)
        bias = _stacked(biases, 0).to(x.dtype) if biases else None
        return cpu_products.product(x, weight.t(), bias, relu=relu)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.num_layers, relu, *parameters = inputs
        ctx.has_bias = len(parameters) > ctx.num_layers
        ctx.save_for_backward(output if relu else None, x, *parameters[: ctx.num_layers])

    @staticmethod
    def backward(ctx, dy):
        activated, x, *weights = ctx.saved_tensors
        needs_dx, _, _, *needs_dparameters = ctx.needs_input_grad
        dx, dweights, dbiases = None, [None] * len(weights), [None] * len(weights)
        if activated is not None:
            dy = torch.ops.aten.threshold_backward(dy, activated, 0)
        with torch.autocast(dy.device.type, enabled=False):
            # under autocast the product was in its dtype, which is dy's
            if needs_dx:
                dx = cpu_products.product(dy, _stacked(weights, 0).to(dy.dtype)).to(x.dtype)
            rows = dy.flatten(0, -2)
            if any(needs_dparameters[: ctx.num_layers]):
                dweight = cpu_products.product(rows.t(), x.flatten(0, -2).to(dy.dtype))
                dweights = dweight.to(weights[0].dtype).chunk(len(weights))
            if any(needs_dparameters[ctx.num_layers :]):
                dbiases = rows.sum(dim=0).to(weights[0].dtype).chunk(len(weights))
        return dx, None, None, *dweights, *(dbiases if ctx.has_bias else ())


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
        pass

    @staticmethod
    def backward(ctx, *grads):
        return _stacked(grads, -1), None


def split_columns(y: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Equal parts of the last axis; their gradients are joined without a copy where they can be."""
    if torch.compiler.is_compiling():
        return y.chunk(parts, dim=-1)
    return apply(_SplitColumns, y, parts)


def _is_plain(layer: nn.Module) -> bool:
    """An ``nn.Linear`` that nobody replaced, parametrised, patched or hooked."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and "forward" not in layer.__dict__
        and not (
            layer._forward_hooks
            or layer._forward_pre_hooks
            or layer._backward_hooks
            or layer._backward_pre_hooks
        )
    )


def _parameters(layers: tuple[nn.Linear, ...]) -> list[tuple[Tensor, ...]] | None:
    """The layers' weights, and their biases if they have any; None if only some of them have."""
    groups = [tuple(layer.weight for layer in layers)]
    biases = tuple(layer.bias for layer in layers if layer.bias is not None)
    if biases:
        groups.append(biases)
    return groups if len(biases) in (0, len(layers)) else None


def _is_worth_it(x: Tensor, layers: tuple[nn.Module, ...]) -> bool:
    """Whether a Function of our own, some 50 us a call, can be faster than the layers."""
    if x.device.type != "cpu":
        return len(layers) > 1
    # as if the layers were square: exact is not needed
    num_rows, elements = x.numel() // x.shape[-1], len(layers) * x.shape[-1] ** 2
    if len(layers) > 1 and num_rows * elements >= _MIN_MULTIPLICATIONS:
        return True
    dtype = computed_dtype(x)
    is_large = cpu_products.is_large(dtype, num_rows, elements)
    return is_large and (dtype == torch.float32 or cpu_products.is_widened(dtype))


def project(x: Tensor, *layers: nn.Module, relu: bool = False) -> tuple[Tensor, ...]:
    """``layer(x)`` for each of several Linear layers, or the ReLU of each."""
    parameters = _packed_parameters(x, layers)
    if parameters is None:
        results = [layer(x) for layer in layers]
        return tuple(map(F.relu, results)) if relu else tuple(results)
    # cast here, so that what is saved for backward is the 16-bit copy
    x = x.to(computed_dtype(x))
    packed = apply(_PackedLinear, x, len(layers), relu, *parameters)
    return (packed,) if len(layers) == 1 else split_columns(packed, len(layers))


def _packed_parameters(x: Tensor, layers: tuple[nn.Module, ...]) -> list[Tensor] | None:
    """Weights and biases that lie side by side, if one product is possible and worth it."""
    if torch.compiler.is_compiling() or not _is_worth_it(x, layers):
        return None
    groups = _parameters(layers) if all(map(_is_plain, layers)) else None
    if groups is None or not all(_are_neighbours(group, 0) for group in groups):
        return None
    return [parameter for group in groups for parameter in group]


def apply_linear(x: Tensor, layer: nn.Module) -> Tensor:
    """``layer(x)`` of one Linear layer, as :func:`project` computes it."""
    return project(x, layer)[0]


def pack(*layers: nn.Module) -> None:
    """Move the parameters of Linear layers of equal shape side by side into one buffer, in place.

    Leaves alone what lies side by side already, what is not an ordinary parameter of an ordinary
    Linear, and parameters in shared memory, whose place matters to others.
    """
    if torch.is_inference_mode_enabled() or not all(map(_is_plain, layers)):
        return
    for group in _parameters(layers) or ():
        if _are_neighbours(group, 0) or not _can_move(group):
            continue
        with torch.no_grad():
            rows = torch.cat([parameter.detach() for parameter in group]).chunk(len(group))
            for parameter, place in zip(group, rows, strict=True):
                parameter.data = place


def _can_move(parameters: tuple[Tensor, ...]) -> bool:
    first = parameters[0]
    return all(
        (parameter.shape, parameter.dtype, parameter.device)
        == (first.shape, first.dtype, first.device)
        and not (parameter.device.type == "cpu" and parameter.is_shared())
        for parameter in parameters
    )
