"""The hyperbolic tangent of a memory's rows, on a CPU by the compiled backend's kernel.

PyTorch's own takes many times as long on processors that its library of vector functions does not
know well. With another backend asked for by name, or where modes watch every operator, it is
PyTorch's, which differs by round-off. (A release layer as one Function leaves it to its norm where
the norm's backend has a kernel for both.)
"""

import torch
from torch import Tensor

from lm2_kernels.autograd import apply
from lm2_kernels.backends import cpp
from lm2_kernels.plain import ORDINARY

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HAS_KERNEL = cpp.has("tanh")


class _TanhFunction(torch.autograd.Function):
    """``x -> tanh(x)``. Saves the result by reference."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.ops.lm2_kernels.tanh(x) if torch.compiler.is_compiling() else cpp.tanh(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, dy):
        return torch.ops.aten.tanh_backward(dy, *ctx.saved_tensors)


def apply_tanh(x: Tensor, backend: str) -> Tensor:
    """``tanh(x)``, with a derivative.

    Args:
        x: (B, R, D); of other shapes it is PyTorch's.
        backend: that was asked for: with "auto" and "cpp" the kernel may compute it.
    """
    return apply(_TanhFunction, x) if _is_by_kernel(x, backend) else torch.tanh(x)


def tanh(x: Tensor, backend: str) -> Tensor:
    """What :func:`apply_tanh` computes, bit for bit, without a derivative."""
    return cpp.tanh(x) if _is_by_kernel(x, backend) else torch.tanh(x)


def _is_by_kernel(x: Tensor, backend: str) -> bool:
    if backend not in ("auto", "cpp") or not _HAS_KERNEL:
        return False
    if not (x.is_cpu and x.dim() == 3 and x.dtype in _DTYPES):
        return False
    if torch.compiler.is_compiling():
        # ONNX knows PyTorch's operators, not ours
        return not torch.onnx.is_in_onnx_export()
    # modes count operators, trace them or give them meaning, by the names that they know
    return type(x) in ORDINARY and torch._C._len_torch_dispatch_stack() == 0


torch.library.register_autograd(
    "lm2_kernels::tanh", _TanhFunction.backward, setup_context=_TanhFunction.setup_context
)
