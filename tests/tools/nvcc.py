"""What nvcc makes of csrc/cuda for each architecture: warnings, registers, spills, shared memory.

``PYTHONPATH=tests python -m tools.nvcc`` prints the table.
"""

import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tools.compiling import cached, cuda_home, run_all
from tools.emulated_cuda import CUDA_SOURCES

if TYPE_CHECKING:
    from setuptools import Extension

ARCHS = (75, 80, 90, 100, 120)
SOURCES = tuple(sorted(CUDA_SOURCES.glob("*.cu")))
_FLAGS = (
    *("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-Wall,-Wextra"),
    # torch's builder has them
    *("-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__"),
    *("-D__CUDA_NO_HALF2_OPERATORS__", "-D__CUDA_NO_BFLOAT16_CONVERSIONS__"),
)
# of memory_attention.cu, in the order of its enum
_PASSES = ("forward", "delta", "dquery", "dkey", "dvalue", "dkey_value")


class Kernel(NamedTuple):
    """What ptxas reports of one kernel on one architecture."""

    source: str
    name: str
    arch: str
    registers: int
    spilled_bytes: int


def nvcc_path() -> Path | None:
    """The compiler of the toolkit that setup.py would take, or None."""
    home = cuda_home()
    return None if home is None else Path(home, "bin", "nvcc")


def command(source: Path, result: Path, archs: tuple[int, ...], *flags: str) -> list[str]:
    """How a file is compiled, as setup.py does, and with ptxas's report."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [str(nvcc_path()), "-c", str(source), "-o", str(result), *_FLAGS, *targets, *flags]


def compiled(source: Path, archs: tuple[int, ...]) -> Path:
    """A folder with a file's ``object.o`` and what the compiler said of it, ``log``."""

    def build(folder: Path) -> Path:
        call = command(source, folder / "object.o", archs, "-Xptxas", "-v,--warn-on-spills")
        answer = subprocess.run(call, capture_output=True, text=True, check=False)
        if answer.returncode:
            raise RuntimeError(answer.stderr[-4000:])
        (folder / "log").write_text(answer.stderr, encoding="utf-8")
        return folder

    version = subprocess.run(
        [str(nvcc_path()), "--version"], capture_output=True, text=True, check=True
    ).stdout
    return cached(f"nvcc-{archs}-{source.name}-{version}", "", build)


def link(objects: list[Path], extension: "Extension", folder: Path) -> Path:
    """The library of kernels and bindings, linked as setup.py's extension says."""
    bindings = folder / "bindings.o"
    include = [f"-I{path}" for path in extension.include_dirs]
    flags = [*extension.extra_compile_args["cxx"], "-fPIC", *include]
    run_all([["g++", "-c", *flags, str(CUDA_SOURCES / "bindings.cpp"), "-o", str(bindings)]])
    library = folder / "_cuda.so"
    command = ["g++", "-shared", str(bindings), *map(str, objects), *extension.extra_link_args]
    command += [f"-L{path}" for path in extension.library_dirs]
    run_all([[*command, *(f"-l{name}" for name in extension.libraries), "-o", str(library)]])
    return library


def compile_source(source: Path, archs: tuple[int, ...] = ARCHS) -> tuple[list[Kernel], list[str]]:
    """The kernels of a file on each architecture, and every line that warns."""
    text = (compiled(source, archs) / "log").read_text(encoding="utf-8")
    warnings = [line for line in text.splitlines() if "warning" in line.lower()]
    names = re.findall(r"Compiling entry function '(\S+)' for '(\S+)'", text)
    mangled = "\n".join(name for name, _ in names)
    plain = subprocess.run(
        ["c++filt"], input=mangled, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    spills = re.findall(r"stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    registers = re.findall(r"Used (\d+) registers", text)
    kernels = []
    for name, (_, arch), spill, used in zip(plain, names, spills, registers, strict=True):
        short = re.sub(r"lm2::cuda::|\(anonymous namespace\)::|^void ", "", name)
        short = re.sub(r"\(Pass\)(\d)", lambda match: _PASSES[int(match[1])], short)
        short = re.sub(r"\(.*$", "", short)
        kernels.append(Kernel(source.name, short, arch, int(used), sum(map(int, spill))))
    return kernels, warnings


def ptx(source: Path, arch: int) -> str:
    """What a file becomes before ptxas, not optimised."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "out.ptx")
        call = [str(nvcc_path()), "-ptx", str(source), "-o", str(result), *_FLAGS, "-Xcicc", "-O0"]
        subprocess.run([*call, f"-arch=compute_{arch}"], capture_output=True, check=True)
        return result.read_text(encoding="utf-8")


if __name__ == "__main__":
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(compile_source, SOURCES))
    names = [f"sm_{arch}" for arch in ARCHS]
    print(*(f"{name:>7}" for name in names), " registers/spilled bytes")
    for kernels, warnings in reports:
        used = {(k.name, k.arch): f"{k.registers}/{k.spilled_bytes}" for k in kernels}
        for kernel in dict.fromkeys(kernel.name for kernel in kernels):
            row = (f"{used[kernel, arch]:>7}" for arch in names)
            print(*row, f" {kernels[0].source} {kernel}")
        print(*warnings, sep="\n", end="")
