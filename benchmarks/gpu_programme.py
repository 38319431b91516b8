"""The GPU programme: what only an NVIDIA GPU can prove or measure, in under eight minutes.

    python benchmarks/gpu_programme.py                    # all pieces
    python benchmarks/gpu_programme.py --only attention   # one piece, with the whole budget

Each piece runs in a process of its own under a time limit, so that neither a hang nor a fault of
the GPU stops the others. It writes its JSON after every measurement: the same command again goes on
with what failed or was left out for want of time, and keeps the rest. Results of another machine or
of other versions are not mixed in: their piece starts again.

Exit code 1 if a piece failed, 2 without a GPU.

Not in it, as there is no such kernel to measure: warp-specialised attention, and a split of the
dK/dV pass.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import copy
import functools
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from triton.errors import TritonError

from lm2_kernels import functional, info, reference
from lm2_kernels.backends import dropout
from lm2_kernels.backends import triton as kernels
from lm2_kernels.backends.triton import launch, memory_attention, tables
from lm2_kernels.bench import suite as bench_suite
from lm2_kernels.bench.measure import flush_gpu_cache
from lm2_kernels.bench.peers import SDPA_KERNELS, sdpa
from lm2_kernels.functional import initial_memory
from lm2_kernels.modules import PaperMemory, ReleaseMemory

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 460.0
# seconds and share of a piece's time, the lesser of both, at whose end it begins nothing new: the
# measurement under way may end
_LAST_SECONDS, _LAST_SHARE = 10.0, 0.15
_TAIL = 3000

DEVICE = "cuda"
DTYPE = torch.bfloat16
WIDTH = 2048  # H * K of the attention, D of the row kernels
TOKENS = 2048
HEAD_WIDTHS = (64, 128, 256)
# rms error by rms value: bfloat16 kernels differ by half an ulp or so, wrong ones by far more
_TOLERANCE = 2 * torch.finfo(DTYPE).eps

_WARM_UP = 3
_ROUNDS = 21


class Run(NamedTuple):
    """Where a piece writes and until when it may run."""

    out: Path
    until: float

    def left(self) -> float:
        return max(0.0, self.until - time.time())


class Entry(NamedTuple):
    """One measurement. Its row may say ``ok``: False is a failure, like an exception."""

    key: str
    work: Callable[[Run], dict]


class Piece(NamedTuple):
    about: str
    share: float  # of the budget
    entries: Callable[[], Iterator[Entry]]


# --- timing ------------------------------------------------------------------------------------


def timed(works: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """GPU seconds of each work in each round. They take turns, and begin with a cold L2 cache."""
    for work in works.values():
        for _ in range(_WARM_UP):
            work()
    events: dict[str, list] = {name: [] for name in works}
    for _ in range(_ROUNDS):
        for name, work in works.items():
            flush_gpu_cache()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: [start.elapsed_time(end) / 1e3 for start, end in pairs]
        for name, pairs in events.items()
    }


def median_seconds(work: Callable[[], object]) -> float:
    """The median of one work alone."""
    return statistics.median(timed({"": work})[""])


def host_seconds(work: Callable[[], object], calls: int = 100) -> float:
    """Wall seconds of a call in a row of them: of host or GPU, what is slower."""
    for _ in range(_WARM_UP):
        work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def error_share(got: Tensor, want: Tensor) -> float:
    """Rms error by rms value; NaN is infinite."""
    error = (got.double() - want.double()).square().mean().sqrt()
    share = float(error / want.double().square().mean().sqrt())
    return math.inf if math.isnan(share) else share


def draw(*shape: int) -> Tensor:
    """Standard normal, in :data:`DTYPE`, on the GPU."""
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


# --- suite and bench --------------------------------------------------------------------------


def outside(command: list[str], seconds: float, log: Path) -> tuple[int | None, str]:
    """Run a program in the repository. Returns its exit code, None if stopped, and its output."""
    with log.open("w", encoding="utf-8") as file:
        try:
            done = subprocess.run(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                cwd=ROOT,
                check=False,
            )
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = None
    return code, log.read_text(encoding="utf-8", errors="replace")


SUITE = "pytest -m gpu"


def suite() -> Iterator[Entry]:
    yield Entry(SUITE, _suite)


def _suite(run: Run) -> dict:
    # a run that was stopped goes on with the tests that have not passed
    outcomes = load(run.out, "suite")["rows"].get(SUITE, {}).get("outcomes", {})
    passed = [test for test, outcome in outcomes.items() if outcome == "PASSED"]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--color=no", "tests/test_gpu.py"]
    command += [f"--deselect={test}" for test in passed]
    if importlib.util.find_spec("xdist") is not None:
        # compilation is most of its time; more workers would crowd the GPU's memory
        command += ["-n", "4"]
    code, output = outside(command, run.left(), run.out / "suite.txt")
    outcomes = dict.fromkeys(passed, "PASSED") | pytest_outcomes(output)
    counts = dict(collections.Counter(outcomes.values()))
    line = ", ".join(f"{count} {name.lower()}" for name, count in sorted(counts.items()))
    if code is None:
        line += ", stopped by the time limit: the next run goes on"
    # without a test left, pytest's exit code is 5
    ok = code == 0 or (code == 5 and bool(passed))
    details = {"exit_code": code, "counts": counts, "tail": output[-_TAIL:], "outcomes": outcomes}
    return {"ok": ok, "line": line, **details}


def pytest_outcomes(output: str) -> dict[str, str]:
    """Of each test that ended, from the output of ``pytest -v``, with and without pytest-xdist."""
    outcome = "PASSED|FAILED|ERROR|SKIPPED"
    found = re.findall(rf"^\[gw.*\] ({outcome}) (\S+::\S+)", output, re.M)
    found += [pair[::-1] for pair in re.findall(rf"^(\S+::\S+) ({outcome})", output, re.M)]
    return {test: outcome for outcome, test in found}


_BENCH_SECONDS = 10.0  # for the rounds of a work; compiling comes on top
_BENCH_LAYERS = ("paper layer", "release layer")
# the first matter most: each takes a while to compile
BENCH = [
    *((layer, shape, "bfloat16") for shape in ("2048", "512") for layer in _BENCH_LAYERS),
    ("residual_layer_norm", "2048", "bfloat16"),
    ("decode step", "2048", "bfloat16"),
    ("memory_update", "2048", "bfloat16"),
    ("memory_attention", "2048", "bfloat16"),
    ("training step", "1024", "bfloat16"),
    ("prefill", "1024", "bfloat16"),
    *((layer, "2048", "float32") for layer in _BENCH_LAYERS),
    *((layer, "1024", "bfloat16") for layer in _BENCH_LAYERS),
]


def bench() -> Iterator[Entry]:
    for piece in BENCH:
        yield Entry(" ".join(piece), functools.partial(_bench, *piece))


def _bench(name: str, shape: str, dtype: str, run: Run) -> dict:
    selection = bench_suite.Selection((name,), (shape,), (dtype,), device=DEVICE)
    report = bench_suite.run(selection, _BENCH_SECONDS)
    # with what was measured before, for `python -m lm2_kernels bench --from`
    rows = load(run.out, "bench")["rows"].values()
    joined = join_reports([*(row["report"] for row in rows if row["ok"]), report])
    (run.out / "bench_report.json").write_text(json.dumps(joined, indent=1), encoding="utf-8")
    shown = [f"{r['row']} {r['pass']} {1e6 * r['seconds']:.0f} us" for r in report["results"]]
    return {"ok": bool(shown), "report": report, "line": ", ".join(shown) or report["skipped"][-1]}


def join_reports(reports: list[dict]) -> dict:
    """Reports of the same machine as one."""
    joined, *others = copy.deepcopy(reports)
    del joined["selection"]
    for report in others:
        for name in ("results", "skipped"):
            joined[name] += report[name]
        bench_suite.raise_ceilings(joined, report["ceilings"])
    return joined


# --- ceilings ----------------------------------------------------------------------------------

_SQUARE, _PACKED, _LARGE = (2048,) * 3, (2048, 4096, 2048), (8192,) * 3
MATMULS = [
    (dtype, sizes)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for sizes in (_SQUARE, _PACKED, _LARGE)
    if sizes != _LARGE or dtype == torch.bfloat16
]


def ceilings() -> Iterator[Entry]:
    def copy(run: Run) -> dict:
        rate = copy_rate()
        return {"bytes_per_second": rate, "line": f"{rate / 1e12:.2f} TB/s"}

    def matmul(dtype: torch.dtype, sizes: tuple[int, int, int], run: Run) -> dict:
        rows, columns, inner = sizes
        x = torch.randn(rows, inner, device=DEVICE, dtype=dtype)
        weight = torch.randn(columns, inner, device=DEVICE, dtype=dtype)
        spent = median_seconds(lambda: torch.mm(x, weight.t()))
        rate = 2.0 * math.prod(sizes) / spent
        return {"seconds": spent, "flops": rate, "line": f"{rate / 1e12:.0f} TFLOP/s"}

    yield Entry("copy", copy)
    for dtype, sizes in MATMULS:
        # rows x columns x inner
        key = f"{str(dtype).removeprefix('torch.')} {'x'.join(map(str, sizes))}"
        yield Entry(key, functools.partial(matmul, dtype, sizes))
    yield Entry("launch", _launches)


@functools.cache
def copy_rate() -> float:
    """Bytes read and written a second by a copy of 1 GiB."""
    source = torch.zeros(2**28, device=DEVICE)
    target = torch.empty_like(source)
    return 2.0 * nbytes(source) / median_seconds(lambda: target.copy_(source))


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _launches(run: Run) -> dict:
    x = torch.zeros(16, device=DEVICE)
    token = [draw(1, 1, 64) for _ in range(5)]

    @torch.no_grad()
    def triton() -> object:
        return functional.memory_update(*token, backend="triton")

    seconds = {
        "torch operator": host_seconds(lambda: x.add_(1.0), 1000),
        "triton memory_update": host_seconds(triton, 1000),
    }
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(200):
            x.add_(1.0)
    seconds["kernel in a graph"] = host_seconds(graph.replay) / 200
    line = ", ".join(f"{name} {spent * 1e6:.1f} us" for name, spent in seconds.items())
    return {"seconds": seconds, "line": line}


# --- attention against scaled_dot_product_attention --------------------------------------------

# one sequence, and 16k tokens, at which others publish their rates
ATTENTION_SHAPES = ((1, 2048), (8, 2048), (1, 512), (32, 512))  # B, T = N


def attention() -> Iterator[Entry]:
    shapes = [(width, *shape) for shape in ATTENTION_SHAPES for width in reversed(HEAD_WIDTHS)]
    # the released model's dropout in training
    pieces = [*((shape, 0.0) for shape in shapes), *(((k, 1, 2048), 0.9) for k in HEAD_WIDTHS)]
    for ((width, batch, tokens), dropout_p), backward in itertools.product(pieces, (False, True)):
        name = "backward" if backward else "forward"
        name += f" dropout {dropout_p}" if dropout_p else ""
        work = functools.partial(_compare_attention, width, batch, tokens, dropout_p, backward)
        yield Entry(f"K={width} B={batch} T={tokens} {name}", work)


def causal_flops(batch: int, tokens: int, products: int) -> float:
    """Of so many products over the pairs of token and slot that causality leaves; T = N."""
    return 2.0 * products * batch * WIDTH * tokens * (tokens + 1) / 2


def _compare_attention(
    width: int, batch: int, tokens: int, dropout_p: float, backward: bool, run: Run
) -> dict:
    torch.manual_seed(0)
    heads = WIDTH // width
    shape = (batch, tokens, heads, width)
    inputs = [draw(*shape).requires_grad_() for _ in range(3)]
    dout = draw(*shape)
    # one sequence: the scores of all would fill the GPU
    exact = [tensor[:1].detach().float().requires_grad_() for tensor in inputs]
    seed = functional.draw_seed(torch.device(DEVICE)) if dropout_p else None
    dropped = {}
    if seed is not None:
        rows_of = torch.arange(heads * tokens, device=DEVICE).view(1, heads, tokens)
        keep_mask = dropout.keep_mask(seed, dropout_p, rows_of, tokens)
        dropped = {"dropout_p": dropout_p, "keep_mask": keep_mask}
    out = reference.memory_attention(*exact, **dropped)
    wanted = torch.autograd.grad(out, exact, dout[:1].float()) if backward else (out.detach(),)
    del out
    flops = causal_flops(batch, tokens, 5 if backward else 2)

    rows: dict[str, dict] = {}
    works: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    for name in ("triton", *SDPA_KERNELS):
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if name == "triton":
                    work, ran = _our_attention(inputs, dout, dropout_p, seed, backward), "triton"
                else:
                    work, ran = _sdpa(SDPA_KERNELS[name], inputs, dout, dropout_p, backward)
                results = work()
            rows[name] = {"ran": ran}
            # theirs drop what their own random numbers say
            if name == "triton" or not dropout_p:
                pairs = zip(results, wanted, strict=True)
                error = max(error_share(got[:1], want) for got, want in pairs)
                rows[name] |= {"error": error, "right": error <= _TOLERANCE}
            works[name] = work
        except (RuntimeError, TritonError) as error:
            # torch says in warnings why it does not take a kernel
            reasons = [str(error), *(str(warning.message) for warning in caught)]
            rows[name] = {"refused": "; ".join(reasons)[:_TAIL]}
    for name, seconds in timed(works).items():
        spent = statistics.median(seconds)
        rows[name] |= {"seconds": spent, "flops": flops / spent}
    shown = []
    for name, row in rows.items():
        text = "no" if "refused" in row else f"{row['flops'] / 1e12:.0f}"
        shown.append(f"{name} {text}" + ("" if row.get("right", True) else " WRONG"))
    line = f"{', '.join(shown)} TFLOP/s; sdpa took {rows['SDPA'].get('ran', 'nothing')}"
    return {"ok": rows["triton"].get("right", False), "rows": rows, "line": line}


def _our_attention(
    inputs: list[Tensor], dout: Tensor, dropout_p: float, seed: Tensor | None, backward: bool
) -> Callable[[], tuple]:
    calls = attention_calls(*(tensor.detach() for tensor in inputs), dout, dropout_p, seed)
    if not backward:
        return lambda: calls["forward"]()[:1]

    def work() -> tuple[Tensor, ...]:
        dquery, dkey_value = calls["backward"]()
        return dquery, *dkey_value.unbind(2)

    return work


def attention_calls(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dout: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Our kernels without autograd, causal: the forward, parts of the backward, and all of it."""
    options = (True, 0, query.shape[-1] ** -0.5, None, dropout_p)
    # below the layer that rewords Triton's errors
    forward = functools.partial(
        memory_attention.memory_attention_forward, query, key, value, None, seed, *options
    )
    backward = functools.partial(
        memory_attention.memory_attention_backward,
        *(dout, query, key, value, None, seed),
        *forward(),
        *options,
    )
    return {
        "forward": forward,
        # each after the delta pass, which is short
        "dkey_value": functools.partial(backward, False, True),
        "dquery": functools.partial(backward, True, False),
        "backward": functools.partial(backward, True, True),
    }


def _sdpa(
    kernel: SDPBackend | None,
    inputs: list[Tensor],
    dout: Tensor,
    dropout_p: float,
    backward: bool,
) -> tuple[Callable[[], tuple[Tensor, ...]], str]:
    """The work, and the name of the autograd node, which tells the kernel that was taken."""

    def forward() -> Tensor:
        return sdpa(*inputs, kernel, is_causal=True, dropout_p=dropout_p)

    out = forward()
    # behind the transposition to (B, T, H, K)
    ran = out.grad_fn.next_functions[0][0].name().removesuffix("Backward0")
    if backward:
        return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True), ran
    return torch.no_grad()(lambda: (forward(),)), ran


# --- sweep of the launch tables ----------------------------------------------------------------

# the side of the tile that a program owns, the other side, which it runs over; and how many tensors
# it reads of its own rows, how many it accumulates, and how many tiles of scores it holds
KERNELS = {
    "forward": ("block_tokens", "block_slots", 1, 1, 1),
    "dkey_value": ("block_slots", "block_tokens", 2, 2, 2),
    "dquery": ("block_tokens", "block_slots", 2, 1, 2),
}
SWEEP_BATCHES = (1, 4)
CANDIDATES = 14
BETTER = 1.03
# of a thread's registers, for accumulators and scores: more always spills
_TILE_SHARE = 0.75
# the most that any GPU gives a block
_SHARED_BYTES = 227 * 1024


def candidates(
    kernel: str, head_width: int, own: tables.AttentionConfig
) -> list[tables.AttentionConfig]:
    """The table's own configuration, then its neighbours, the nearest first.

    A step halves or doubles a side of the tile or the warps, or adds or takes a stage. Left out
    is what cannot but spill, or has no room in shared memory.
    """
    own_side, other_side, num_read, num_accumulated, num_scores = KERNELS[kernel]

    def fits(config: tables.AttentionConfig) -> bool:
        rows, others = getattr(config, own_side), getattr(config, other_side)
        registers = num_accumulated * rows * head_width + num_scores * rows * others
        registers /= 32 * config.num_warps
        # two tensors of the other side for each stage
        shared = 2 * head_width * (num_read * rows + 2 * config.num_stages * others)
        room = min(256, 65_536 // (32 * config.num_warps))
        return registers <= _TILE_SHARE * room and shared <= _SHARED_BYTES

    def steps(config: tables.AttentionConfig) -> int:
        *sizes, stages = zip(own, config, strict=True)
        return abs(stages[0] - stages[1]) + sum(round(abs(math.log2(a / b))) for a, b in sizes)

    choices = itertools.product(
        _halved_and_doubled(own.block_tokens, 16, 256),
        _halved_and_doubled(own.block_slots, 16, 256),
        _halved_and_doubled(own.num_warps, 4, 16),
        range(1, 5),
    )
    others = itertools.starmap(tables.AttentionConfig, choices)
    others = [config for config in others if config != own and fits(config)]
    # large tiles move less
    others.sort(key=lambda config: (steps(config), -config.block_tokens * config.block_slots))
    return [own, *others][:CANDIDATES]


def _halved_and_doubled(size: int, low: int, high: int) -> list[int]:
    return [other for other in (size // 2, size, 2 * size) if low <= other <= high]


def own_config(
    kernel: str, target: str, head_width: int, batch: int, tokens: int = TOKENS
) -> tables.AttentionConfig:
    """What the tables say for bfloat16 at this shape."""
    choice = (target, DTYPE, head_width, False)
    if kernel == "forward":
        return tables.attention_forward(*choice, batch * WIDTH // head_width, tokens)
    return getattr(tables, f"attention_{kernel}")(*choice)


@contextlib.contextmanager
def swapped(
    kernel: str, target: str, head_width: int, config: tables.AttentionConfig
) -> Iterator[None]:
    """Put a configuration into the tables until the block ends."""
    places = {
        # the second table, for few programs, so that the configuration is taken at every shape
        "forward": [tables.FORWARD_16BIT[target], tables.FORWARD_16BIT_FEW],
        "dkey_value": [tables.DKEY_VALUE_16BIT[target]],
        "dquery": [tables.DQUERY_16BIT[target]],
    }[kernel]
    before = [place[head_width] for place in places]
    try:
        for place in places:
            place[head_width] = config
        yield
    finally:
        for place, config_before in zip(places, before, strict=True):
            place[head_width] = config_before


def sweep() -> Iterator[Entry]:
    yield from _row_kernel_entries()
    target = launch.target(torch.cuda.current_device())
    places = list(itertools.product(KERNELS, reversed(HEAD_WIDTHS), SWEEP_BATCHES))
    chosen = {
        place: candidates(place[0], place[1], own_config(place[0], target, *place[1:]))
        for place in places
    }
    # a kernel's code does not depend on the batch
    to_compile = {(k, width, config): None for (k, width, _), cs in chosen.items() for config in cs}
    yield Entry("compile", functools.partial(_compile_all, target, list(to_compile)))
    # the nearest of all kernels before the next ones of any: time may run out
    for index, place in itertools.product(range(CANDIDATES), places):
        kernel, width, batch = place
        if index < len(chosen[place]):
            config = chosen[place][index]
            key = f"{kernel} K={width} B={batch} {'x'.join(map(str, config[:2]))}"
            key += f" warps {config.num_warps} stages {config.num_stages}"
            yield Entry(key, functools.partial(_time_candidate, target, *place, config))


def _compile_all(target: str, choices: list[tuple], run: Run) -> dict:
    """Fill Triton's cache on disk from several processes: compiling is most of a sweep."""
    start = time.time()
    workers = max(1, min(8, (os.cpu_count() or 2) - 1, len(choices)))
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        futures = [pool.submit(_compile, target, *choice) for choice in choices]
        done, _ = concurrent.futures.wait(futures, timeout=0.4 * run.left())
        pool.shutdown(cancel_futures=True)
    seconds = time.time() - start
    line = f"{len(done)} of {len(choices)} configurations in {seconds:.0f} s"
    return {"seconds": seconds, "line": line}


def _compile(target: str, kernel: str, width: int, config: tables.AttentionConfig) -> None:
    # what fails here fails again, and is recorded, when it is timed
    with contextlib.suppress(TritonError, RuntimeError), swapped(kernel, target, width, config):
        _sweep_calls(width, 1, 128)[kernel]()


@functools.cache
def _sweep_calls(width: int, batch: int, tokens: int) -> dict[str, Callable]:
    torch.manual_seed(0)
    return attention_calls(*(draw(batch, tokens, WIDTH // width, width) for _ in range(4)))


def _time_candidate(
    target: str, kernel: str, width: int, batch: int, config: tables.AttentionConfig, run: Run
) -> dict:
    own = own_config(kernel, target, width, batch)
    call = _sweep_calls(width, batch, TOKENS)[kernel]

    def under(choice: tables.AttentionConfig) -> Callable[[], tuple[Tensor, Tensor]]:
        def work() -> tuple[Tensor, Tensor]:
            with swapped(kernel, target, width, choice):
                return call()

        return work

    row = {"kernel": kernel, "head_width": width, "batch": batch, "config": config._asdict()}
    row["is_table"] = config == own
    wanted = under(own)()
    try:
        results = under(config)()
    except (TritonError, RuntimeError) as error:
        # not all that the compiler refuses has an exception of Triton's
        if not _gpu_works():
            raise
        row |= {"ok": not row["is_table"], "line": "refused"}
        return row | {"refused": str(error)[:_TAIL]}
    # of a part of the backward only one result is not empty
    pairs = zip(results, wanted, strict=True)
    error = max(error_share(got, want) for got, want in pairs if want.numel())
    times = timed({"table": under(own), "candidate": under(config)})
    ratios = [a / b for a, b in zip(times["table"], times["candidate"], strict=True)]
    row |= {name: statistics.median(seconds) for name, seconds in times.items()}
    row |= {"error": error, "agrees": error <= _TOLERANCE, "speedup": statistics.median(ratios)}
    # a wrong candidate is no fault of the package's
    row["ok"] = row["agrees"] or not row["is_table"]
    line = f"{row['candidate'] * 1e6:.1f} us, {row['speedup']:.3f} x the table"
    return row | {"line": line if row["agrees"] else f"{line}, WRONG: error {error:.2g}"}


def better_than_table(rows: dict[str, dict]) -> list[str]:
    """A line for each candidate that beats its table by more than 3 %, the best first."""
    found = {
        key: row["speedup"]
        for key, row in rows.items()
        if row.get("agrees") and not row["is_table"] and row["speedup"] > BETTER
    }
    return [f"{key}: {found[key]:.3f} x" for key in sorted(found, key=lambda key: -found[key])]


# --- row kernels -------------------------------------------------------------------------------

ROW_KERNELS = ("memory_update", "residual_layer_norm", "pooled_gate", "pooled_gate prefix")
ROW_BATCHES = (1, 8)


def _row_kernel_entries() -> Iterator[Entry]:
    for name, batch, backward in itertools.product(ROW_KERNELS, ROW_BATCHES, (False, True)):
        key = f"{name} B={batch} {'backward' if backward else 'forward'}"
        yield Entry(key, functools.partial(_row_kernel, name, batch, backward))


def _row_kernel(name: str, batch: int, backward: bool, run: Run) -> dict:
    op, *variant = name.split()
    arguments = _row_arguments(op, batch, bool(variant), backward)
    function = getattr(kernels, f"{op}_{'backward' if backward else 'forward'}")
    tensors = [arg for arg in (*arguments, *function(*arguments)) if isinstance(arg, Tensor)]
    moved = sum(map(nbytes, tensors))
    spent = median_seconds(lambda: function(*arguments))
    share = moved / spent / copy_rate()
    line = f"{spent * 1e6:.1f} us, {moved / spent / 1e12:.2f} TB/s, {share:.0%} of a copy"
    return {"seconds": spent, "bytes": moved, "share_of_copy": share, "line": line}


def _row_arguments(op: str, batch: int, prefix: bool, backward: bool) -> tuple:
    """As in the contract of :mod:`lm2_kernels.backends`, all gradients needed."""
    rows = (batch, TOKENS, WIDTH)
    if op == "memory_update":
        hidden, candidate, memory, *gates = (draw(*rows) for _ in range(6))
        if not backward:
            return hidden, candidate, memory, *gates, None, "read"
        cotangents = (draw(*rows), draw(*rows))
        return *cotangents, candidate, memory, *gates, None, "read", True, True, True
    x, weight = draw(*rows), draw(WIDTH)
    if op == "pooled_gate":
        if not backward:
            return x, weight, None, prefix, 0
        dpooled = draw(*rows) if prefix else draw(batch, 1, WIDTH)
        return dpooled, None, x, weight, prefix, 0, True, True, False
    forward = (x, draw(*rows), weight, draw(WIDTH), 1e-5)
    if not backward:
        return forward
    _, mean, rstd = kernels.residual_layer_norm_forward(*forward)
    return draw(*rows), *forward[:3], mean, rstd, True, True


# --- CUDA graphs -------------------------------------------------------------------------------


GRAPH_SLOTS, GRAPH_DIM = 512, 1024


def graphs() -> Iterator[Entry]:
    for layer in (PaperMemory, ReleaseMemory):
        for tokens, backward in ((GRAPH_SLOTS, False), (GRAPH_SLOTS, True), (1, False)):
            key = f"{layer.__name__} T={tokens} {'forward and backward' if backward else 'forward'}"
            yield Entry(key, functools.partial(_graph, layer, tokens, backward))


def _graph(layer_class: type, tokens: int, backward: bool, run: Run) -> dict:
    torch.manual_seed(0)
    layer = layer_class(GRAPH_DIM, device=DEVICE, dtype=DTYPE, backend="triton")
    x = draw(1, tokens, GRAPH_DIM)
    memory = initial_memory(1, GRAPH_SLOTS, GRAPH_DIM, device=DEVICE, dtype=DTYPE)
    # one token is the last of its segment, without a cache
    call = functools.partial(layer, x, memory, slot_offset=GRAPH_SLOTS - tokens)
    cotangents = (draw(1, tokens, GRAPH_DIM), draw(1, GRAPH_SLOTS, GRAPH_DIM))
    leaves = [x.requires_grad_(), memory.requires_grad_(), *layer.parameters()]

    def work() -> tuple[Tensor, ...]:
        if not backward:
            with torch.no_grad():
                return call()
        outputs = call()
        return *outputs, *torch.autograd.grad(outputs, leaves, cotangents)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    with torch.no_grad():
        # a replay must read what is there now
        x.copy_(draw(1, tokens, GRAPH_DIM))
    graph.replay()
    replayed = [tensor.detach().clone() for tensor in captured]
    wanted = work()
    unequal = [
        index
        for index, pair in enumerate(zip(replayed, wanted, strict=True))
        if not torch.equal(*pair)
    ]
    seconds = {"eager": host_seconds(work), "replay": host_seconds(graph.replay)}
    line = f"eager {seconds['eager'] * 1e6:.0f} us, replay {seconds['replay'] * 1e6:.0f} us"
    if unequal:
        line += f", UNEQUAL results {unequal}"
    return {"ok": not unequal, "seconds": seconds, "unequal": unequal, "line": line}


# --- the programme -----------------------------------------------------------------------------

PIECES = {
    "suite": Piece("the hardware tests, pytest -m gpu", 0.27, suite),
    "ceilings": Piece("rates of copies, products and launches", 0.06, ceilings),
    "attention": Piece("our attention against each kernel of torch", 0.13, attention),
    "sweep": Piece("row kernels, and neighbours of the attention's launch tables", 0.25, sweep),
    "bench": Piece("layers, ops and model against their peers", 0.23, bench),
    "graphs": Piece("layers in CUDA graphs against eager launches", 0.06, graphs),
}


def missing_gpu() -> str | None:
    """Why the programme cannot run here, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not built for CUDA"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    return None


@functools.cache
def environment() -> dict:
    return {"versions": info.versions(), "devices": info.devices()}


def load(out: Path, name: str) -> dict:
    """What an earlier run of this piece recorded, or a new record."""
    file = out / f"{name}.json"
    if file.exists():
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["environment"] == environment():
            return record
    record = {"piece": name, "status": "new", "seconds": 0.0, "environment": environment()}
    return record | {"error": None, "rows": {}}


def save(out: Path, record: dict) -> None:
    """At once or not at all: the process may be stopped at any time."""
    file = out / f"{record['piece']}.json"
    part = file.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1), encoding="utf-8")
    part.replace(file)


def run_piece(name: str, run: Run) -> None:
    """Run what a piece's record lacks, in this process."""
    record = load(run.out, name)
    rows, start, before = record["rows"], time.time(), record["seconds"]
    entries = list(PIECES[name].entries())
    # what failed before may stop this process: it comes last
    order = sorted(entries, key=lambda entry: entry.key in rows)
    for entry in order:
        if rows.get(entry.key, {}).get("ok"):
            continue
        if run.left() == 0.0:
            break
        # so that what stops the process is on record; a later try may go on from its earlier row
        started = {"ok": False, "error": "it did not end", "line": "it did not end"}
        rows[entry.key] = rows.get(entry.key, {}) | started
        save(run.out, record | {"status": "unfinished"})
        fault = None
        try:
            rows[entry.key] = {"ok": True} | entry.work(run)
        except Exception as error:
            text = traceback.format_exc()[-_TAIL:]
            rows[entry.key] = {"ok": False, "error": text, "line": str(error)[-_TAIL:]}
            fault = error
        record |= {"status": "unfinished", "seconds": before + time.time() - start, "error": None}
        save(run.out, record)
        print(f"{entry.key}: {rows[entry.key].get('line', '')}", flush=True)
        if fault is not None and not _gpu_works():
            raise fault
    if not all(row["ok"] for row in rows.values()):
        record["status"] = "failed"
    else:
        record["status"] = "done" if len(rows) >= len(entries) else "unfinished"
    save(run.out, record)


def _gpu_works() -> bool:
    # after a fault in a kernel every later call fails too
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def child_command(name: str, run: Run) -> list[str]:
    return [
        *(sys.executable, str(Path(__file__).resolve()), "--inside", name),
        *("--out", str(run.out), "--until", repr(run.until)),
    ]


def start_piece(name: str, out: Path, seconds: float) -> dict:
    """Run a piece in its own process for so many seconds at most. Returns its record."""
    run = Run(out, time.time() + seconds - min(_LAST_SECONDS, _LAST_SHARE * seconds))
    log = out / f"{name}.log"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            child_command(name, run), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # also what it started and left behind
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    record = load(out, name)
    if code != 0 or record["status"] == "new":
        reason = f"exit code {code}" if code is not None else f"stopped after {seconds:.0f} s"
        tail = log.read_text(encoding="utf-8", errors="replace")[-_TAIL:]
        record |= {"status": "failed", "error": f"{reason}\n{tail}"}
        save(out, record)
    return record


def render(records: list[dict]) -> str:
    """What each piece found, then the table of pieces."""
    lines = []
    for record in records:
        lines += ["", record["piece"]]
        rows = record["rows"]
        shown = {key: row for key, row in rows.items() if "is_table" not in row or not row["ok"]}
        lines += [f"  {key}: {row.get('line', '')}" for key, row in shown.items()]
        if record["piece"] == "sweep":
            swept = [row for row in rows.values() if "is_table" in row]
            better = better_than_table(rows) or ["none"]
            lines.append(f"  {len(swept)} candidates; faster than the table by more than 3 %:")
            lines += [f"    {line}" for line in better]
        if record["error"]:
            lines += [f"  {line}" for line in record["error"].splitlines()]
    table = [["piece", "status", "rows", "seconds"]]
    for record in records:
        count, seconds = len(record["rows"]), f"{record['seconds']:.0f}"
        table.append([record["piece"], record["status"], str(count), seconds])
    return "\n".join([*lines, "", *info.columns(table)])


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = list(PIECES)
    parser.add_argument("--only", action="append", choices=names, help="a piece; repeatable")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds ({BUDGET:.0f})")
    parser.add_argument("--again", action="store_true", help="forget what is recorded")
    parser.add_argument("--list", action="store_true", help="name the pieces and stop")
    parser.add_argument("--inside", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(info.columns([[name, piece.about] for name, piece in PIECES.items()])))
        return 0
    reason = missing_gpu()
    if reason is not None:
        print(f"gpu_programme: it needs an NVIDIA GPU: {reason}", file=sys.stderr)
        return 2
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.inside:
        run_piece(options.inside, Run(out, options.until or time.time() + options.budget))
        return 0
    return _programme(options.only or names, out, options.budget, options.again)


def _programme(chosen: list[str], out: Path, budget: float, again: bool) -> int:
    end = time.time() + budget
    records = {}
    waiting = []
    for name in dict.fromkeys(chosen):
        if again:
            (out / f"{name}.json").unlink(missing_ok=True)
        records[name] = load(out, name)
        if records[name]["status"] == "done":
            print(f"{name}: done before", flush=True)
        else:
            waiting.append(name)
    while waiting:
        # what one piece leaves over goes to the others
        shares = sum(PIECES[name].share for name in waiting)
        name = waiting.pop(0)
        seconds = max(1.0, (end - time.time()) * PIECES[name].share / shares)
        print(f"{name}: {seconds:.0f} s at most", flush=True)
        records[name] = start_piece(name, out, seconds)
        print(f"{name}: {records[name]['status']}", flush=True)
    print(render(list(records.values())))
    return int(any(record["status"] == "failed" for record in records.values()))


if __name__ == "__main__":
    sys.exit(main())
