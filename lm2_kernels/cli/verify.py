"""``python -m lm2_kernels verify``: is what this machine computes right?"""

import argparse
import functools
import os
import subprocess
import sys
from pathlib import Path

from lm2_kernels import backends, machine
from lm2_kernels.cli.arguments import seed
from lm2_kernels.terminal import Progress, check_json, write_json
from lm2_kernels.testing import verify
from lm2_kernels.testing.cases import DTYPES

# by which a report is known
_KEYS = ("passed", "num_checks", "checks")


def add_verify(commands: argparse._SubParsersAction) -> None:
    """The ``verify`` command's arguments."""
    parser = commands.add_parser(
        "verify", help="check every backend on this machine against the float64 oracle"
    )
    parser.add_argument(
        "--backend",
        action="append",
        choices=backends.NAMES,
        help="only this backend (repeatable); triton without a GPU runs in Triton's interpreter",
    )
    parser.add_argument(
        "--dtype", action="append", choices=tuple(DTYPES), help="only this (repeatable)"
    )
    parser.add_argument(
        "--device", choices=machine.device_choices(), help="where; else the best there is"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the random inputs (0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    parser.set_defaults(run=run_verify)


def run_verify(options: argparse.Namespace) -> int:
    """Check, and say what failed."""
    check_json(options.json, _KEYS)
    names = tuple(name for name in backends.NAMES if name in (options.backend or ()))
    on_cpu = options.device == "cpu" or machine.best_device() == "cpu"
    if "triton" in names and on_cpu and not verify.interpreted("triton"):
        # Triton reads the variable when it is imported, and importing torch may have done that
        print("verify: on the CPU the Triton kernels run in Triton's interpreter", flush=True)
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "lm2_kernels", *options.arguments]
        return subprocess.call(command, env=environment)
    progress = Progress()
    try:
        report = verify.verify(
            names,
            tuple(dict.fromkeys(options.dtype or ())),
            options.device,
            seed=options.seed,
            cases=options.cases,
            progress=functools.partial(_show, progress),
        )
    finally:
        progress.close()
    print(verify.render(report))
    write_json(options.json, verify.to_json(report), _KEYS)
    return int(not report.passed)


def _show(progress: Progress, done: int, total: int, result: verify.Check | verify.Skip) -> None:
    if isinstance(result, verify.Check):
        what = f"{result.backend} {result.dtype} on {result.device}"
        progress.update(f"[{done}/{total}] {what}: {result.case}", what)
