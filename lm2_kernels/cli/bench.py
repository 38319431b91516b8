"""``python -m lm2_kernels bench``."""

import argparse
import sys
from pathlib import Path

from lm2_kernels import machine
from lm2_kernels.bench import plots, report, suite, works
from lm2_kernels.terminal import Progress, check_json, write_json
from lm2_kernels.testing.cases import ALL_SHAPES

# some minutes; on a CPU without 16-bit instructions peers take seconds a call already at 512
_CPU_SHAPES, _GPU_SHAPES = ("256",), ("512", "1024", "2048", "2048x8")
_WORKS = (*works.WORKS, suite.GROWTH)
_DEFAULT_WORKS = ("memory_attention", "paper layer", "release layer")
_BUDGET, _BUDGET_FOR_ALL = 300.0, 3600.0

# by which a report is known
_KEYS = ("machine", "ceilings", "results")


def add_bench(commands: argparse._SubParsersAction) -> None:
    """The ``bench`` command's arguments."""
    parser = commands.add_parser("bench", help="measure this package against what else there is")
    parser.add_argument(
        "works",
        nargs="*",
        metavar="WORK",
        help=f"{', '.join(_WORKS)} (attention to 16384 tokens: time and peak memory); "
        f"{', '.join(_DEFAULT_WORKS)} unless given",
    )
    parser.add_argument("--all", action="store_true", help="every work at every shape")
    names = [shape.name for shape in ALL_SHAPES]
    parser.add_argument("--shape", action="append", choices=names, help="only this (repeatable)")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--pass", dest="passes", action="append", choices=works.PASSES)
    rows = works.row_names()
    parser.add_argument(
        "--row",
        action="append",
        choices=rows,
        metavar="ROW",
        help=f"only this (repeatable): {', '.join(map(repr, rows))}",
    )
    parser.add_argument(
        "--graphs", action="store_true", help="on a GPU also replays of CUDA graphs"
    )
    parser.add_argument(
        "--device", choices=machine.device_choices(), help="where; else the best there is"
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help=f"after which no work is begun ({_BUDGET:.0f}; with --all {_BUDGET_FOR_ALL:.0f}); one "
        "that was begun is finished, and its compiled rows alone may take minutes to compile",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured here")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw it into this folder")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="show this JSON")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="two JSON files"
    )
    parser.add_argument(
        "--markdown", action="store_true", help="print it as benchmarks/README.md has it"
    )
    parser.add_argument(
        "--headline",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="the layers in JSON files of one machine, as README has them",
    )
    parser.set_defaults(run=run_bench)


def run_bench(options: argparse.Namespace) -> int:
    """Measure, or show what was measured."""
    # before the work, not after it
    check_json(options.json, _KEYS)
    if options.plots is not None:
        plots.check_folder(options.plots)
    if options.compare:
        print(report.compare(*map(report.load, options.compare)))
        return 0
    if options.headline:
        print(report.headline([report.load(path) for path in options.headline]), end="")
        return 0
    if options.source is not None:
        measured = report.load(options.source)
    else:
        selection, budget = _selection(options), _budget(options)

        def save(measured: dict) -> None:
            write_json(options.json, measured, _KEYS)

        progress = Progress()

        def show(done: int, total: int, title: str) -> None:
            progress.update(f"[{done + 1}/{total}] {title}", title)

        try:
            measured = suite.run(selection, budget, show, save)
        finally:
            progress.close()
    if options.markdown:
        print(report.markdown(measured), end="")
    else:
        print(report.render(measured))
    if options.plots is not None:
        print(*plots.plot(measured, options.plots), sep="\n")
    wrong = report.wrong_rows(measured, is_ours=True)
    for reason in wrong:
        print(f"bench: {reason}", file=sys.stderr)
    return int(bool(wrong))


def _selection(options: argparse.Namespace) -> suite.Selection:
    unknown = sorted(set(options.works) - set(_WORKS))
    if unknown:
        raise ValueError(f"unknown works {unknown}; there are {', '.join(_WORKS)}")
    device = options.device or machine.best_device()
    machine.check_device(device)
    if options.graphs and device != "cuda":
        raise ValueError("--graphs needs a GPU of CUDA or ROCm")
    # works that are named are measured wherever they fit
    default_shapes = _CPU_SHAPES if device == "cpu" else _GPU_SHAPES
    shapes = () if options.works or options.all else default_shapes
    selection = suite.Selection(
        works=tuple(options.works) or (() if options.all else _DEFAULT_WORKS),
        shapes=tuple(options.shape or shapes),
        dtypes=tuple(options.dtype or ("float32", "bfloat16")),
        rows=tuple(options.row or ()),
        passes=tuple(options.passes or works.PASSES),
        device=device,
        graphs=options.graphs,
    )
    if not selection.jobs() and not selection.has_lengths:
        raise ValueError(f"no work of {selection.works} fits shapes {selection.shapes}")
    return selection


def _budget(options: argparse.Namespace) -> float:
    if options.budget is None:
        return _BUDGET_FOR_ALL if options.all else _BUDGET
    if options.budget <= 0.0:
        raise ValueError(f"--budget must be above 0, got {options.budget}")
    return options.budget
