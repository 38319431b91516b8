"""NVIDIA's tools: compute-sanitizer over the CUDA C++ kernels, ncu over what is to be tuned."""

import functools
import shutil
import subprocess
import sys

import suite
from entries import Context, Entry

# forward and backward of what takes a layer's time beside its products
_PROFILED = """
import torch
from lm2_kernels import testing
shape = testing.{shape}
for case in (shape.cases()[0], shape.cases()[2]):
    inputs = testing.make_inputs(case, torch.{dtype}, "{device}")
    testing.run_case(case, inputs, "{backend}")
"""
_SECTIONS = ("SpeedOfLight", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis")


def entries(context: Context, what: str) -> list[Entry]:
    if what == "sanitizer":
        return suite.entries(context, what)
    return [Entry("ncu", functools.partial(_ncu, context), 90.0)]


def _ncu(context: Context, end: float) -> dict:
    if shutil.which("ncu") is None:
        return {"ok": False, "line": "no ncu on PATH: it is part of the CUDA toolkit"}
    options = {"shape": "GPU_SHAPES[0]", "dtype": "bfloat16", "backend": "triton"}
    if context.is_rehearsal:
        options = {"shape": "SHAPES[-1]", "dtype": "float32", "backend": "cpp"}
    code = _PROFILED.format(**options, device=context.device)
    # clocks stay as they are; our kernels' names alone; the fifth launch on is warm enough
    command = ["ncu", "--clock-control", "none", "--kernel-name", "regex:_memory_|_residual_"]
    for section in _SECTIONS:
        command += ["--section", section]
    done = subprocess.run([*command, sys.executable, "-c", code], check=False)
    return {"ok": done.returncode == 0, "line": f"exit code {done.returncode}, see its log"}
