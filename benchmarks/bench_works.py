"""``pytest benchmarks/ --benchmark-only``: the works by all their rows, under pytest-benchmark.

The works are those of ``python -m lm2_kernels bench``. Each row is held to the float64 oracle
before it is timed; one that is wrong is timed all the same, and fails. Before each round of a row
our own first backend runs the same work, and the median of the rounds' ratios is "times ours" in
the ``extra_info``: what else the machine does hits both. Small shapes on a CPU, so that it is over
in minutes; all of them where there is a GPU.
"""

import functools
import math
import statistics
import time
from collections.abc import Iterator

import pytest
import torch

from lm2_kernels.bench import measure, suite, works
from lm2_kernels.testing.cases import SHAPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_LAYERS = ("paper layer", "release layer")
_OPS = ("memory_attention", "memory_update", "residual_layer_norm")
# (work, shape, dtype, whether the compiled rows are there): compiling takes most of the time
_ON_CPU = [
    *((op, shape, "float32", False) for op in _OPS for shape in ("256", "odd")),
    *((op, "256", "bfloat16", False) for op in _OPS),
    ("memory_attention", "64 of 2048", "float32", False),
    *((layer, "64 of 512", "float32", True) for layer in _LAYERS),
    ("memory_attention", "decode", "float32", False),
    *((layer, "256", "float32", True) for layer in _LAYERS),
    *((layer, "256", "bfloat16", False) for layer in _LAYERS),
    *((name, "256", "float32", False) for name in ("training step", "prefill", "decode step")),
]
_ON_GPU = [
    (name, shape.name, dtype, True)
    for name in works.WORKS
    for shape in SHAPES
    if works.fits(name, shape)
    for dtype in ("bfloat16", "float32")
]
_PIECES = _ON_CPU if DEVICE == "cpu" else _ON_GPU
_SECONDS = 0.25
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 15


def _work(name: str, shape: str, dtype: str, is_compiled: bool) -> works.Work:
    at = next(candidate for candidate in SHAPES if candidate.name == shape)
    work = works.WORKS[name](at, getattr(torch, dtype), DEVICE)
    if not is_compiled:
        left_out = (works.RECOMPUTE, "compiled")
        work.rows = {
            row: make
            for row, make in work.rows.items()
            if not any(name in row for name in left_out)
        }
    return work


def _cases() -> Iterator[pytest.param]:
    for name, shape, dtype, is_compiled in _PIECES:
        piece = (name, shape, dtype, is_compiled)
        work = _work(*piece)
        # a layer reads the whole bank for one token: its backward is no decoding
        is_decoding = shape == "decode" and name in _LAYERS
        for pass_name in ("forward",) if is_decoding else work.passes:
            for row in work.rows:
                if row == works.RECOMPUTE and pass_name == "forward":
                    continue  # the same code without a backward
                identity = "-".join((name, shape, dtype, pass_name, row)).replace(" ", "_")
                yield pytest.param(piece, pass_name, row, id=identity)


class _Rows:
    """A work with its rows, made and checked, and the reasons of those that are not there."""

    def __init__(self, *piece: object):
        self.work = _work(*piece)
        self.reasons: list[str] = []
        self.rows = suite.build_rows(self.work, (), self.reasons)
        agreements = measure.check(self.work, self.rows)
        self.wrong = {name: a.wrong for name, a in agreements.items() if a.wrong}
        self.our_name = next(iter(self.work.rows))
        self.ours = self.rows[self.our_name]


# one at a time: tests come work by work
_rows = functools.lru_cache(maxsize=1)(_Rows)


@functools.lru_cache(maxsize=1)
def _ceilings() -> dict[str, float]:
    return measure.ceilings((torch.float32, torch.bfloat16), DEVICE)


@pytest.mark.parametrize(("piece", "pass_name", "row_name"), _cases())
def test_work(piece, pass_name, row_name, benchmark):
    ceilings, made = _ceilings(), _rows(*piece)
    if row_name not in made.rows:
        pytest.skip("; ".join(reason for reason in made.reasons if row_name in reason))
    work, row, ours = made.work, made.rows[row_name], made.ours

    def spend(row: works.Row) -> float:
        return measure.seconds(row, pass_name, work.cotangents, 1, DEVICE)

    once = spend(row)
    if once < _SECONDS:
        once = spend(row)  # it was the first, which pays for much
    pairs: list[list[float]] = []

    def setup():
        pairs.append([spend(ours)])
        return (measure.run(row, pass_name, work.cotangents),), {}

    def target(call):
        start = time.perf_counter()
        result = call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        pairs[-1].append(time.perf_counter() - start)
        return result

    rounds = min(_MOST_ROUNDS, max(_LEAST_ROUNDS, math.ceil(_SECONDS / once)))
    benchmark.group = f"{work.id} {pass_name}"
    benchmark.pedantic(target, setup=setup, rounds=rounds)
    # clocks of the CPU include the launch, events do not
    spent = statistics.median(theirs for _, theirs in pairs)
    if DEVICE == "cuda":
        spent = statistics.median(spend(row) for _ in range(rounds))
        pairs = [[spend(ours), spend(row)] for _ in range(rounds)]
    flops, moved = work.flops[pass_name], work.bytes[pass_name]
    ratio = statistics.median(t / o for o, t in pairs)
    is_right = made.our_name not in made.wrong
    info = {"seconds": spent, "times ours" if is_right else "times ours, which is wrong": ratio}
    info |= {"wrong": made.wrong[row_name]} if row_name in made.wrong else {}
    if flops:
        info |= {"FLOPs": flops, "GFLOP/s": flops / spent / 1e9}
    if moved:
        info |= {"bytes": moved, "GB/s": moved / spent / 1e9}
    if flops or moved:
        info["share of light"] = measure.light_share(flops, moved, spent, work.dtype, ceilings)
    peak = measure.peak_bytes(measure.run(row, pass_name, work.cotangents), DEVICE)
    benchmark.extra_info |= info | {"peak MiB": None if peak is None else peak / 2**20}
    assert row_name not in made.wrong, made.wrong[row_name]
