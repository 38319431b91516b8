"""The backends' functions as ``torch.library`` operators: what torch.compile sees.

Eager calls skip this layer (the dispatcher costs more than some kernels), but for Triton's while a
mode watches operators; a compiled graph holds ``torch.ops.lm2_kernels.<op>_forward`` and
``_backward`` with the backend's name as the last argument, so every backend is traced the same way.
The compiled backend's own operators (``torch.ops.lm2_kernels_cpp``) get the same shape functions.

All are made from the table of :mod:`lm2_kernels.backends.contract` and the signatures of
:mod:`lm2_kernels.backends.eager`; but for ``lm2_kernels::tanh``, which is of no op and has no
backend, and what the compiled backend has for products.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from lm2_kernels import backends
from lm2_kernels.backends import cpp, eager
from lm2_kernels.backends.contract import OPTIONAL, RESULTS


def run(backend: str, function: str, *args):
    """Call a backend's function: directly, or through its operator inside a compiled graph.

    ``torch.onnx.export`` gets what the function is made of, the eager backend's operators.
    """
    if torch.compiler.is_compiling():
        if torch.onnx.is_in_onnx_export():
            # ONNX knows PyTorch's operators, not ours
            return getattr(eager, function)(*args)
        return getattr(torch.ops.lm2_kernels, function)(*args, backend)
    return backends.call(backend, function, *args)


def schema(function: str) -> str:
    """``(arguments) -> (results)`` of a backend's function, as torch writes it."""
    return torch.library.infer_schema(_signature(function), mutates_args=())


def _signature(function: str) -> Callable:
    """What has a backend's function's arguments and annotations."""
    return OPTIONAL.get(function) or getattr(eager, function)


def shapes(function: str) -> Callable[..., tuple[Tensor, ...]]:
    """What gives a function's results their shapes, from all its arguments."""
    results = (RESULTS | OPTIONAL)[function]
    names = list(inspect.signature(_signature(function)).parameters)
    places = [names.index(name) for name in inspect.signature(results).parameters]
    return lambda *args: results(*(args[place] for place in places))


def _register(function: str) -> None:
    def implementation(*args):
        return backends.call(args[-1], function, *args[:-1])

    operator = torch.library.custom_op(
        f"lm2_kernels::{function}",
        implementation,
        mutates_args=(),
        schema=schema(function).replace(") ->", ", str backend) ->"),
    )
    empty = shapes(function)

    def fake(*args):
        made = empty(*args)
        return made if len(made) > 1 else made[0]

    operator.register_fake(fake)
    if cpp.has(function):
        torch.library.register_fake(f"{cpp.NAMESPACE}::{function}", fake)


for _function in (*RESULTS, *OPTIONAL):
    _register(_function)
if cpp.has("transposed_and_sums"):

    @torch.library.register_fake(f"{cpp.NAMESPACE}::transposed_and_sums")
    def _transposed(matrix: Tensor, needs_sums: bool) -> tuple[Tensor, Tensor]:
        rows, columns = matrix.shape
        return matrix.new_empty(columns, rows), matrix.new_empty(columns if needs_sums else 0)


@torch.library.custom_op("lm2_kernels::tanh", mutates_args=())
def tanh(x: Tensor) -> Tensor:
    """:func:`lm2_kernels.tanh.tanh` in a graph, which may be taken to another machine."""
    return cpp.tanh(x) if x.is_cpu and cpp.has("tanh") else torch.tanh(x).contiguous()


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


tanh.register_fake(_like)
if cpp.has("tanh"):
    torch.library.register_fake(f"{cpp.NAMESPACE}::tanh", _like)
