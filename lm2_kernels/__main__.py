"""``python -m lm2_kernels``: ``info`` says what runs here, ``verify`` whether it is right, ``demo``
what a memory is good for, ``bench`` how fast it is; ``train`` and ``generate`` are for models of
your own.

Exit codes: 0 all right, 1 a check failed, 2 what was asked for cannot be done.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from lm2_kernels import backends, commands, info, testing, verify
from lm2_kernels.bench.command import add_bench
from lm2_kernels.terminal import Progress
from lm2_kernels.version import __version__

PROGRAM = "python -m lm2_kernels"


def main(
    arguments: Sequence[str] | None = None, *, cases: Sequence[testing.Case] | None = None
) -> int:
    """Run the command line and return its exit code; ``cases`` replaces those ``verify`` runs."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    if options.command == "info":
        report = info.collect()
        print(info.render(report))
        return _write_json(options.json, report)
    if options.command == "verify":
        return _verify(options, arguments, cases)
    try:
        return options.run(options)
    except (OSError, TypeError, ValueError, ArithmeticError) as error:
        print(f"{PROGRAM} {options.command}: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="LM2 memory layers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"lm2_kernels {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True)
    described = subparsers.add_parser("info", help="versions, devices, and which backend runs what")
    checked = subparsers.add_parser(
        "verify", help="check every backend on this machine against the float64 oracle"
    )
    checked.add_argument(
        "--backend",
        action="append",
        choices=backends.NAMES,
        help="only this backend (repeatable); triton without a GPU runs in Triton's interpreter",
    )
    checked.add_argument(
        "--dtype", action="append", choices=tuple(testing.DTYPES), help="only this (repeatable)"
    )
    checked.add_argument("--device", choices=("cpu", "cuda"), help="where; else the best there is")
    checked.add_argument("--seed", type=int, default=0, help="of the random inputs (0)")
    for command in (described, checked):
        command.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    commands.add_demo(subparsers)
    commands.add_train(subparsers)
    commands.add_generate(subparsers)
    add_bench(subparsers)
    return parser


def _verify(options: argparse.Namespace, arguments: list[str], cases) -> int:
    names = tuple(name for name in backends.NAMES if name in (options.backend or ()))
    on_cpu = options.device == "cpu" or not torch.cuda.is_available()
    if "triton" in names and on_cpu and not verify.interpreted("triton"):
        # Triton reads the variable when it is imported, and importing torch may have done that
        print("verify: on the CPU the Triton kernels run in Triton's interpreter", flush=True)
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        return subprocess.call([sys.executable, "-m", "lm2_kernels", *arguments], env=environment)
    progress = Progress()
    try:
        report = verify.verify(
            names,
            tuple(dict.fromkeys(options.dtype or ())),
            options.device,
            seed=options.seed,
            cases=cases,
            progress=functools.partial(_show, progress),
        )
    except verify.UnavailableError as error:
        print(f"{PROGRAM} verify: error: {error}", file=sys.stderr)
        return 2
    finally:
        progress.close()
    print(verify.render(report))
    return _write_json(options.json, verify.to_json(report)) or int(not report.passed)


def _show(progress: Progress, done: int, total: int, result: verify.Check | verify.Skip) -> None:
    if isinstance(result, verify.Check):
        what = f"{result.backend} {result.dtype} on {result.device}"
        progress.update(f"[{done}/{total}] {what}: {result.case}", what)


def _write_json(path: Path | None, content: dict) -> int:
    if path is None:
        return 0
    try:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        print(f"{PROGRAM}: error: cannot write {path}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
