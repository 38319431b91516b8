"""Times, rates and memory: rows in turns, so that what else the machine does hits all of them."""

import ctypes
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lm2_kernels import testing
from lm2_kernels.backends import OPS, cpu_products
from lm2_kernels.bench.works import (
    DROPOUT,
    NO_CACHE,
    ORACLE,
    RELEASED,
    Outputs,
    Row,
    Work,
    dtype_name,
)

# what a single timing must last on a CPU: shorter work is repeated within it
_MIN_SECONDS = 2e-3
_MAX_ROUNDS = 31
# of which a first call, which also sets up what is needed once, tells enough
_LONG_SECONDS = 1.0
# larger than any cache of a GPU
_FLUSH_BYTES = 256 * 2**20
# How often it is written before a timing: 1.5 ms and more (at 4.4 TB/s), in which the host queues
# the work, so that the GPU does not wait for it. What a call takes the host is another thing.
_FLUSHES = 24
# A peer rounds in places of its own: only gross errors are not its kind of rounding.
_PEER_FACTOR = 8.0


class Agreement(NamedTuple):
    """How a row's results compare with the oracle's."""

    share: float  # the largest of the allowed error
    wrong: str | None  # what is said of a row that exceeds it


def run(row: Row, pass_name: str, cotangents: Outputs) -> Callable[[], object]:
    """What is timed of a row, after untimed work is done: call the result to do it once."""
    if pass_name == "forward":

        def forward() -> object:
            with torch.no_grad():
                return row.forward()

        return forward

    def backward(outputs: Outputs) -> object:
        if row.backward is not None:
            return row.backward(outputs)
        return torch.autograd.grad(outputs, row.leaves, cotangents)

    if pass_name == "both":
        return lambda: backward(row.forward())
    outputs = row.forward()
    return lambda: backward(outputs)


def seconds(row: Row, pass_name: str, cotangents: Outputs, repeats: int, device: str) -> float:
    """One timing of a row: a call's mean over ``repeats``."""
    total = 0.0
    for _ in range(repeats if pass_name == "backward" else 1):
        # a graph is good for one backward, so each has its own, made outside the time
        work = run(row, pass_name, cotangents)
        times = 1 if pass_name == "backward" else repeats
        total += _seconds(work, times, device)
        del work
    return total / repeats


def _seconds(work: Callable[[], object], times: int, device: str) -> float:
    if device == "cuda":
        return _event_seconds(work, times)
    return _clock_seconds(work, times, device)


def _clock_seconds(work: Callable[[], object], times: int, device: str = "cpu") -> float:
    synchronize = torch.accelerator.synchronize if device != "cpu" else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(times):
        result = work()
    synchronize()
    spent = time.perf_counter() - start
    del result  # freeing it is not part of the work
    return spent


def flush_gpu_cache() -> None:
    """Have the next work begin with a cold L2 cache, and the host ahead of the GPU."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(_FLUSHES):
        flush.zero_()


def _event_seconds(work: Callable[[], object], times: int) -> float:
    flush_gpu_cache()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(
    rows: dict[str, Row],
    pass_name: str,
    cotangents: Outputs,
    device: str,
    budget: float,
    fewest: int = 3,
) -> dict[str, list[float]]:
    """Interleaved timings of all rows, in random order: the n-th of each belong together.

    Args:
        rows: by name.
        pass_name: "forward", "backward" or "both".
        cotangents: of the outputs.
        device: its type.
        budget: seconds to spend, about.
        fewest: rounds that are run even so.
    """
    first = {name: seconds(row, pass_name, cotangents, 1, device) for name, row in rows.items()}
    for name, row in rows.items():
        # what is set up once would spoil the first time, unless the work is long
        if first[name] < _LONG_SECONDS:
            first[name] = seconds(row, pass_name, cotangents, 1, device)
    repeats = dict.fromkeys(rows, 1)
    if device == "cpu":
        # events of a GPU time a single call, which begins with a cold cache
        repeats = {name: max(1, math.ceil(_MIN_SECONDS / spent)) for name, spent in first.items()}
    a_round = sum(first[name] * repeats[name] for name in rows)
    count = min(_MAX_ROUNDS, max(fewest, int(budget / a_round)))
    times: dict[str, list[float]] = {name: [] for name in rows}
    order = random.Random(0)
    for _ in range(count):
        # shuffled: what a row leaves in caches and allocator meets each of the others
        for name in order.sample(list(rows), len(rows)):
            times[name].append(seconds(rows[name], pass_name, cotangents, repeats[name], device))
    return times


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as fast ours is: the median over rounds."""
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=True))


def check(work: Work, rows: dict[str, Row]) -> dict[str, Agreement]:
    """Hold every row to the numerics rule of :mod:`lm2_kernels.testing`.

    Outputs and gradients are compared: all of an op's, those of x and memory of a layer, those of
    the first two parameters of a model. Plain PyTorch in the same dtype is the yardstick; ours may
    reach :data:`lm2_kernels.testing.NARROW` in this one draw.
    """
    checked = {name: row for name, row in rows.items() if row.is_checked}
    if not checked:
        return {}
    oracle = _results(work.oracle(), work)
    yardstick = _yardstick(work, rows)
    plain = _results(yardstick, work)
    found = {}
    for name, row in checked.items():
        results = plain if row is yardstick else _results(row, work)
        comparisons = [
            testing.compare(label, results[label], oracle[label], plain[label]) for label in oracle
        ]
        worst = max(comparisons, key=lambda comparison: comparison.share)
        limit = testing.NARROW if row.is_ours else _PEER_FACTOR
        wrong = None
        if not worst.share <= limit:
            wrong = (
                f"{work.id}: row '{name}' is wrong: {worst.name} has {worst.share:.2g} times the "
                f"allowed error"
            )
        found[name] = Agreement(worst.share, wrong)
    return found


def _yardstick(work: Work, rows: dict[str, Row]) -> Row:
    """The row that plain PyTorch is; where its scores are too large, our eager backend."""
    name = next(name for name in (RELEASED, ORACLE, NO_CACHE, "eager") if name in work.rows)
    return rows[name] if name in rows else work.rows[name]()


def _results(row: Row, work: Work) -> dict[str, Tensor]:
    if row.restart is not None:
        row.restart()
    # rows that drop drop the same
    torch.manual_seed(0)
    if work.passes == ("forward",):
        with torch.no_grad():
            outputs = row.forward()
        return {f"output {index}": tensor for index, tensor in enumerate(outputs)}
    outputs = row.forward()
    cotangents = [c.to(o.dtype) for c, o in zip(work.cotangents, outputs, strict=True)]
    # parameters' gradients are sums over all rows, whose error is judged where each op is tested
    leaves = row.leaves if work.name in (*OPS, DROPOUT) else row.leaves[:2]
    gradients = torch.autograd.grad(outputs, leaves, cotangents)
    named = {f"output {index}": tensor.detach() for index, tensor in enumerate(outputs)}
    return named | {f"d{index}": gradient for index, gradient in enumerate(gradients)}


# --- CUDA graphs --------------------------------------------------------------------------------


def captured(row: Row, pass_name: str, cotangents: Outputs) -> tuple[Row, bool]:
    """A row whose forward replays a CUDA graph of this pass ("forward" or "both").

    Also whether a replay gives bit for bit what eager launches do, on other values of the first
    leaf than it was captured with.
    """
    work = run(row, pass_name, cotangents)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # nothing may be loaded or set up for the first time in a capture
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    is_equal = True
    if row.is_checked:
        with torch.no_grad():
            row.leaves[0].neg_()
        # rows that drop drop the same, each time it is drawn anew
        torch.manual_seed(0)
        graph.replay()
        # before anything else runs: a graph's results are only good until its next replay
        replayed = [tensor.detach().clone() for tensor in results]
        torch.manual_seed(0)
        is_equal = all(map(torch.equal, replayed, work()))
        with torch.no_grad():
            row.leaves[0].neg_()
    return Row(graph.replay, (), is_ours=row.is_ours), is_equal


# --- ceilings ----------------------------------------------------------------------------------


def ceilings(dtypes: Sequence[torch.dtype], device: str) -> dict[str, float]:
    """The machine's limits in this run: bytes a second of a large copy, FLOPs of a large product.

    The product is the best of the libraries that :mod:`lm2_kernels.backends.cpu_products` chooses
    from.
    """
    elements = (2**26 if device == "cpu" else 2**28) // 4
    source = torch.ones(elements, device=device)
    target = torch.zeros_like(source)
    found = {"copy": 2.0 * source.nbytes / _best(lambda: target.copy_(source), device)}
    size = 2048 if device == "cpu" else 8192
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        with torch.no_grad():
            spent = _best(lambda a=a, b=b: cpu_products.product(a, b.t()), device)
        found[dtype_name(dtype)] = 2.0 * size**3 / spent
    return found


def _best(work: Callable[[], object], device: str, rounds: int = 5) -> float:
    _seconds(work, 1, device)
    return min(_seconds(work, 1, device) for _ in range(rounds))


def light_share(
    flops: float, moved: float, spent: float, dtype: torch.dtype, ceiling: dict[str, float]
) -> float:
    """The share of the speed of light: the least time that both ceilings allow, by the time."""
    return max(flops / ceiling[dtype_name(dtype)], moved / ceiling["copy"]) / spent


# --- memory ------------------------------------------------------------------------------------


def saved_bytes(row: Row) -> int:
    """What autograd keeps of a forward pass for backward, beside inputs and parameters."""
    own = {leaf.untyped_storage().data_ptr() for leaf in row.leaves}
    storages: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = row.forward()
    del outputs
    return sum(storages.values())


def peak_bytes(work: Callable[[], object], device: str) -> int | None:
    """The most memory that ``work`` takes beyond what there was; None where that is unknown.

    On Linux CPUs from the process's resident set, whose high mark can be reset.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if device != "cpu":
        return None
    try:
        # memory that was freed but not returned would hide what is used of it
        ctypes.CDLL(None).malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        work()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError, StopIteration, TypeError):
        return None


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))
