"""Run a selection of works and collect everything that was measured, ready for JSON."""

import concurrent.futures
import dataclasses
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch

from lm2_kernels import machine
from lm2_kernels.backends import cpu_products, extension
from lm2_kernels.bench import measure, works
from lm2_kernels.bench.works import PASSES, Row, Work, dtype_name
from lm2_kernels.testing.cases import ALL_SHAPES, GPU_SHAPES, TINY, Shape

FORMAT = 1
# time and memory of attention as the segment grows, which has no other shapes and float32 alone;
# the width keeps 16k tokens below a minute
GROWTH = "lengths"
LENGTHS = tuple(
    Shape(f"T={tokens}", 1, tokens, tokens, 8, 256, "attention as T grows")
    for tokens in (1024, 2048, 4096, 8192, 16384)
)
_LENGTH_WORK = "memory_attention"
# what a pass is called where a CUDA graph is replayed
GRAPH = ", graph"
# bytes of scores from which on the oracle is left out of the lengths
_MAX_TIMED_SCORES = 3 * 2**30

Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class Selection:
    """What to measure; an empty tuple is everything that fits.

    ``works`` are those of :data:`lm2_kernels.bench.works.WORKS`, and :data:`GROWTH`.
    """

    works: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    rows: tuple[str, ...] = ()
    passes: tuple[str, ...] = PASSES
    device: str = "cpu"
    # CUDA graphs of forward and of both passes, beside eager launches
    graphs: bool = False
    # beside those of testing/cases.py
    more_shapes: tuple[Shape, ...] = ()

    @property
    def has_lengths(self) -> bool:
        return not self.works or GROWTH in self.works

    def jobs(self) -> list[tuple[str, Shape, torch.dtype]]:
        """The (work, shape, dtype) to measure, in order."""
        return [
            (name, shape, getattr(torch, dtype))
            for name in works.WORKS
            if not self.works or name in self.works
            for shape in (*ALL_SHAPES, *self.more_shapes)
            if works.fits(name, shape) and self._takes(shape)
            for dtype in self.dtypes
        ]

    def _takes(self, shape: Shape) -> bool:
        if self.shapes:
            return shape.name in self.shapes
        return shape != TINY and (self.device != "cpu" or shape not in GPU_SHAPES)


def run(
    selection: Selection,
    budget: float,
    progress: Progress | None = None,
    save: Callable[[dict], None] | None = None,
) -> dict:
    """Measure a selection.

    Args:
        selection: what.
        budget: seconds, about, from the first ceilings on: a work that was begun is finished. What
            is left when they are spent is listed as skipped; so is what cannot be made here. A row
            that disagrees with the oracle is timed, and its results say so ("wrong").
        progress: called with how many jobs are done, of how many, and the next one's name.
        save: called with the report so far before the first job and after each.

    Returns:
        What :mod:`lm2_kernels.bench.report` shows.
    """
    device = selection.device
    dtypes = [getattr(torch, dtype) for dtype in selection.dtypes]
    report = {
        "format": FORMAT,
        "machine": conditions(),
        "device": device,
        "selection": dataclasses.asdict(selection) | {"budget": budget},
        "ceilings": measure.ceilings(dtypes, device),
        "results": [],
        "skipped": [],
        "lengths": [],
    }
    # the ceilings also set up the device, which may take longer than all else
    end = time.monotonic() + budget
    save = save or (lambda report: None)
    save(report)
    jobs = selection.jobs()
    lengths = LENGTHS if selection.has_lengths else ()
    total = len(jobs) + len(lengths)
    for index, (name, shape, dtype) in enumerate(jobs):
        title = f"{name} {shape.name} {dtype_name(dtype)}"
        left = end - time.monotonic()
        if left <= 0.0:
            report["skipped"].append(f"{title}: out of time")
            continue
        if progress is not None:
            progress(index, total, title)
        work = works.WORKS[name](shape, dtype, device)
        report["results"] += _measure(work, selection, left / (total - index), report)
        # after every job: what else the machine did may have hit the other measurements
        raise_ceilings(report, measure.ceilings(dtypes, device))
        save(report)
    for index, shape in enumerate(lengths, start=len(jobs)):
        if end <= time.monotonic():
            report["skipped"].append(f"{_LENGTH_WORK} {shape.name}: out of time")
            continue
        if progress is not None:
            progress(index, total, f"{_LENGTH_WORK} {shape.name}")
        report["lengths"] += _measure_length(shape, device, end, report["skipped"])
        save(report)
    return report


def raise_ceilings(report: dict, measured: dict[str, float]) -> None:
    """Take the better of a report's ceilings and those measured, for all its results."""
    ceilings = report["ceilings"]
    for name, rate in measured.items():
        ceilings[name] = max(rate, ceilings.get(name, 0.0))
    for result in report["results"]:
        result["light_share"] = _light_share(result, ceilings)


def conditions() -> dict:
    """What results depend on: versions, devices, threads and how memory is allocated."""
    tunables = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_CONF")
    return {
        "versions": machine.versions(),
        "devices": machine.devices(),
        "cpu_level": extension.build_info().get("SIMD level", "none"),
        "cpu_products": cpu_products.report(),
        "allocator": {name: os.environ[name] for name in tunables if os.environ.get(name)},
        "machine": platform.machine(),
    }


def build_rows(work: Work, names: Sequence[str], skipped: list[str]) -> dict[str, Row]:
    """The rows of a work that can be made here; the reason of each other goes to ``skipped``."""
    if "torch._dynamo" in sys.modules:
        # each work compiles anew: there is a limit to how often a function is compiled
        torch._dynamo.reset()
    rows = {}
    for name, make in work.rows.items():
        if names and name not in names:
            continue
        try:
            row = make()
            # compiles what is to be compiled, and finds out what this machine cannot run
            with torch.no_grad():
                row.forward()
            if work.passes != ("forward",) and row.backward is None:
                torch.autograd.grad(row.forward(), row.leaves, work.cotangents)
            rows[name] = row
        # whatever a peer raises: it is a row of the table, and its failure is too
        except Exception as error:
            skipped.append(f"{work.id}, {name}: {_first_line(error)}")
    return rows


def _measure(work: Work, selection: Selection, budget: float, report: dict) -> list[dict]:
    passes = [name for name in work.passes if name in selection.passes]
    rows = build_rows(work, selection.rows, report["skipped"]) if passes else {}
    if not rows:
        report["skipped"].append(f"{work.id}: has none of these rows or passes")
        return []
    agreements = measure.check(work, rows)
    saved = {}
    if "both" in passes:
        saved = {name: measure.saved_bytes(row) for name, row in rows.items() if row.is_checked}
    if selection.graphs and work.device == "cuda":
        passes += [name + GRAPH for name in passes if name != "backward"]
    results = []
    # compiling and checking do not take from the rounds
    start = time.monotonic()
    for index, pass_name in enumerate(passes):
        left = max(0.0, budget - (time.monotonic() - start)) / (len(passes) - index)
        eager = pass_name.removesuffix(GRAPH)
        timed = dict(rows)
        if eager == "forward":
            timed.pop(works.RECOMPUTE, None)  # which is the same code without a backward
        wrong = {name: agreement.wrong for name, agreement in agreements.items()}
        launched = eager
        if pass_name != eager:
            timed = _captured(work, timed, eager, wrong, report["skipped"])
            launched = "forward"  # of which a replay is all
        if not timed:
            continue
        times = measure.measure(timed, launched, work.cotangents, work.device, left)
        ours = next((times[name] for name, row in timed.items() if row.is_ours), None)
        for name, row_times in times.items():
            median = statistics.median(row_times)
            result = {
                "work": work.name,
                "shape": work.shape.name,
                "dtype": dtype_name(work.dtype),
                "pass": pass_name,
                "row": name,
                "is_ours": rows[name].is_ours,
                "seconds": median,
                "quartiles": _quartiles(row_times),
                "rounds": len(row_times),
                # how many times as fast our first backend is: median of paired rounds
                "ratio": None if ours is None else measure.ratio(row_times, ours),
                "flops": work.flops[eager],
                "bytes": work.bytes[eager],
                "error_share": _finite(agreements.get(name)),
            }
            if wrong.get(name):
                result["wrong"] = wrong[name]
            if pass_name == "both" and name in saved:
                result["saved_bytes"] = saved[name]
            results.append(result)
    return results


def _captured(
    work: Work,
    rows: dict[str, Row],
    pass_name: str,
    wrong: dict[str, str | None],
    skipped: list[str],
) -> dict[str, Row]:
    """Those rows that a CUDA graph takes; ``wrong`` gets what ours replay wrongly."""
    found = {}
    for name, row in rows.items():
        if row.restart is not None:
            skipped.append(f"{work.id}, {name} in a CUDA graph: its calls go on from one another")
            continue
        try:
            found[name], is_equal = measure.captured(row, pass_name, work.cotangents)
        # whatever a capture raises, as of other rows
        except Exception as error:
            skipped.append(f"{work.id}, {name}, {pass_name} in a CUDA graph: {_first_line(error)}")
            continue
        # peers add in the order that atomics come
        if row.is_ours and not is_equal:
            reason = f"a CUDA graph of {pass_name} gives other bits"
            wrong[name] = wrong.get(name) or f"{work.id}: row '{name}' is wrong: {reason}"
    return found


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {(text or [''])[0][:200]}"


def _finite(agreement: measure.Agreement | None) -> float | None:
    # JSON has no infinity
    if agreement is None or not math.isfinite(agreement.share):
        return None
    return agreement.share


def _light_share(result: dict, ceilings: dict[str, float]) -> float | None:
    if not (result["flops"] or result["bytes"]):
        return None
    dtype = getattr(torch, result["dtype"])
    return measure.light_share(result["flops"], result["bytes"], result["seconds"], dtype, ceilings)


def _quartiles(times: Sequence[float]) -> list[float]:
    low, _, high = statistics.quantiles(times, n=4)
    return [low, high]


def _measure_length(shape: Shape, device: str, end: float, skipped: list[str]) -> list[dict]:
    work = works.WORKS[_LENGTH_WORK](shape, torch.float32, device)
    scores = 4 * shape.batch * shape.heads * shape.tokens * shape.slots
    if scores > _MAX_TIMED_SCORES:
        del work.rows[works.ORACLE]
    names = [works.our_backends(device)[0], works.ORACLE, works.SDPA_OP]
    rows = build_rows(work, names, skipped)
    if not rows:
        return []
    agreements = measure.check(work, rows)
    budget = max(0.0, end - time.monotonic()) / len(LENGTHS)
    times = measure.measure(rows, "both", work.cotangents, device, budget)
    return [
        {
            "tokens": shape.tokens,
            "row": name,
            "is_ours": rows[name].is_ours,
            "seconds": statistics.median(row_times),
            "peak_bytes": peak_apart(_LENGTH_WORK, shape, torch.float32, device, name),
        }
        | ({"wrong": agreements[name].wrong} if agreements[name].wrong else {})
        for name, row_times in times.items()
    ]


def peak_apart(
    work_name: str, shape: Shape, dtype: torch.dtype, device: str, row: str
) -> int | None:
    """Peak memory of a forward and backward in a process of its own.

    There no buffer that an earlier call left behind hides what this one needs.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        try:
            return pool.submit(_peak, work_name, shape, dtype_name(dtype), device, row).result()
        except concurrent.futures.BrokenExecutor:
            return None  # killed: it was too much


def _peak(work_name: str, shape: Shape, dtype: str, device: str, row: str) -> int | None:
    # small first, for what is set up once a process
    for tokens in (64, shape.tokens):
        at = shape._replace(tokens=tokens, slots=tokens)
        work = works.WORKS[work_name](at, getattr(torch, dtype), device)
        made = work.rows[row]()
        peak = measure.peak_bytes(measure.run(made, "both", work.cotangents), device)
    return peak
