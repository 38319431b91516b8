"""Builds tests/native/harness.cpp with a sanitizer, for the C++ or the (emulated) CUDA kernels.

A planted bug is a text of a source replaced by another, in a copy of csrc.
"""

import contextlib
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tools.compiling import CSRC, NATIVE, ROOT, cached, run_all
from tools.emulated_avx512 import HAS_EVERY_LEVEL, avx512_reason, emulation_command
from tools.emulated_cuda import CUDA_SOURCES, emulator_command

SANITIZERS = {"address": "address,undefined", "thread": "thread"}


class Plant(NamedTuple):
    """A bug: what of a file of csrc becomes what, and the compiled file that shows it."""

    name: str
    target: str
    sanitizer: str
    file: str
    old: str
    new: str
    compiled: str
    report: str  # what the sanitizer or the emulator says of it


def _sources(target: str) -> list[Path]:
    if target == "cuda":
        return [*sorted(CUDA_SOURCES.glob("*.cu")), NATIVE / "emulated_runtime.cpp"]
    # but for what needs torch
    return [p for p in (CSRC / "cpu").glob("*.cpp") if p.stem not in ("bindings", "parallel")]


def _command(target: str, sanitizer: str, source: Path, result: Path) -> list[str]:
    flags = [f"-fsanitize={SANITIZERS[sanitizer]}", "-fno-sanitize-recover=all", "-g1"]
    # unoptimised where it takes several times as long to compile as to run
    flags.append("-O0" if sanitizer == "address" else "-O1")
    if target == "cuda":
        return emulator_command(source, result, "-DHARNESS_CUDA", *flags)
    flags += ["-Wall", "-Wextra", "-fno-math-errno", "-fno-trapping-math"]
    if avx512_reason() is None:
        if "avx512" in source.name:
            return emulation_command(source, result, *flags)
        flags.append(HAS_EVERY_LEVEL)
    return ["g++", "-c", "-std=c++20", *flags, str(source), "-o", str(result)]


def _object(target: str, sanitizer: str, source: Path) -> Path:
    def build(folder: Path) -> Path:
        run_all([_command(target, sanitizer, source, folder / "object.o")])
        return folder / "object.o"

    return cached(f"{target}-{sanitizer}-{source.relative_to(ROOT)}", ".o", build)


@contextlib.contextmanager
def harness(target: str, sanitizer: str, plant: Plant | None = None) -> Iterator[Path]:
    """The program, for as long as the context lasts."""
    sources = [*_sources(target), NATIVE / "harness.cpp"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        objects = []
        for source in sources:
            if plant is None or source.name != plant.compiled:
                objects.append(_object(target, sanitizer, source))
        if plant is not None:
            shutil.copytree(CSRC, folder / "csrc")
            file = folder / "csrc" / plant.file
            text = file.read_text(encoding="utf-8")
            if text.count(plant.old) != 1:
                raise AssertionError(f"{plant.file} has changed: give the plant its new text")
            file.write_text(text.replace(plant.old, plant.new), encoding="utf-8")
            objects.append(folder / "planted.o")
            source = folder / "csrc" / target / plant.compiled
            run_all([_command(target, sanitizer, source, objects[-1])])
        program = folder / "harness"
        flag = f"-fsanitize={SANITIZERS[sanitizer]}"
        run_all([["g++", flag, "-pthread", *map(str, objects), "-o", str(program)]])
        yield program


@functools.cache
def _without_randomisation() -> tuple[str, ...]:
    """How to start a program at fixed addresses, which older ThreadSanitizers ask for."""
    prefix = ("setarch", "-R")
    if shutil.which("setarch") is None:
        return ()
    done = subprocess.run([*prefix, "true"], capture_output=True, check=False)
    return prefix if done.returncode == 0 else ()


def run(program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a sanitized program; a report ends it with an exit code above 0."""
    options = {"UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(
        [*_without_randomisation(), str(program), *arguments],
        env=os.environ | options | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def emulator_test(sanitizer: str) -> Path:
    """The program of the emulator's own tests."""

    def build(folder: Path) -> Path:
        flags = (f"-fsanitize={SANITIZERS[sanitizer]}", "-fno-sanitize-recover=all", "-g1", "-O0")
        commands, objects = [], []
        for name in ("emulator_test", "emulated_runtime"):
            objects.append(folder / f"{name}.o")
            commands.append(emulator_command(NATIVE / f"{name}.cpp", objects[-1], *flags))
        run_all(commands)
        run_all([["g++", flags[0], *map(str, objects), "-o", str(folder / "program")]])
        return folder / "program"

    return cached(f"emulator-test-{sanitizer}", "", build)
