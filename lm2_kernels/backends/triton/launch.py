"""How a kernel is launched: on which target, under which device guard, and whether at all."""

import contextlib
import functools
import os
from types import ModuleType

import numpy
import torch
import triton
from torch import Tensor

# "small" stands for GPUs whose thread blocks get at most 100 KB of shared memory
TARGETS = ("sm_80", "sm_90", "sm_100", "small", "gfx942")


def interpreted() -> bool:
    """True when Triton's own interpreter runs the kernels (it must be asked for before import)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


# see the contract in lm2_kernels.backends; the test suite's driver adds CPUs, too
DEVICES = {"cuda": "NVIDIA and AMD GPUs"}
if interpreted():
    DEVICES["cpu"] = "CPUs in Triton's interpreter"


def interpreter_reason() -> str | None:
    """Why Triton's own interpreter cannot run here although it was asked for, or None."""
    if interpreted() and _release(triton) < (3, 7) and _release(numpy) >= (2, 4):
        return (
            f"the interpreter of triton {triton.__version__} fails beside numpy "
            f"{numpy.__version__}, it needs numpy below 2.4"
        )
    return None


def _release(module: ModuleType) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


@functools.cache
def target(device_index: int | None) -> str:
    """What the launch tables are keyed by: one of TARGETS, else the name of an unsupported GPU."""
    if interpreted():
        return "sm_80"
    with device_guard(None if device_index is None else torch.device("cuda", device_index)):
        current = triton.runtime.driver.active.get_current_target()
    if current.backend == "hip":
        return current.arch
    if current.arch < 80:
        return f"sm_{current.arch}"
    if current.arch in (86, 87, 89) or current.arch >= 110:
        return "small"
    if current.arch >= 100:
        return "sm_100"
    return "sm_90" if current.arch >= 90 else "sm_80"


def target_of(tensor: Tensor) -> str:
    """The launch target of the device that holds ``tensor``."""
    return target(tensor.device.index)


def device_guard(device: torch.device | None):
    """Make the tensors' device current: Triton launches on the current one."""
    if device is None or device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def last_contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor itself, or a copy where its last axis is not contiguous (expanded, transposed)."""
    if tensor is None or tensor.shape[-1] == 1 or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()


def row_strides(tensor: Tensor | None, num_axes: int = 2) -> tuple[int, ...]:
    """Strides of all axes but the last; 0 for an axis of one element, which so broadcasts.

    A missing tensor gets ``num_axes`` zeros, which a kernel never uses.
    """
    if tensor is None:
        return (0,) * num_axes
    return tuple(
        0 if tensor.shape[axis] == 1 else tensor.stride(axis) for axis in range(tensor.dim() - 1)
    )
