"""Triton's own launcher, in C, over a libcuda that launches nothing (tests/native/stub_cuda.c).

The fake driver of :mod:`tools.fake_gpu` has a launcher that sees what it is called with. Here the
real one parses its arguments and describes tiles. For a process of its own: whoever looks for
libcuda later finds the stub.
"""

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from triton.backends.nvidia import driver as nvidia

from tools import fake_gpu
from tools.compiling import NATIVE

_INCLUDE = Path(nvidia.__file__).parent / "include"
_FUNCTION = 0x1234


def build(folder: Path) -> Path:
    """The library, as what links and loads libcuda looks for it."""
    library = folder / "libcuda.so.1"
    command = ["gcc", "-std=c17", "-shared", "-fPIC", "-Wall", "-Wextra", f"-I{_INCLUDE}"]
    command += [str(NATIVE / "stub_cuda.c"), "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run(command, check=True)
    return library


@contextlib.contextmanager
def launched(folder: Path, target: str) -> Iterator[list[tuple[str, str]]]:
    """Kernel, and what the stub was told, of every launch in the block."""
    library = build(folder)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    stub.stub_said.restype = ctypes.c_char_p
    seen: list[tuple[str, str]] = []

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            self.real = nvidia.CudaLauncher(source, metadata)
            self.name = source.fn.fn.__name__
            # what of the parameters is no address of an allocation
            self.kinds = [kind for kind in source.signature.values() if kind != "constexpr"]

        def __call__(self, x: int, y: int, z: int, stream: Any, function: Any, *rest: Any) -> None:
            is_described = any(kind.startswith("tensordesc") for kind in self.kinds)
            # a description becomes several parameters
            stub.stub_begin(0 if is_described else len(self.kinds))
            self.real(x, y, z, stream, _FUNCTION, *rest)
            said = stub.stub_said().decode()
            head, _, values = said.strip().partition("params")
            scalars = [
                value
                for kind, value in zip(self.kinds, values.split(), strict=False)
                if not kind.startswith("*")
            ]
            seen.append((self.name, f"{head}{scalars}"))

    utils = nvidia.CudaUtils()
    # how tiles are described, and in later releases launches: what the fake driver has no name for
    real = {
        name: staticmethod(getattr(utils, name))
        for name in dir(utils)
        if not (name.startswith("_") or hasattr(fake_gpu.FakeDriver, name))
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(fake_gpu, "_Launcher", Launcher))
        for name, value in {"launcher_cls": Launcher, **real}.items():
            change = mock.patch.object(fake_gpu.FakeDriver, name, value, create=True)
            stack.enter_context(change)
        stack.enter_context(fake_gpu.fake_gpu(target, execute=False))
        yield seen
