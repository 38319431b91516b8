"""Whether the compiled extension is here, for tests that need it."""

import pytest

from lm2_kernels.backends import extension


def cpp_reason() -> str | None:
    """Why the C++ kernels cannot run on this machine, or None."""
    return extension.cpu_reason()


def cpu_default() -> str:
    """What "auto" takes for CPU tensors here; asked in the context of an emulation, too."""
    return "cpp" if cpp_reason() is None else "eager"


needs_cpp = pytest.mark.skipif(cpp_reason() is not None, reason=f"cpp: {cpp_reason()}")
