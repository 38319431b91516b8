"""The CUDA kernels on the CPU: csrc/cuda compiled with tests/native's emulator, as operators.

The library holds the kernels and bindings of ``_cuda``; its operators take CPU tensors under
another namespace, which ``emulated_cuda`` has the cpp backend use.
"""

import contextlib
import ctypes
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from lm2_kernels.backends import cpp, extension
from tools.compiling import (
    CSRC,
    NATIVE,
    cached,
    cuda_home,
    link_operators,
    load_setup,
    run_all,
    torch_flags,
)

CUDA_SOURCES = CSRC / "cuda"
NAMESPACE = "lm2_kernels_emulated"

_library: ctypes.CDLL | None = None
_Listener = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)


def cuda_include() -> str:
    """The toolkit's headers."""
    return load_setup().cuda_include(cuda_home())


def emulation_reason() -> str | None:
    """Why the CUDA kernels cannot be emulated on this machine, or None."""
    if platform.machine() != "x86_64":
        return f"the emulator switches fibers on x86-64 only, this is {platform.machine()}"
    if shutil.which("g++") is None:
        return "no g++ to compile the emulator with"
    if cuda_home() is None:
        return (
            "no CUDA toolkit, whose headers the kernels include (or no setuptools to find it with)"
        )
    return None


def emulator_command(source: Path, result: Path, *flags: str) -> list[str]:
    """How one file of kernels is compiled for the emulator."""
    return [
        *("g++", "-c", "-x", "c++", "-std=c++20", "-fPIC", *flags, f"-I{cuda_include()}"),
        *("-include", str(NATIVE / "cuemu.h"), str(source), "-o", str(result)),
    ]


def _build(folder: Path) -> Path:
    commands, objects = [], []
    for source in sorted(CUDA_SOURCES.glob("*.cu")):
        objects.append(folder / f"{source.stem}.o")
        commands.append(emulator_command(source, objects[-1], "-O1"))
    objects.append(folder / "emulated_runtime.o")
    commands.append(emulator_command(NATIVE / "emulated_runtime.cpp", objects[-1], "-O1"))
    objects.append(folder / "bindings.o")
    commands.append(
        [
            *("g++", "-c", "-std=c++20", "-fPIC", "-O1", "-DLM2_EMULATED_CUDA", *torch_flags()),
            *(f"-I{cuda_include()}", str(CUDA_SOURCES / "bindings.cpp"), "-o", str(objects[-1])),
        ]
    )
    run_all(commands)
    return link_operators(objects, folder / "emulated.so")


def _load() -> ctypes.CDLL:
    global _library
    if _library is None:
        path = str(cached(f"emulated-{torch.__version__}", ".so", _build))
        torch.ops.load_library(path)
        _library = ctypes.CDLL(path)
    return _library


@contextlib.contextmanager
def emulated_cuda(seed: int = 0, *, major: int = 8) -> Iterator[None]:
    """Have ``backend="cpp"`` run the CUDA kernels on CPU tensors, in the order a seed gives.

    ``major``: of the compute capability that the device says it has.
    """
    library = _load()
    library.lm2_set_seed(ctypes.c_uint64(seed))
    library.lm2_set_major(major)
    before = cpp.NAMESPACE, cpp._cuda_like, extension._cpu_reason
    cpp.NAMESPACE, cpp._cuda_like, extension._cpu_reason = NAMESPACE, {"cpu", "cuda"}, None
    try:
        yield
    finally:
        cpp.NAMESPACE, cpp._cuda_like, extension._cpu_reason = before


@contextlib.contextmanager
def launches() -> Iterator[list[tuple[int, int]]]:
    """Blocks, and threads of a block, of each kernel that is launched in the emulator meanwhile."""
    grids = []
    listener = _Listener(lambda blocks, threads: grids.append((blocks, threads)))
    library = _load()
    library.lm2_set_listener(listener)
    try:
        yield grids
    finally:
        library.lm2_set_listener(_Listener())
