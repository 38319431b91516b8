"""Run the package's Triton launches on the CPU with every check on, and judge their resources."""

import contextlib
import warnings
from collections.abc import Iterator

import triton

from tools import interpreter_bf16
from tools.fake_gpu import TARGETS, FakeDriver, fake_gpu
from tools.interpreter_sanitizer import sanitize

# words: ptxas leaves a stack frame of 8 bytes in some kernels far below the register limit
_SPILL_ALLOWANCE = 4
# by release, target and kernel: what the launch tables say of one entry
_KNOWN_SPILLS = {("3.6", "cuda:80", "_memory_attention_bwd_dkey_value_kernel"): 8}
# Each release gives out registers anew: the tables are kept free of spills for these. What another
# spills is reported and not refused.
_RELEASES = ("3.6", "3.8")

__all__ = ["TARGETS", "assert_resources", "checked", "compiled", "interpreted"]


@contextlib.contextmanager
def checked(target: str, *, shuffle: int = 0) -> Iterator[FakeDriver]:
    """Compile each launch for ``target``, then interpret it: addresses, races, overflow checked."""
    interpreter_bf16.install()
    with fake_gpu(target) as gpu, sanitize(shuffle=shuffle):
        yield gpu
    assert_resources(gpu)


@contextlib.contextmanager
def interpreted(target: str, *, shuffle: int = 0) -> Iterator[None]:
    """As :func:`checked`, but for the compiler: most of its time, and for numbers it is not needed.

    The launch tables' configuration for the target is the one that is interpreted.
    """
    interpreter_bf16.install()
    with fake_gpu(target, compile=False), sanitize(shuffle=shuffle):
        yield


@contextlib.contextmanager
def compiled(target: str) -> Iterator[FakeDriver]:
    """Compile each launch for ``target`` without running it."""
    with fake_gpu(target, execute=False) as gpu:
        yield gpu
    assert_resources(gpu)


def assert_resources(gpu: FakeDriver) -> None:
    """What every kernel promises: no spills to speak of, no fp64, TF32 or float atomics."""
    release = triton.__version__.rpartition(".")[0]
    for launch in gpu.launches:
        text = f"{launch.kernel} on {launch.target}, warps={launch.num_warps}: {launch}"
        known = _KNOWN_SPILLS.get((release, launch.target, launch.kernel), _SPILL_ALLOWANCE)
        if release in _RELEASES:
            assert launch.spills <= known, text
        elif launch.spills > known:
            warnings.warn(f"triton {triton.__version__} spills: {text}", stacklevel=2)
        assert launch.f64 == 0, text
        assert launch.tf32 == 0, text
        assert launch.atomics == 0, text
