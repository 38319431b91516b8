"""How a kernel is launched: on which target, under which device guard, and whether at all.

Triton's own launch looks at every argument of every call, which takes longer than many a kernel of
a small layer. What it finds depends on the layout of the tensors and on the options of the op:
:class:`Launches` remembers it.
"""

import contextlib
import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import numpy
import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

_T = TypeVar("_T")

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
def driver_reason() -> str | None:
    """Why Triton cannot be asked for a GPU, or None.

    It compiles its driver at first, with the host's C compiler and Python's headers.
    """
    try:
        triton.runtime.driver.active  # noqa: B018 - a property that makes it
    except Exception as error:
        if not torch.cuda.is_available():
            # whoever asks has fake tensors
            return "torch sees no GPU"
        return f"Triton's driver does not start: {type(error).__name__}: {error}"
    return None


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


_NO_GUARD = contextlib.nullcontext()


def device_guard(device: torch.device | None):
    """Make the tensors' device current: Triton launches on the current one."""
    if device is None or device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NO_GUARD
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


def all_row_strides(*tensors: Tensor | None) -> list[int]:
    """Those of tensors of rows, one after the other."""
    return [stride for tensor in tensors for stride in row_strides(tensor)]


class _Bound(NamedTuple):
    """A compiled kernel with all of its arguments but the tensors and what varies."""

    kernel: CompiledKernel
    current_stream: Callable[[], int]
    grid: tuple[int, int, int]
    # between the tensors and what varies, and behind it
    before: tuple
    after: tuple


# grid, scalars and constants of a launch
Arguments = tuple[tuple[int, ...], tuple, dict[str, Any]]


class Launches:
    """The launches of an op for one layout of its tensors and one set of options.

    The first launch of a kernel is Triton's own, which compiles it for what it sees in the
    arguments: types, addresses and sizes that 16 divides, sizes of 1. All of it follows from the
    layout and the options, so later launches hand new tensors to the compiled kernel at once. They
    do not on AMD GPUs, for which the size of the storage counts as well, nor while a profiler has
    hooked itself into Triton's launches. What else Triton asks its knobs for (``TRITON_DEBUG``,
    instrumentation) is as it was at the first launch.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._bound: dict[str, _Bound] = {}
        self._known: dict[str, Any] = {}

    def once(self, function: Callable[..., _T], *args: Any) -> _T:
        """What the function gives, which follows from layout and options: called once."""
        name = function.__name__
        if name not in self._known:
            self._known[name] = function(*args)
        return self._known[name]

    def run(
        self,
        kernel: Any,
        tensors: tuple[Tensor | None, ...],
        arguments: Callable[[], Arguments],
        varying: tuple[str, int] | None = None,
    ) -> None:
        """Launch ``kernel[grid](*tensors, *scalars, **constants)``.

        Args:
            kernel: a ``triton.jit`` function.
            tensors: those whose layout is known, and new contiguous ones whose shapes and dtypes
                follow from it.
            arguments: gives grid, scalars and constants, which follow from layout and options.
            varying: name in the kernel and value of the one scalar that does not, if there is one:
                an argument with a type, and among those that Triton does not specialise on.
        """
        bound = self._bound.get(kernel.__name__)
        with device_guard(self._device):
            if bound is None or _is_hooked():
                self._run_checked(kernel, tensors, arguments, varying)
                return
            compiled = bound.kernel
            compiled.run(
                *bound.grid,
                bound.current_stream(),
                compiled.function,
                compiled.packed_metadata,
                # no hooks, and nothing to tell them
                None,
                None,
                None,
                *tensors,
                *bound.before,
                *(() if varying is None else varying[1:]),
                *bound.after,
            )

    def _run_checked(
        self,
        kernel: Any,
        tensors: tuple[Tensor | None, ...],
        arguments: Callable[[], Arguments],
        varying: tuple[str, int] | None,
    ) -> None:
        grid, scalars, constants = arguments()
        compiled = kernel[grid](*tensors, *scalars, **constants)
        # the interpreter compiles nothing, and with a hook may come another kernel
        if not isinstance(compiled, CompiledKernel) or _is_hooked():
            return
        if compiled.metadata.target.backend != "cuda":
            return
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        first = len(tensors)
        names = kernel.arg_names[first + len(scalars) :]
        values = (*scalars, *(constants[name] for name in names))
        place = len(values) if varying is None else kernel.arg_names.index(varying[0]) - first
        self._bound[kernel.__name__] = _Bound(
            kernel=compiled,
            current_stream=functools.partial(driver.get_current_stream, device),
            grid=(*grid, 1, 1)[:3],
            before=values[:place],
            after=values[place + 1 :],
        )


# layouts are few, but where lengths vary
_MOST_LAYOUTS = 4096
_layouts: dict[tuple, Launches] = {}


def launches(op: str, tensors: tuple[Tensor | None, ...], *options: Any) -> Launches:
    """The launches of this op for tensors laid out as these, and these options.

    Raises:
        RuntimeError: a tensor has no memory.
    """
    device = None
    key: list[Any] = [op, options]
    for tensor in tensors:
        if tensor is not None:
            device, pointer = tensor.device, tensor.data_ptr()
            if pointer == 0 and tensor.numel() > 0:
                raise RuntimeError(
                    f"{op}: a tensor has no memory: it is fake, and its FakeTensorMode is not in "
                    f"force, or its storage was freed"
                )
            key += (tensor.shape, tensor.stride(), tensor.dtype, pointer % 16)
        else:
            key.append(None)
    key += (device, target(device.index))
    known = tuple(key)
    result = _layouts.get(known)
    if result is None:
        if len(_layouts) >= _MOST_LAYOUTS:
            _layouts.clear()
        result = _layouts[known] = Launches(device)
    return result


def forget() -> None:
    """Launch as if nothing had been launched before: for who changes what arguments come from."""
    _layouts.clear()


def _is_hooked() -> bool:
    """Whether a profiler wants to be told of launches."""
    knobs = triton.knobs.runtime
    enter, leave = knobs.launch_enter_hook, knobs.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
