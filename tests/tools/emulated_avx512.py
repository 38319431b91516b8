"""The C++ kernels' AVX-512 levels on a processor without: tests/native/avx512emu.h, as operators.

Everything else is compiled as setup.py does it, and the processor is said to have it all.
"""

import contextlib
import functools
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from lm2_kernels.backends import cpp, extension
from tools.compiling import CSRC, NATIVE, cached, link_operators, run_all, torch_flags

NAMESPACE = "lm2_kernels_avx512"
# what dispatch.cpp is told of the processor
HAS_EVERY_LEVEL = "-D__builtin_cpu_supports(name)=1"
# a pragma takes no macro: what a level file asks of the processor is left out of a copy
_TARGET = "#pragma GCC target"


def avx512_reason() -> str | None:
    """Why the AVX-512 levels cannot be emulated on this machine, or None."""
    if platform.machine() != "x86_64":
        return f"AVX-512 is of x86-64, this is {platform.machine()}"
    # of the processor, not of what torch was told to make of it
    if not torch.cpu._is_avx2_supported():
        return "the emulation takes AVX2"
    return None if shutil.which("g++") else "no g++ to compile the emulation with"


def emulation_command(source: Path, result: Path, *flags: str) -> list[str]:
    """How an AVX-512 level's file is compiled for the emulation."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(_TARGET)]
    if len(kept) == len(lines):
        raise AssertionError(f"{source.name} has changed: no line starts with {_TARGET}")
    copy = result.parent / source.name
    copy.write_text("".join(kept), encoding="utf-8")
    flags += ("-mavx2", "-mfma", "-mf16c", "-Wno-psabi", f"-I{source.parent}")
    emulation = ("-include", str(NATIVE / "avx512emu.h"))
    return ["g++", "-c", "-std=c++20", *flags, *emulation, str(copy), "-o", str(result)]


def _build(folder: Path) -> Path:
    commands, objects = [], []
    flags = ("-fPIC", "-O2", "-fno-math-errno", "-fno-trapping-math")
    for source in [CSRC / "ops.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]:
        objects.append(folder / f"{source.name}.o")
        if "avx512" in source.name:
            commands.append(emulation_command(source, objects[-1], *flags))
            continue
        command = ["g++", "-c", "-std=c++20", *flags, *torch_flags(), HAS_EVERY_LEVEL]
        if source.name in ("level_base.cpp", "level_avx2.cpp"):
            command.append("-O0")  # not run: a higher level is there
        namespace = f"-Dlm2_kernels_cpp={NAMESPACE}"
        commands.append([*command, namespace, str(source), "-o", str(objects[-1])])
    run_all(commands)
    return link_operators(objects, folder / "emulated.so")


@functools.cache
def _load() -> None:
    torch.ops.load_library(str(cached(f"avx512-{torch.__version__}", ".so", _build)))
    update = getattr(torch.ops, NAMESPACE).memory_update_forward
    row = torch.zeros(1, 1, 1)
    with mock.patch.dict(os.environ):
        # the level is chosen at the first call
        os.environ.pop("LM2_KERNELS_CPU_LEVEL", None)
        update(row, row, row, row, row, None, None, None, "read", 1)


@contextlib.contextmanager
def emulated_avx512() -> Iterator[None]:
    """Have ``backend="cpp"`` run the highest level, whatever the processor is."""
    _load()
    before = cpp.NAMESPACE, extension._cpu_reason
    cpp.NAMESPACE, extension._cpu_reason = NAMESPACE, None
    try:
        yield
    finally:
        cpp.NAMESPACE, extension._cpu_reason = before


# a test of whole layers or models, on this processor's own level and on the highest
every_level = pytest.mark.parametrize(
    "environment",
    [
        pytest.param(contextlib.nullcontext, id=""),
        pytest.param(
            emulated_avx512,
            id="avx512",
            marks=pytest.mark.skipif(avx512_reason() is not None, reason=str(avx512_reason())),
        ),
    ],
)
