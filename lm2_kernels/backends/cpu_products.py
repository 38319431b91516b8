"""Matrix products of CPU tensors, by the faster of two exact ways.

float32: PyTorch's own ``mm`` calls MKL, which on some processors (AMD's with AVX-512) reaches half
of what oneDNN does, and on others as much or more. Both are exact float32.

16-bit: on a processor without instructions for it, PyTorch's own product takes 8 to 100 times what
float32 does. There the operands are widened, multiplied in float32 and the result rounded, which is
what a 16-bit product with float32 sums is.

Which is the faster one depends on the size too. So the first large product of each dtype, layout
and class of size is timed both ways, once a process, and the faster one kept: some milliseconds, of
1024 some tenths of a second. In float32 products of few rows, a decoded token's or a pooled gate's,
are a class too.
``LM2_KERNELS_FLOAT32_PRODUCTS=torch`` (or ``onednn``) and ``LM2_KERNELS_16BIT_PRODUCTS=torch`` (or
``float32``) decide without a measurement, for results that are bit-equal from one process to the
next.
"""

import os
import threading
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lm2_kernels.backends import cpp
from lm2_kernels.backends.contract import accumulation_dtype

_16_BIT = (torch.bfloat16, torch.float16)
# the names of the way that is not torch's own, and the variables that choose
FLOAT32_VARIABLE = "LM2_KERNELS_FLOAT32_PRODUCTS"
_16_BIT_VARIABLE = "LM2_KERNELS_16BIT_PRODUCTS"
_ALTERNATIVE = {FLOAT32_VARIABLE: "onednn", _16_BIT_VARIABLE: "float32"}
# multiplications from which on the overhead of the other way, some 20 us a call, cannot matter
_MIN_MULTIPLICATIONS = {torch.float32: 1 << 24, torch.bfloat16: 1 << 18, torch.float16: 1 << 18}
# fewer rows of 16 bits are a walk through the weight, which widening it would only make longer
_MIN_ROWS = 8
# float32 products of no more rows, or sums of no more terms, are a class of their own: a walk
# through one matrix, which may be worth the other way from fewer multiplications on, if it is long
_FEW = 16
_MIN_MULTIPLICATIONS_OF_FEW = 1 << 18
_MIN_WALK = 1 << 16
# rows and columns of what is timed; a product goes by the largest that has not more
# multiplications, or by the first
_SIZES = (256, 512, 1024)
_ROUNDS = {_FEW: 5, 256: 5, 512: 5, 1024: 3}
# the other way has to be this much faster to be taken in place of torch's own
_MARGIN = 1.1
# if it is so much faster two rounds are enough, and larger products are as the smallest
_CLEAR = 4.0

# (dtype, rows of a are contiguous, rows of b are contiguous, size or _FEW) -> how many times faster
# it is
_ratios: dict[tuple[torch.dtype, bool, bool, int], float] = {}
# what is widened is a float32 product, which is measured within
_measuring = threading.RLock()


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    # private to PyTorch: what its compiler calls for a Linear; computes a @ weight.T + bias. It
    # copies an `a` that is not contiguous, slowly where it is transposed, and reads a bias as if it
    # had no strides
    if a.stride(1) != 1 and _transposes():
        a, _ = cpp.transposed(a.t())
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")


def _transposes() -> bool:
    """Whether there is a kernel that transposes; modes do not know it."""
    return cpp.has("transposed_and_sums") and torch._C._len_torch_dispatch_stack() == 0


def _widened(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.float()
    # autocast would narrow them again
    with torch.autocast("cpu", enabled=False):
        return product(a.float(), b.float(), bias).to(a.dtype)


def _torch(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None and a.dim() == 2:
        return torch.mm(a, b)
    return F.linear(a, b.t(), bias)


def _other(dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    return _widened if dtype in _16_BIT else _onednn


def is_large(dtype: torch.dtype, a: Tensor, columns: int) -> bool:
    """Whether a product (..., J) (J, columns) on the CPU, computed in this dtype, is large enough
    for another way than torch's own.
    """
    fewest = _MIN_MULTIPLICATIONS.get(dtype)
    if fewest is None:
        return False
    multiplications = a.numel() * columns
    if dtype != torch.float32:
        return multiplications >= fewest and a.numel() >= _MIN_ROWS * a.shape[-1]
    if multiplications >= fewest:
        return True
    # the least are asked for most often
    return multiplications >= _MIN_MULTIPLICATIONS_OF_FEW and _is_long_walk(
        multiplications, _rows_or_terms(a)
    )


def _is_long_walk(multiplications: int, rows_or_terms: int) -> bool:
    is_many = multiplications >= _MIN_MULTIPLICATIONS_OF_FEW
    return is_many and rows_or_terms <= _FEW and multiplications >= rows_or_terms * _MIN_WALK


def _is_large_float32(multiplications: int, rows_or_terms: int) -> bool:
    is_large = multiplications >= _MIN_MULTIPLICATIONS[torch.float32]
    return is_large or _is_long_walk(multiplications, rows_or_terms)


def _rows_or_terms(a: Tensor) -> int:
    """Rows of a matrix (..., J); of a transposed one J, the terms of its sums."""
    columns = a.shape[-1]
    return columns if columns == 0 or a.stride(-1) != 1 else a.numel() // columns


def is_widened(dtype: torch.dtype, a: Tensor, columns: int) -> bool:
    """Whether products x W^T of this 16-bit dtype, (..., J) (J, columns), go through float32."""
    return _ratio(dtype, True, False, _size(dtype, a, columns)) > _MARGIN


def _size(dtype: torch.dtype, a: Tensor, columns: int) -> int:
    """Which of the sizes that are timed stands for a product (..., J) (J, columns)."""
    if dtype == torch.float32 and _rows_or_terms(a) <= _FEW:
        return _FEW
    return _size_of(a.numel() * columns)


def _size_of(multiplications: int) -> int:
    return next((s for s in reversed(_SIZES) if multiplications >= s**3), _SIZES[0])


def _is_matrix(x: Tensor) -> bool:
    """Whether rows or columns are contiguous and apart, as both libraries know a matrix."""
    (rows, columns), (row, column) = x.shape, x.stride()
    return (column == 1 and row >= columns) or (row == 1 and column >= rows)


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """``a @ b + bias``, all of one dtype, or the ReLU of that.

    Args:
        a: (..., J).
        b: (J, L), a transposed weight as a rule.
        bias: (L,) or None.
        relu: whether negative results become 0, in place.
    """
    result = None
    if _is_choice(a, b, bias):
        rows = a if a.dim() == 2 else a.flatten(0, -2)
        way = _faster(rows, b)
        if way is not None:
            result = way(rows, b, bias).view(*a.shape[:-1], b.shape[-1])
    if result is None:
        result = _torch(a, b, bias)
    # oneDNN could do it with the product, but makes 0 of a NaN
    return result.relu_() if relu else result


def product_and_sums(dy: Tensor, x: Tensor, *, needs_sums: bool) -> tuple[Tensor, Tensor | None]:
    """``dy^T x``, and if they are needed the sums of dy's columns in the dtype of sums: the
    gradients of a Linear's weight and bias.

    Where the product takes a transposed copy, the sums come with that.

    Args:
        dy: (J, L).
        x: (J, D).
        needs_sums: without it there is None.
    """
    a, sums = dy.t(), None
    way = _faster(a, x) if _is_choice(a, x) else None
    if way is _onednn and a.stride(1) != 1 and _transposes():
        a, sums = cpp.transposed(dy, needs_sums)
    elif needs_sums:
        sums = dy.sum(dim=0, dtype=accumulation_dtype(dy))
    return (way or _torch)(a, x, None), sums if needs_sums else None


def add_product(total: Tensor, a: Tensor, b: Tensor, *, in_place: bool) -> Tensor:
    """``total + a @ b``, all of one dtype: by the product itself where that is torch's.

    Args:
        total: (I, L).
        a: (I, J).
        b: (J, L).
        in_place: whether the result may be ``total``.
    """
    way = _faster(a, b) if _is_choice(a, b) else None
    if way is None:
        # modes that count know the product that is not in place
        in_place = in_place and torch._C._len_torch_dispatch_stack() == 0
        return total.addmm_(a, b) if in_place else torch.addmm(total, a, b)
    product = way(a, b, None)
    return total.add_(product) if in_place else product.add_(total)


def is_linear_by_onednn(rows: int, terms: int, columns: int) -> bool:
    """Whether a float32 Linear of so many rows, inputs and outputs goes to oneDNN: as
    :func:`lm2_kernels.linear.linear` asks, as if it were square.
    """
    is_large = _is_large_float32(rows * terms * terms, rows)
    return is_large and is_by_onednn(rows, terms, columns, True, False)


def is_by_onednn(rows: int, terms: int, columns: int, dense_a: bool, dense_b: bool) -> bool:
    """Whether :func:`product` multiplies float32 matrices (rows, terms) and (terms, columns) by
    oneDNN. Of a dense one rows are contiguous, of another columns.
    """
    multiplications, few = rows * terms * columns, rows if dense_a else terms
    if not _is_large_float32(multiplications, few):
        return False
    size = _FEW if few <= _FEW else _size_of(multiplications)
    return _ratio(torch.float32, dense_a, dense_b, size) > _MARGIN


def _is_choice(a: Tensor, b: Tensor, bias: Tensor | None = None) -> bool:
    """Whether ``a @ b`` is on a CPU, and large enough for another way than torch's own."""
    if not (a.is_cpu and is_large(a.dtype, a, b.shape[1])):
        return False
    # neither way has a derivative: a backward under create_graph takes torch's
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    # of what differs in dtype, torch's own says so
    return a.dtype == b.dtype and (bias is None or bias.dtype == a.dtype)


def _faster(a: Tensor, b: Tensor) -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """The other way for two matrices, if it is the faster one."""
    # what is expanded, or strided along both axes, torch's own copies
    if not (_is_matrix(a) and _is_matrix(b)):
        return None
    size = _size(a.dtype, a, b.shape[1])
    is_faster = _ratio(a.dtype, a.stride(1) == 1, b.stride(1) == 1, size) > _MARGIN
    return _other(a.dtype) if is_faster else None


def _ratio(dtype: torch.dtype, dense_a: bool, dense_b: bool, size: int) -> float:
    """How many times faster the other way is than torch's own for operands of this layout."""
    variable = _16_BIT_VARIABLE if dtype in _16_BIT else FLOAT32_VARIABLE
    request = os.environ.get(variable) or "auto"
    choices = ("auto", "torch", _ALTERNATIVE[variable])
    if request not in choices:
        raise ValueError(f"{variable} must be one of {choices}, got {request!r}")
    if request != "auto":
        return 0.0 if request == "torch" else float("inf")
    key = (dtype, dense_a, dense_b, size)
    if key in _ratios:
        return _ratios[key]
    if torch._C._len_torch_dispatch_stack() > 0:
        # under a mode that watches or fakes every operator, times say nothing
        return 0.0
    # one thread after the other, and one answer for all
    with _measuring:
        if key not in _ratios:
            _ratios[key] = _measure(*key)
        return _ratios[key]


def _measure(dtype: torch.dtype, dense_a: bool, dense_b: bool, size: int) -> float:
    if size > _SIZES[0]:
        smallest = _ratio(dtype, dense_a, dense_b, _SIZES[0])
        if smallest > _CLEAR:
            return smallest
    shapes = (size, size), (size, size)
    if size == _FEW:
        # a quarter of what few are at most; where a is transposed so many terms, not rows
        few, many = _FEW // 4, _SIZES[1]
        shapes = (few, many), ((many, 2 * many) if dense_a else (few, 2 * many))
    # small whole numbers: every order of summation gives the same bits
    a, b = (
        (torch.arange(rows * columns, dtype=torch.float32, device="cpu") % modulus - 2.0)
        .to(dtype)
        .view(rows, columns)
        for (rows, columns), modulus in zip(shapes, (7, 5), strict=True)
    )
    a = a if dense_a else a.t()
    b = b if dense_b else b.t().contiguous().t()
    with torch.autocast("cpu", enabled=False), torch.no_grad():
        return _ratio_of(a, b, _ROUNDS[size], cold=size == _FEW)


def _ratio_of(a: Tensor, b: Tensor, rounds: int, *, cold: bool = False) -> float:
    """How many times faster the other way is; ``cold``: of operands that a core's own caches no
    longer have, as a weight that is gone through once.
    """
    other, evicting = _other(a.dtype), torch.zeros(1 << 21 if cold else 0, device="cpu")
    try:
        is_right = torch.equal(other(a, b, None), _torch(a, b, None))
    except (AttributeError, RuntimeError):
        # this PyTorch has no such operator, or no oneDNN
        return 0.0
    if not is_right:
        return 0.0
    times: list[tuple[float, float]] = []
    while len(times) < rounds:
        # in turns, and the best of each: what else the machine does hits both
        pair = []
        for way in (_torch, other):
            evicting += 1.0
            pair.append(_seconds(way, a, b))
        times.append(tuple(pair))
        ratio = min(t for t, _ in times) / min(o for _, o in times)
        # one round alone may have been interrupted
        if len(times) > 1 and ratio > _CLEAR:
            break
    return ratio


def _seconds(function: Callable, a: Tensor, b: Tensor) -> float:
    start = time.perf_counter()
    function(a, b, None)
    return time.perf_counter() - start


def report() -> dict[str, str]:
    """For ``info``: how products are computed, and what was measured."""
    names = {(True, False): "x W^T", (True, True): "dy W", (False, True): "dy^T x"}
    titles = {torch.float32: "oneDNN", torch.bfloat16: "float32", torch.float16: "float32"}
    lines = {}
    for dtype, title in titles.items():
        parts = []
        for layout, name in names.items():
            # by the way: what was measured at which sizes
            found: dict[str, list[str]] = {}
            for size in (_FEW, *_SIZES) if dtype == torch.float32 else _SIZES:
                ratio = _ratio(dtype, *layout, size)
                measured = found.setdefault(title if ratio > _MARGIN else "torch's own", [])
                if 0.0 < ratio < float("inf"):
                    measured.append(f"{ratio:.2f}x {'of few' if size == _FEW else f'at {size}'}")
                    if size == _SIZES[0] and ratio > _CLEAR:
                        measured.append("and above")
                        break
            ways = [f"{way} ({', '.join(m)})" if m else way for way, m in found.items()]
            parts.append(f"{name} {' and '.join(ways)}")
        lines[str(dtype).removeprefix("torch.")] = ", ".join(parts)
    return lines
