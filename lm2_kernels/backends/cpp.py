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

__all__ = [
    "DEVICES",
    "memory_attention_backward",
    "memory_attention_forward",
    "memory_update_backward",
    "memory_update_forward",
    "pooled_gate_backward",
    "pooled_gate_forward",
    "residual_layer_norm_backward",
    "residual_layer_norm_forward",
    "unsupported_reason",
]

DEVICES = {"cpu": "CPUs", "cuda": "NVIDIA GPUs"}
NAMESPACE = "lm2_kernels_cpp"
_MAX_CUDA_HEAD_WIDTH = 256
# device types whose operators have these limits; tests that run the CUDA kernels in an emulator
# add "cpu", and exchange the namespace
_cuda_like = {"cuda"}


@functools.cache
def _operator(namespace: str, function: str) -> Callable:
    return getattr(getattr(torch.ops, namespace), function).default


def _call(function: str, *args):
    operator = _operator(NAMESPACE, function)
    # autograd has been dealt with above: this spares its layer of the dispatcher
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def _composite(query: Tensor, top_k: int | None) -> bool:
    if query.device.type not in _cuda_like:
        return False
    return top_k is not None or query.shape[-1] > _MAX_CUDA_HEAD_WIDTH


def memory_attention_forward(query, key, value, slot_mask, seed, *options):
    """See the contract in :mod:`lm2_kernels.backends`."""
    _, _, _, top_k, _ = options
    if _composite(query, top_k):
        backends.record("memory_attention_forward", "cpp/composite")
        return composite.memory_attention_forward(query, key, value, slot_mask, seed, *options)
    return _call("memory_attention_forward", query, key, value, slot_mask, seed, *options)


def memory_attention_backward(dout, query, *args):
    """See the contract in :mod:`lm2_kernels.backends`."""
    *_, top_k, _, _, _ = args
    if _composite(query, top_k):
        backends.record("memory_attention_backward", "cpp/composite")
        return composite.memory_attention_backward(dout, query, *args)
    return _call("memory_attention_backward", dout, query, *args)


def memory_update_forward(*args):
    """See the contract in :mod:`lm2_kernels.backends`."""
    return _call("memory_update_forward", *args)


def memory_update_backward(*args):
    """See the contract in :mod:`lm2_kernels.backends`."""
    return _call("memory_update_backward", *args)


def residual_layer_norm_forward(*args):
    """See the contract in :mod:`lm2_kernels.backends`."""
    return _call("residual_layer_norm_forward", *args)


def residual_layer_norm_backward(*args):
    """See the contract in :mod:`lm2_kernels.backends`."""
    return _call("residual_layer_norm_backward", *args)


def pooled_gate_forward(*args):
    """See the contract in :mod:`lm2_kernels.backends`."""
    return _call("pooled_gate_forward", *args)


def pooled_gate_backward(*args):
    """See the contract in :mod:`lm2_kernels.backends`."""
    return _call("pooled_gate_backward", *args)


# torch.compile takes the answer as it is: it cannot trace the extension
@constant_when_compiled
def _device_reason(device_type: str, device_index: int | None) -> str | None:
    if device_type == "cpu":
        return extension.cpu_reason()
    return extension.cuda_reason(device_index)


def unsupported_reason(op: str, *tensors: Tensor) -> str | None:
    """See the contract in :mod:`lm2_kernels.backends`."""
    if not tensors:
        return extension.cpu_reason()
    device = tensors[0].device
    reason = _device_reason(device.type, device.index)
    is_float64 = any(tensor.dtype == torch.float64 for tensor in tensors)
    if reason is None and is_float64 and device.type in _cuda_like:
        return "float64 is not implemented on CUDA, use float32"
    return reason
