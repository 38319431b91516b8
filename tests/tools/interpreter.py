"""Runs code in an interpreter of its own, with the package that this one tests."""

import os
import subprocess
import sys
from pathlib import Path

import lm2_kernels


def run_python(code: str, *options: str, **environment: str | None) -> subprocess.CompletedProcess:
    """Run code; None removes an environment variable.

    It starts where the package lies: elsewhere `-c` would import what the current folder holds.
    """
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=Path(lm2_kernels.__file__).parent.parent,
        env={name: value for name, value in variables.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
