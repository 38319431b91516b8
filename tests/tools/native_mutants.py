"""The C++ and CUDA kernels with mutants in them, of which one at a time is switched on.

A mutant is an expression of a source that becomes another. All of a target's are compiled into one
library of operators, behind a variable.
"""

import contextlib
import ctypes
import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from lm2_kernels.backends import cpp
from lm2_kernels.testing import Case
from tools.compiling import CSRC, NATIVE, cached, link_operators, run_all, torch_flags
from tools.emulated_cuda import NAMESPACE as EMULATED
from tools.emulated_cuda import cuda_include, emulated_cuda, emulator_command


class NativeMutant(NamedTuple):
    """An expression, once in the file, what becomes of it, and a case that shows it."""

    name: str
    file: str  # of csrc: the folder is the target
    old: str
    new: str
    case: Case

    @property
    def target(self) -> str:
        return self.file.partition("/")[0]


def _copy(target: str, mutants: tuple[NativeMutant, ...], folder: Path) -> Path:
    """csrc with the mutants of a target in it."""
    copy = folder / "csrc"
    shutil.copytree(CSRC, copy)
    for number, mutant in enumerate(mutants, 1):
        if mutant.target != target:
            continue
        file = copy / mutant.file
        text = file.read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            raise AssertionError(f"{mutant.file} has changed: give {mutant.name!r} its new text")
        choice = f"(lm2_mutant == {number} ? ({mutant.new}) : ({mutant.old}))"
        file.write_text(text.replace(mutant.old, choice), encoding="utf-8")
    return copy


def _build(target: str, mutants: tuple[NativeMutant, ...], folder: Path) -> Path:
    source = _copy(target, mutants, folder)
    variable = folder / "mutant.h"
    variable.write_text('extern "C" {\nextern int lm2_mutant;\n}\n', encoding="utf-8")
    definition = folder / "mutant.cpp"
    definition.write_text('extern "C" {\nint lm2_mutant = 0;\n}\n', encoding="utf-8")
    flags = ("-O0", "-include", str(variable))
    plain = ("g++", "-c", "-std=c++20", "-fPIC", *flags)
    commands = [[*plain, str(definition)]]
    if target == "cpu":
        for file in [source / "ops.cpp", *sorted((source / "cpu").glob("*.cpp"))]:
            commands.append([*plain, *torch_flags(), f"-Dlm2_kernels_cpp={_namespace(target)}"])
            commands[-1].append(str(file))
    else:
        emulated = (
            "-DLM2_EMULATED_CUDA",
            f"-I{cuda_include()}",
            f"-D{EMULATED}={_namespace(target)}",
        )
        commands.append([*plain, *torch_flags(), *emulated, str(source / "cuda" / "bindings.cpp")])
        for file in [*sorted((source / "cuda").glob("*.cu")), NATIVE / "emulated_runtime.cpp"]:
            # without the result, which is added below
            commands.append(emulator_command(file, folder, "-fPIC", *flags)[:-2])
    objects = [folder / f"{number}.o" for number in range(len(commands))]
    run_all([[*c, "-o", str(result)] for c, result in zip(commands, objects, strict=True)])
    return link_operators(objects, folder / "mutants.so")


def _namespace(target: str) -> str:
    return f"lm2_kernels_{target}_mutants"


@functools.cache
def _load(target: str, mutants: tuple[NativeMutant, ...]) -> ctypes.CDLL:
    path = cached(
        f"mutants-{target}-{mutants}-{torch.__version__}",
        ".so",
        functools.partial(_build, target, mutants),
    )
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))


@contextlib.contextmanager
def mutated(target: str, mutants: tuple[NativeMutant, ...], number: int) -> Iterator[None]:
    """Have ``backend="cpp"`` run a target with the mutant of a number, from 1, or none (0)."""
    variable = ctypes.c_int.in_dll(_load(target, mutants), "lm2_mutant")
    with contextlib.ExitStack() as stack:
        if target == "cuda":
            stack.enter_context(emulated_cuda())
        # the level that every processor has; it is chosen at the first call
        level = {"LM2_KERNELS_CPU_LEVEL": "base"}
        stack.enter_context(mock.patch.dict(os.environ, level))
        stack.enter_context(mock.patch.object(cpp, "NAMESPACE", _namespace(target)))
        variable.value = number
        yield
