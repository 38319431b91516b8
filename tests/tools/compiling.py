"""Compilers for tests: what setup.py would take, commands run side by side, results kept."""

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

ROOT = Path(__file__).parent.parent.parent
CSRC = ROOT / "csrc"
NATIVE = ROOT / "tests" / "native"

# how long what was compiled for other sources is kept
_KEPT_SECONDS = 3 * 24 * 3600


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


def torch_flags() -> list[str]:
    """For sources that include torch: its stable ABI."""
    return [f"-DTORCH_TARGET_VERSION={load_setup().TORCH_TARGET}", "-isystem", include_paths()[0]]


def run_all(commands: list[list[str]]) -> None:
    """Run compilers side by side; the first that fails is an error with what it said."""

    def run(command: list[str]) -> None:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{answer.stderr[-4000:]}")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, commands))


def link_operators(objects: list[Path], library: Path) -> Path:
    """A library of operators for ``torch.ops.load_library``."""
    command = ["g++", "-shared", "-Wl,--no-undefined", *map(str, objects), "-o", str(library)]
    run_all([[*command, f"-L{TORCH_LIB_PATH}", "-ltorch_cpu"]])
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
    for path in sorted([*CSRC.rglob("*.*"), *NATIVE.glob("*.*"), *tools]):
        digest.update(path.read_bytes())
    cache = Path(tempfile.gettempdir(), f"lm2_kernels_tests_{os.getuid()}")
    cache.mkdir(mode=0o700, exist_ok=True)
    result = cache / f"{digest.hexdigest()[:20]}{suffix}"
    with Path(f"{result}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            for old in cache.iterdir():
                # other processes build here too, and rename what they have built
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - old.stat().st_mtime > _KEPT_SECONDS:
                        shutil.rmtree(old, True) if old.is_dir() else old.unlink()
            folder = Path(tempfile.mkdtemp(dir=cache))
            try:
                # a file in the folder, or the folder itself
                build(folder).rename(result)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        else:
            os.utime(result)
    return result
