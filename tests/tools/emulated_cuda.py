"""STUB by the lead: the API that tests/conftest.py and tests/test_backends.py already call.

``emulation_reason() -> str | None``: cheap (no build): why the CUDA kernels cannot be emulated here
(no g++, no CUDA headers, not x86-64, extension.cpu_reason() not needed), or None.
``emulated_cuda(seed: int = 0)``: context manager; builds/loads the library once, sets the
emulator's order seed, and makes ``backend="cpp"`` run the emulated operators on CPU tensors:
``cpp.NAMESPACE = "lm2_kernels_emulated"``, ``cpp._cuda_like = {"cpu", "cuda"}`` and
``extension.cpu_reason`` must give None; all restored at exit.
"""

import contextlib


def emulation_reason():
    return "stub"


@contextlib.contextmanager
def emulated_cuda(seed=0):
    yield
