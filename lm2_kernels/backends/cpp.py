"""The compiled backend: C++ kernels for CPU tensors, CUDA C++ kernels for CUDA tensors.

Every function goes to the operator of its name in ``torch.ops.lm2_kernels_cpp`` (csrc/), and the
dispatcher to the device. On CUDA, ``memory_attention`` with ``top_k`` or heads wider than 256 takes
the composite path: PyTorch's own operators, a block of scores at a time.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lm2_kernels import backends
from lm2_kernels.backends import composite, constant_when_compiled, extension
from lm2_kernels.backends.contract import OPTIONAL, RESULTS

DEVICES = {"cpu": "CPUs", "cuda": "NVIDIA GPUs"}
NAMESPACE = "lm2_kernels_cpp"
_MAX_CUDA_HEAD_WIDTH = 256
# device types whose operators have these limits; tests that run the CUDA kernels in an emulator
# add "cpu", and exchange the namespace
_cuda_like = {"cuda"}


@functools.cache
def _operator(namespace: str, function: str) -> Callable | None:
    operator = getattr(getattr(torch.ops, namespace), function, None)
    return None if operator is None else operator.default


def has(function: str) -> bool:
    """Whether the extension is there and has an operator of this name."""
    return extension.cpu_reason() is None and _operator(NAMESPACE, function) is not None


def call(function: str, *args):
    """Call an operator of the extension, by its name."""
    operator = _operator(NAMESPACE, function)
    # autograd has been dealt with above: this spares its layer of the dispatcher
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def _composite(query: Tensor, top_k: int | None) -> bool:
    if query.device.type not in _cuda_like:
        return False
    return top_k is not None or query.shape[-1] > _MAX_CUDA_HEAD_WIDTH


def memory_attention_forward(query, key, value, slot_mask, seed, *options):
    """See :mod:`lm2_kernels.backends.contract`."""
    _, _, _, top_k, _ = options
    if _composite(query, top_k):
        backends.record("memory_attention_forward", "cpp/composite")
        return composite.memory_attention_forward(query, key, value, slot_mask, seed, *options)
    return call("memory_attention_forward", query, key, value, slot_mask, seed, *options)


def memory_attention_backward(dout, query, *args):
    """See :mod:`lm2_kernels.backends.contract`."""
    *_, top_k, _, _, _ = args
    if _composite(query, top_k):
        backends.record("memory_attention_backward", "cpp/composite")
        return composite.memory_attention_backward(dout, query, *args)
    return call("memory_attention_backward", dout, query, *args)


for _function in (*RESULTS, *OPTIONAL):
    globals().setdefault(_function, functools.partial(call, _function))


def transposed(matrix: Tensor, needs_sums: bool = False) -> tuple[Tensor, Tensor]:
    """A contiguous copy of ``matrix.t()``, and if they are needed the sums (J,) of the rows.

    Args:
        matrix: (I, J) on a CPU, float32 or float64, with contiguous rows.
        needs_sums: without it an empty tensor stands for the sums.
    """
    return call("transposed_and_sums", matrix, needs_sums)


def tanh(x: Tensor) -> Tensor:
    """``tanh(x)``, contiguous.

    Args:
        x: (B, R, D) on a CPU, of any dtype that the ops take.
    """
    return call("tanh", x)


# torch.compile takes the answer as it is: it cannot trace the extension
@constant_when_compiled
def _reason(op: str, device_type: str, device_index: int | None) -> str | None:
    is_cpu = device_type == "cpu"
    reason = extension.cpu_reason() if is_cpu else extension.cuda_reason(device_index)
    if reason is None and _operator(NAMESPACE, f"{op}_forward") is None:
        return f"it has no {op}"
    return reason


def unsupported_reason(op: str, *tensors: Tensor) -> str | None:
    """See :mod:`lm2_kernels.backends.contract`."""
    if not tensors:
        return _reason(op, "cpu", None)
    device = tensors[0].device
    reason = _reason(op, device.type, device.index)
    if reason is not None or device.type not in _cuda_like:
        return reason
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "float64 is not implemented on CUDA, use float32"
    return None
