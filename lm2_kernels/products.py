"""Matrix products of float32 CPU tensors, by the faster of two exact libraries.

PyTorch's own ``mm`` calls MKL, which on some processors (AMD's with AVX-512) reaches half of what
oneDNN does, and on others as much or more. Both are exact float32. So the first large product of
each layout is timed both ways, a few milliseconds once a process, and the faster library kept.
``LM2_KERNELS_FLOAT32_PRODUCTS=torch`` (or ``onednn``) decides without a measurement, for results
that are bit-equal from one process to the next.
"""

import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ENVIRONMENT_VARIABLE = "LM2_KERNELS_FLOAT32_PRODUCTS"
_CHOICES = ("auto", "torch", "onednn")
# multiplications from which on oneDNN's overhead, some 20 us a call, cannot matter
_MIN_MULTIPLICATIONS = 1 << 24
_MEASURED_SIZE = 512
_ROUNDS = 5
# a library has to be this much faster to be taken in place of torch's own
_MARGIN = 1.1

# (rows of a are contiguous, rows of b are contiguous) -> how many times faster oneDNN is
_ratios: dict[tuple[bool, bool], float] = {}


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    # private to PyTorch: what its compiler calls for a Linear; computes a @ weight.T + bias
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")


def _torch(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(a, b.t(), bias)


def applies(*tensors: Tensor) -> bool:
    """Whether there is a choice for products of these tensors."""
    is_float32 = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    return is_float32 and not torch.compiler.is_compiling()


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a @ b + bias``.

    Args:
        a: (..., J).
        b: (J, L), a transposed weight as a rule.
        bias: (L,) or None.
    """
    is_large = a.shape[:-1].numel() * b.numel() >= _MIN_MULTIPLICATIONS
    # oneDNN's operator has no derivative: a backward under create_graph takes torch's
    if is_large and applies(a, b) and not torch.is_grad_enabled():
        rows = a if a.dim() == 2 else a.flatten(0, -2)
        if _ratio(rows.stride(-1) == 1, b.stride(-1) == 1) > _MARGIN:
            return _onednn(rows, b, bias).view(*a.shape[:-1], b.shape[-1])
    return _torch(a, b, bias)


def _ratio(dense_a: bool, dense_b: bool) -> float:
    """How many times faster oneDNN is than torch's own product for operands of this layout."""
    request = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if request not in _CHOICES:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {_CHOICES}, got {request!r}")
    if request != "auto":
        return 0.0 if request == "torch" else float("inf")
    layout = (dense_a, dense_b)
    if layout not in _ratios:
        _ratios[layout] = _measure(dense_a, dense_b)
    return _ratios[layout]


def _measure(dense_a: bool, dense_b: bool) -> float:
    size = _MEASURED_SIZE
    # small whole numbers: every order of summation gives the same bits
    count = torch.arange(size * size, dtype=torch.float32, device="cpu").view(size, size)
    a, b = count % 7 - 3.0, count % 5 - 2.0
    a, b = a if dense_a else a.t(), b if dense_b else b.t()
    with torch.autocast("cpu", enabled=False):
        return _ratio_of(a, b)


def _ratio_of(a: Tensor, b: Tensor) -> float:
    try:
        is_right = torch.equal(_onednn(a, b, None), _torch(a, b, None))
    except (AttributeError, RuntimeError):
        # this PyTorch has no such operator, or no oneDNN
        return 0.0
    if not is_right:
        return 0.0
    # in turns, and the best of each: what else the machine does hits both
    times = [(_seconds(_torch, a, b), _seconds(_onednn, a, b)) for _ in range(_ROUNDS)]
    return min(t for t, _ in times) / min(o for _, o in times)


def _seconds(function: Callable, a: Tensor, b: Tensor) -> float:
    start = time.perf_counter()
    function(a, b, None)
    return time.perf_counter() - start


def report() -> str:
    """One line for ``info``: which library computes products, and what was measured."""
    names = {(True, False): "x W^T", (True, True): "dy W", (False, True): "dy^T x"}
    parts = []
    for (dense_a, dense_b), name in names.items():
        ratio = _ratio(dense_a, dense_b)
        library = "oneDNN" if ratio > _MARGIN else "torch's own"
        measured = f" ({ratio:.2f}x)" if 0.0 < ratio < float("inf") else ""
        parts.append(f"{name} {library}{measured}")
    return ", ".join(parts)
