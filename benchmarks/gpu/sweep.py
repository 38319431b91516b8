"""Neighbours of the attention's launch tables: numbers before times, a configuration an entry."""

import functools
import itertools
import statistics
from collections.abc import Callable
from unittest import mock

import torch
from entries import Context, Entry
from torch import Tensor

from lm2_kernels.backends.triton import launch, memory_attention, tables
from lm2_kernels.bench import measure
from lm2_kernels.bench.works import Row

KERNELS = ("forward", "dkey_value", "dquery")
_WIDTH, _TOKENS = 2048, 2048
# eight segments are what is tuned for; "compile" fills Triton's cache for both
_BATCHES = {"compile": (8, 1), "sweep": (8,), "sweep_one": (1,)}


def entries(context: Context, phase: str) -> list[Entry]:
    widths, batches, chosen = (256, 128, 64), _BATCHES[phase], slice(None)
    if context.is_rehearsal:
        widths, batches, chosen = (64,), (1,), slice(1, 2)
    found = {}
    for batch, kernel, width in itertools.product(batches, KERNELS, widths):
        own = own_config(kernel, context.target, width, batch)
        for index, config in enumerate(neighbours(own)[chosen]):
            key = f"{kernel} K={width} {config.block_tokens}x{config.block_slots}"
            key += f" warps {config.num_warps} stages {config.num_stages}"
            options = (context.device, kernel, width, batch, own, config)
            work = functools.partial(_compile if phase == "compile" else _time, *options)
            found.setdefault(key, (index, Entry(key, work, 20.0)))
    # the nearest of all kernels before the next ones of any: time may run out
    return [entry for _, entry in sorted(found.values(), key=lambda pair: pair[0])]


def own_config(kernel: str, target: str, width: int, batch: int) -> tables.AttentionConfig:
    """What the tables say in 16 bits."""
    sizes = (batch * _WIDTH // width, _TOKENS, _TOKENS) if kernel == "forward" else (_TOKENS,)
    return getattr(tables, f"attention_{kernel}")(target, torch.bfloat16, width, False, *sizes)


def neighbours(own: tables.AttentionConfig) -> list[tables.AttentionConfig]:
    """The table's own configuration, and those one step away. The compiler refuses some."""
    stages = (own.num_stages - 1, own.num_stages + 1, own.num_stages + 2)
    found = [own, *(own._replace(num_stages=count) for count in stages if count >= 1)]
    limits = (("block_slots", 16, 256), ("block_tokens", 16, 256), ("num_warps", 4, 16))
    for name, low, high in limits:
        size = getattr(own, name)
        found += [own._replace(**{name: n}) for n in (size // 2, 2 * size) if low <= n <= high]
    return found


def _call(
    device: str, kernel: str, width: int, batch: int, tokens: int
) -> Callable[[tables.AttentionConfig], list[Tensor]]:
    """A kernel by its configuration; those of the backward run after the delta pass."""
    torch.manual_seed(0)
    # the interpreter has float16 alone of 16 bits, and one head is enough for it
    heads, dtype = (1, torch.float16) if device == "cpu" else (_WIDTH // width, torch.bfloat16)
    shape = (batch, tokens, heads, width)
    dout, *inputs = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    inputs += [None, None]
    options = (True, 0, width**-0.5, None, 0.0)
    # below the layer that rewords Triton's errors
    run = functools.partial(memory_attention.memory_attention_forward, *inputs, *options)
    if kernel != "forward":
        wanted = (kernel == "dquery", kernel == "dkey_value")
        backward = memory_attention.memory_attention_backward
        run = functools.partial(backward, dout, *inputs, *run(), *options, *wanted)

    def under(config: tables.AttentionConfig) -> list[Tensor]:
        # what was launched for this layout has another configuration
        launch.forget()
        with mock.patch.object(tables, f"attention_{kernel}", lambda *_, **__: config):
            return [tensor for tensor in run() if tensor.numel()]

    return under


def _compile(device, kernel, width, batch, own, config, end: float) -> dict:
    _call(device, kernel, width, 1, 32)(config)
    return {"line": "compiled"}


def _time(device, kernel, width, batch, own, config, end: float) -> dict:
    call = _call(device, kernel, width, batch, 32 if device == "cpu" else _TOKENS)
    pairs = [(g.double(), w.double()) for g, w in zip(call(config), call(own), strict=True)]
    error = max(float((got - want).norm() / want.norm()) for got, want in pairs)
    # kernels differ by half an ulp or so, wrong ones by far more; NaN is no less than anything
    agrees = error <= 2 * torch.finfo(torch.bfloat16).eps
    calls = {"table": functools.partial(call, own), "candidate": functools.partial(call, config)}
    rows = {name: Row(run, ()) for name, run in calls.items()}
    times = measure.measure(rows, "forward", (), device, 0.0 if device == "cpu" else 0.3)
    speedup = measure.ratio(times["table"], times["candidate"])
    spent = statistics.median(times["candidate"])
    line = f"{1e6 * spent:.1f} us, {speedup:.3f} x the table"
    line += "" if agrees else f", WRONG: error {error:.2g}"
    # a wrong candidate is no fault of the package's
    found = {"ok": agrees or config != own, "line": line, "agrees": agrees}
    return found | {"speedup": speedup, "seconds": spent, "config": config._asdict()}
