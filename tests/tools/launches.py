"""Run the package's Triton launches on the CPU with every check on, and judge their resources."""

import contextlib
import warnings
from collections.abc import Iterator

import torch
import triton

from tools import interpreter_bf16
from tools.fake_gpu import TARGETS, FakeDriver, Launch, fake_gpu
from tools.interpreter_sanitizer import sanitize

# words: ptxas leaves a stack frame of 8 bytes in some kernels far below the register limit
_SPILL_ALLOWANCE = 4
# Each release of Triton gives out registers anew. The tables are kept free of spills for these; on
# others what is spilled is reported, and refused where it is gross.
_RELEASES = ("3.6", "3.8")
_GROSS_SPILLS = 64

__all__ = ["TARGETS", "assert_resources", "checked", "compiled", "grids", "interpreted"]


@contextlib.contextmanager
def checked(target: str, *, shuffle: int = 0) -> Iterator[FakeDriver]:
    """Compile each launch for ``target``, then interpret it: addresses, races, overflow checked."""
    interpreter_bf16.install()
    with fake_gpu(target) as gpu, sanitize(shuffle=shuffle):
        yield gpu
    assert_resources(gpu)


@contextlib.contextmanager
def interpreted(target: str, *, shuffle: int = 0) -> Iterator[None]:
    """As :func:`checked`, but nothing is compiled, which takes most of its time.

    Numbers do not need it: what is interpreted is the configuration that the tables have for the
    target.
    """
    interpreter_bf16.install()
    with fake_gpu(target, compile=False), sanitize(shuffle=shuffle):
        yield


@contextlib.contextmanager
def grids(target: str) -> Iterator[list[tuple[int, ...]]]:
    """The grids of all launches, which are neither compiled nor run."""
    with fake_gpu(target, execute=False, compile=False) as gpu:
        yield gpu.grids


@contextlib.contextmanager
def compiled(target: str) -> Iterator[FakeDriver]:
    """Compile each launch for ``target`` without running it."""
    with fake_gpu(target, execute=False) as gpu:
        yield gpu
    assert_resources(gpu)


def assert_resources(gpu: FakeDriver) -> None:
    """What every kernel promises: no spills to speak of, no fp64, TF32 or float atomics."""
    release = ".".join(triton.__version__.split(".")[:2])
    for launch in gpu.launches:
        text = f"{launch.kernel} on {launch.target}, warps={launch.num_warps}: {launch}"
        allowed = _allowed_spills(release, launch)
        assert launch.spills <= (allowed if release in _RELEASES else _GROSS_SPILLS), text
        if launch.spills > allowed:
            warnings.warn(
                f"triton {release} spills {launch.spills} words: {launch.kernel} on "
                f"{launch.target}, {launch.num_warps} warps, {launch.num_stages} stages",
                stacklevel=2,
            )
        assert launch.f64 == 0, text
        # but for who asks for it
        assert launch.tf32 == 0 or torch.backends.cuda.matmul.fp32_precision == "tf32", text
        assert launch.atomics == 0, text


def _allowed_spills(release: str, launch: Launch) -> int:
    kind = (release, launch.target, launch.kernel)
    if kind == ("3.6", "cuda:80", "_memory_attention_bwd_dkey_value_kernel"):
        # the launch table says why, of the one entry that takes so much shared memory
        return 8 if launch.shared > 96 * 1024 else _SPILL_ALLOWANCE
    return _SPILL_ALLOWANCE
