"""The hardware suite by pytest: what passed before is left out, what is stopped goes on."""

import collections
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time

from entries import Context, Entry, die_with_parent, file_of

from lm2_kernels import testing

TESTS = "tests/backends/test_gpu.py"
# of what the sweep then times
_FORMS = "tests/backends/test_gpu_forms.py"
_SELECTED = {
    "forms": "",
    "suite": "not past_2_31 and not inductor and not sanitizer",
    "big": "past_2_31 or inductor",
    "sanitizer": "sanitizer",
}
_WORKERS = {"suite": 8, "forms": 8, "big": 2, "sanitizer": 3}
# to write what was found
_LAST_SECONDS = 3.0

# forward and backward
_PROFILED = """
import torch
from lm2_kernels import testing
case = testing.{case}
testing.run_case(case, testing.make_inputs(case, torch.bfloat16, "{device}"), "{backend}")
"""
_SECTIONS = ("SpeedOfLight", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis")


def entries(context: Context, phase: str) -> list[Entry]:
    if phase == "ncu":
        # what takes a layer's time beside its products
        attention, _, norm, _ = testing.GPU_SHAPES[0].cases()
        cases = (attention, norm)
        if context.is_rehearsal:
            cases = testing.SMALL_CASES[:1]
        return [Entry(case.id, functools.partial(_ncu, context, case), 45.0) for case in cases]
    # as long as the phase lasts: what was found is written before
    return [Entry(phase, functools.partial(_suite, context, phase), float("inf"))]


def _suite(context: Context, phase: str, end: float) -> dict:
    tests = _FORMS if phase == "forms" else TESTS
    command = [sys.executable, "-m", "pytest", tests, "-m", "gpu", "-v", "--color=no"]
    # the programme does without it too, as a rehearsal shows
    rehearsed_alone = context.is_rehearsal and phase != "suite"
    if importlib.util.find_spec("xdist") is not None and not rehearsed_alone:
        # a worker that leaves is replaced, however often
        workers = str(min(_WORKERS[phase], os.cpu_count() or 1))
        command += ["-n", workers, "--max-worker-restart", "1000"]
    # all that pytest ever said: a process that is killed, this one too, loses nothing
    output = file_of(context.folder / phase, f"{phase} pytest", ".txt")
    before = outcomes_of(output.read_text(errors="replace") if output.exists() else "")
    passed = [test for test, outcome in before.items() if outcome == "PASSED"]
    command += ["-k", _SELECTED[phase], *(f"--deselect={test}" for test in passed)]
    # the tests ask for the interpreter themselves
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # pytest says at its end why a test failed, and may be stopped before
    reasons = file_of(context.folder / phase, f"{phase} failures", ".txt")
    environment["LM2_KERNELS_TEST_FAILURES"] = str(reasons)
    with output.open("ab") as file:
        file.write(b"\n")
        file.flush()
        try:
            done = subprocess.run(
                command,
                stdout=file,
                stderr=file,
                env=environment,
                preexec_fn=die_with_parent,
                timeout=end - time.time() - _LAST_SECONDS,
                check=False,
            )
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = None
    outcomes = outcomes_of(output.read_text(errors="replace"))
    counts = collections.Counter(outcomes.values())
    line = ", ".join(f"{count} {name.lower()}" for name, count in sorted(counts.items()))
    failed = sorted(test for test, outcome in outcomes.items() if outcome in ("FAILED", "ERROR"))
    # without a test left, or without a GPU, pytest's exit code is 5
    ok = not failed and (code == 0 or (code == 5 and (bool(passed) or context.is_rehearsal)))
    line += " (stopped by the time limit)" if code is None else f" (exit code {code})"
    return {"ok": ok, "again": not ok, "line": line, "failed": failed, "outcomes": outcomes}


def outcomes_of(output: str) -> dict[str, str]:
    """Of each test its last end in the output of ``pytest -v``, with and without pytest-xdist."""
    outcome = "(PASSED|FAILED|ERROR|SKIPPED)"
    line = rf"^(?:\[gw\d+\] \[.*?\] {outcome} (.+::.+?) *|(\S.*::.+) {outcome} +\[.*)$"
    found = re.findall(line, output, re.M)
    return {test or other_test: one or other for one, test, other_test, other in found}


def _ncu(context: Context, case: testing.Case, end: float) -> dict:
    """NVIDIA's profiler over what is to be tuned."""
    if context.is_rehearsal:
        exec(_PROFILED.format(case=case, device="cpu", backend="cpp"), {})
        return {"line": "only what it would profile"}
    if shutil.which("ncu") is None:
        line = "no ncu on PATH: it is part of the CUDA toolkit"
        return {"ok": False, "again": True, "line": line}
    code = _PROFILED.format(case=case, device="cuda", backend="triton")
    log = file_of(context.folder / "ncu", case.id, ".csv")
    # clocks stay as they are, and our kernels alone
    command = ["ncu", "--clock-control", "none", "--kernel-name", "regex:_memory_|_residual_"]
    command += ["--csv", "--log-file", str(log)]
    command += [option for section in _SECTIONS for option in ("--section", section)]
    command += [sys.executable, "-c", code]
    done = subprocess.run(command, preexec_fn=die_with_parent, check=False)
    ok = done.returncode == 0
    return {"ok": ok, "again": not ok, "line": f"exit code {done.returncode}, see {log.name}"}
