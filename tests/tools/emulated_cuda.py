"""The CUDA kernels on the CPU: csrc/cuda compiled with tests/native's emulator, as operators.

The library holds the kernels and bindings of ``_cuda``; its operators take CPU tensors under
another namespace, which ``emulated_cuda`` has the cpp backend use.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch
from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

from lm2_kernels import extension
from lm2_kernels.backends import cpp

ROOT = Path(__file__).parent.parent.parent
CUDA_SOURCES = ROOT / "csrc" / "cuda"
NATIVE = ROOT / "tests" / "native"
NAMESPACE = "lm2_kernels_emulated"
_TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020B000000000000ULL"

# how long what was compiled for other sources is kept
_KEPT_SECONDS = 3 * 24 * 3600

_library: ctypes.CDLL | None = None


@functools.cache
def load_setup() -> ModuleType | None:
    """setup.py as a module; None without setuptools."""
    if importlib.util.find_spec("setuptools") is None:
        return None
    spec = importlib.util.spec_from_file_location("_lm2_kernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def cuda_home() -> str | None:
    """The CUDA toolkit that setup.py would take, or None."""
    setup = load_setup()
    return None if setup is None else setup.toolkit()


def cuda_include() -> str:
    """Its headers."""
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


def run_all(commands: list[list[str]]) -> None:
    """Run compilers side by side; the first that fails is an error with what it said."""

    def run(command: list[str]) -> None:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{answer.stderr[-4000:]}")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, commands))


def _build(folder: Path) -> Path:
    commands, objects = [], []
    for source in sorted(CUDA_SOURCES.glob("*.cu")):
        objects.append(folder / f"{source.stem}.o")
        commands.append(emulator_command(source, objects[-1], "-O2"))
    objects.append(folder / "emulated_runtime.o")
    commands.append(emulator_command(NATIVE / "emulated_runtime.cpp", objects[-1], "-O1"))
    objects.append(folder / "bindings.o")
    torch_include = include_paths()[0]
    commands.append(
        [
            *("g++", "-c", "-std=c++20", "-fPIC", "-O1", "-DLM2_EMULATED_CUDA", _TORCH_TARGET),
            *("-isystem", torch_include, f"-I{cuda_include()}"),
            *(str(CUDA_SOURCES / "bindings.cpp"), "-o", str(objects[-1])),
        ]
    )
    run_all(commands)
    library = folder / "emulated.so"
    linked = ["g++", "-shared", "-Wl,--no-undefined", *map(str, objects), "-o", str(library)]
    run_all([[*linked, f"-L{TORCH_LIB_PATH}", "-ltorch_cpu"]])
    return library


@functools.cache
def _compiler_version() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout


def cached(label: str, suffix: str, build: Callable[[Path], Path]) -> Path:
    """What ``build`` makes in a folder of its own, kept for as long as the sources stay the same.

    Whichever process asks first builds; the others wait.
    """
    digest = hashlib.sha256(f"{label} {_compiler_version()} {cuda_home()}".encode())
    tools = Path(__file__).parent.glob("*.py")  # they hold the flags
    for path in sorted([*(ROOT / "csrc").rglob("*.*"), *NATIVE.glob("*.*"), *tools]):
        digest.update(path.read_bytes())
    cache = Path(tempfile.gettempdir(), f"lm2_kernels_tests_{os.getuid()}")
    cache.mkdir(mode=0o700, exist_ok=True)
    result = cache / f"{digest.hexdigest()[:20]}{suffix}"
    with Path(f"{result}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            for old in cache.iterdir():
                if time.time() - old.stat().st_mtime > _KEPT_SECONDS:
                    shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                build(Path(folder)).rename(result)
        else:
            os.utime(result)
    return result


def _load() -> ctypes.CDLL:
    global _library
    if _library is None:
        path = str(cached(f"emulated-{torch.__version__}", ".so", _build))
        torch.ops.load_library(path)
        _library = ctypes.CDLL(path)
    return _library


@contextlib.contextmanager
def emulated_cuda(seed: int = 0) -> Iterator[None]:
    """Have ``backend="cpp"`` run the CUDA kernels on CPU tensors, in the order a seed gives."""
    library = _load()
    library.lm2_set_seed(ctypes.c_uint64(seed))
    before = cpp.NAMESPACE, cpp._cuda_like, extension._cpu_reason
    cpp.NAMESPACE, cpp._cuda_like, extension._cpu_reason = NAMESPACE, {"cpu", "cuda"}, None
    try:
        yield
    finally:
        cpp.NAMESPACE, cpp._cuda_like, extension._cpu_reason = before
