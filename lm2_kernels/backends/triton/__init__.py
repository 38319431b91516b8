"""The Triton backend: fused kernels for NVIDIA GPUs from sm_80 on and AMD gfx942.

``memory_attention`` with ``top_k`` or a head width above 256 takes the composite path: PyTorch's
own operators on the same device, a block of scores at a time.
"""

import functools
import subprocess
from collections.abc import Callable

import torch
from torch import Tensor
from triton.errors import TritonError

from lm2_kernels.backends import constant_when_compiled
from lm2_kernels.backends.contract import OPTIONAL, RESULTS
from lm2_kernels.backends.triton import (
    launch,
    memory_attention,
    memory_update,
    pooled_gate,
    residual_layer_norm,
)

# the ops that have kernels: each a module of its name
_MODULES = (memory_attention, memory_update, pooled_gate, residual_layer_norm)

DEVICES = launch.DEVICES


def _explained(function: Callable) -> Callable:
    """Name op, tensors and target when Triton cannot compile or launch a kernel."""

    @functools.wraps(function)
    def wrapper(*args):
        try:
            return function(*args)
        # the last two of a C compiler, which makes what a kernel is launched by
        except (TritonError, OSError, subprocess.SubprocessError) as error:
            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            given = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors)
            raise RuntimeError(
                f"{function.__name__}: Triton cannot compile or launch this kernel on "
                f"{launch.target_of(tensors[0])} for tensors {given}: {error}; use backend='eager'"
            ) from error

    return wrapper


for _module in _MODULES:
    for _function in {*RESULTS, *OPTIONAL} & vars(_module).keys():
        globals()[_function] = _explained(getattr(_module, _function))


# torch.compile takes the answer as it is: it cannot trace the driver
@constant_when_compiled
def _device_reason(device_index: int | None) -> str | None:
    reason = None if launch.interpreted() else launch.driver_reason()
    if reason is not None:
        return reason
    target = launch.target(device_index)
    if target not in launch.TARGETS:
        return f"the GPU is {target}, it needs sm_80 or newer, or gfx942"
    return None


def unsupported_reason(op: str, *tensors: Tensor) -> str | None:
    """See :mod:`lm2_kernels.backends.contract`."""
    reason = launch.interpreter_reason()
    if reason is not None:
        return reason
    if not tensors:
        has_gpu = torch.cuda.is_available() or "cpu" in DEVICES
        return None if has_gpu else "torch sees no GPU"
    reason = _device_reason(tensors[0].device.index)
    if reason is not None:
        return reason
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return "float64 is not implemented, use float32"
        if tensor.dtype == torch.bfloat16 and launch.interpreted():
            return "Triton's interpreter computes bfloat16 wrongly, use float32 or float16"
    if op == "residual_layer_norm" and tensors[0].shape[-1] > residual_layer_norm.MAX_WIDTH:
        return f"rows wider than {residual_layer_norm.MAX_WIDTH} are not implemented"
    return None
