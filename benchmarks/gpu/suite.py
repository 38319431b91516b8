"""The hardware suite by pytest: what passed before is left out, what is stopped goes on."""

import collections
import functools
import importlib.util
import os
import re
import subprocess
import sys
import time

from entries import Context, Entry, file_of, load

_SELECTED = {
    "suite": "not past_2_31 and not inductor and not sanitizer",
    "big": "past_2_31 or inductor",
    "sanitizer": "sanitizer",
}
_WORKERS = {"suite": 8, "big": 2, "sanitizer": 3}
# to write what was found
_LAST_SECONDS = 3.0


def entries(context: Context, what: str) -> list[Entry]:
    return [Entry(what, functools.partial(_suite, context, what), None)]


def _suite(context: Context, what: str, end: float) -> dict:
    folder = context.folder / what
    outcomes = (load(folder, what) or {}).get("outcomes", {})
    passed = [test for test, outcome in outcomes.items() if outcome == "PASSED"]
    command = [sys.executable, "-m", "pytest", context.tests, "-m", "gpu", "-v", "--color=no"]
    command += ["-k", _SELECTED[what], *(f"--deselect={test}" for test in passed)]
    if importlib.util.find_spec("xdist") is not None:
        # a worker that leaves is replaced, however often
        workers = str(min(_WORKERS[what], os.cpu_count() or 1))
        command += ["-n", workers, "--max-worker-restart", "1000"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        command += ["--timeout", f"{context.limit or 60:.0f}", "--timeout-method", "thread"]
    # the tests ask for the interpreter themselves
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    output = file_of(folder, f"{what} pytest", ".txt")
    with output.open("w", encoding="utf-8") as file:
        try:
            seconds = end - time.time() - _LAST_SECONDS
            done = subprocess.run(
                command, stdout=file, stderr=file, env=environment, timeout=seconds, check=False
            )
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = None
    outcomes |= outcomes_of(output.read_text(encoding="utf-8", errors="replace"))
    counts = collections.Counter(outcomes.values())
    line = ", ".join(f"{count} {name.lower()}" for name, count in sorted(counts.items()))
    failed = sorted(test for test, outcome in outcomes.items() if outcome in ("FAILED", "ERROR"))
    # without a test left, pytest's exit code is 5
    ok = not failed and (code == 0 or (code == 5 and bool(passed)))
    line += " (stopped by the time limit)" if code is None else f" (exit code {code})"
    return {"ok": ok, "again": not ok, "line": line, "failed": failed, "outcomes": outcomes}


def outcomes_of(output: str) -> dict[str, str]:
    """Of each test that ended, from the output of ``pytest -v``, with and without pytest-xdist."""
    outcome = "PASSED|FAILED|ERROR|SKIPPED"
    found = re.findall(rf"^\[gw\d+\] \[.*?\] ({outcome}) (.+::.+?) *$", output, re.M)
    found += [pair[::-1] for pair in re.findall(rf"^(.+::.+) ({outcome}) +\[", output, re.M)]
    return {test: outcome for outcome, test in found}
