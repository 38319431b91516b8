"""Linear layers, on a CPU by the faster of two exact products.

:func:`apply_linear` calls the layer, as anybody would; only where a product is large and
:mod:`lm2_kernels.backends.cpu_products` may have a faster way does it compute the same itself, and
only where nobody can tell (:mod:`lm2_kernels.plain`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from lm2_kernels.autograd import apply, refuse_mapped
from lm2_kernels.backends import autocast_dtype, computed_dtype, cpu_products
from lm2_kernels.backends.contract import accumulation_dtype
from lm2_kernels.checks import go_together
from lm2_kernels.plain import ORDINARY, plain_parameters


class _LinearFunction(torch.autograd.Function):
    """``x -> x W^T + b``; with ``relu``, the ReLU of that.

    Saves by reference x, W and, with ``relu``, the result.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        # under autocast x has its dtype already
        bias = None if bias is None else bias.to(x.dtype)
        return cpu_products.product(x, weight.to(x.dtype).t(), bias, relu=relu)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, relu = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output if relu else None, x, weight)

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 4
        refuse_mapped((dy,))
        activated, x, weight = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dbias, _ = ctx.needs_input_grad
        dx = dweight = dbias = None
        if activated is not None:
            dy = torch.ops.aten.threshold_backward(dy, activated, 0)
        with torch.autocast(dy.device.type, enabled=False):
            # under autocast the product was in its dtype, which is dy's
            if needs_dx:
                dx = cpu_products.product(dy, weight.to(dy.dtype)).to(x.dtype)
            rows = dy.flatten(0, -2)
            # autograd casts the bias's to its dtype
            if needs_dweight:
                terms = x.flatten(0, -2).to(dy.dtype)
                dweight, dbias = cpu_products.product_and_sums(rows, terms, needs_sums=needs_dbias)
                dweight = dweight.to(weight.dtype)
            elif needs_dbias:
                dbias = rows.sum(dim=0, dtype=accumulation_dtype(rows))
        return dx, dweight, dbias, None


def apply_linear(x: Tensor, layer: nn.Module, *, relu: bool = False) -> Tensor:
    """``layer(x)``, or the ReLU of it, for a layer that is a Linear or stands for one."""
    parameters = _parameters(x, layer)
    if parameters is None:
        y = layer(x)
        return F.relu(y) if relu else y
    # cast here, so that what is saved for backward is the 16-bit copy
    return apply(_LinearFunction, x.to(computed_dtype(x)), *parameters, relu)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, relu: bool = False) -> Tensor:
    """What :func:`apply_linear` computes of a plain layer in one dtype, bit for bit, as a product
    that has no derivative.
    """
    # as if the layer were square, as _parameters asks: exact is not needed
    if x.is_cpu and cpu_products.is_large(x.dtype, x, x.shape[-1]):
        return cpu_products.product(x, weight.t(), bias, relu=relu)
    y = F.linear(x, weight, bias)
    return y.relu_() if relu else y


def _parameters(x: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias if there may be a faster way than to call the layer."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return None
    dtype = computed_dtype(x)
    if not cpu_products.is_large(dtype, x, x.shape[-1]):
        return None
    # modes count products, trace them or give them meaning, by the names that they know; of
    # torch.func and forward mode the layer has rules, and our Function none
    if (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or getattr(forward_ad, "_current_level", 0) >= 0
    ):
        return None
    parameters = plain_parameters(layer, nn.Linear)
    if parameters is None or type(x) not in ORDINARY:
        return None
    weight, bias = parameters
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    is_cast = autocast_dtype("cpu") is not None
    for parameter in parameters:
        if parameter is None:
            continue
        is_right = parameter.dtype == x.dtype or (is_cast and go_together(dtype, parameter.dtype))
        if not is_right or parameter.device != x.device:
            # the layer's to refuse
            return None
    if dtype == torch.float32 or cpu_products.is_widened(dtype, x, x.shape[-1]):
        return parameters
    return None
