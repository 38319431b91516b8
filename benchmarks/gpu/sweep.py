"""Neighbours of the attention's launch tables: numbers before times, a configuration an entry."""

import functools
import itertools
import statistics
from collections.abc import Callable
from unittest import mock

import torch
from entries import Context, Entry
from torch import Tensor

from lm2_kernels.backends.triton import memory_attention, tables
from lm2_kernels.bench import measure
from lm2_kernels.bench.works import Row

KERNELS = ("forward", "dkey_value", "dquery")
_WIDTH, _TOKENS = 2048, 2048


def entries(context: Context, what: str) -> list[Entry]:
    """Times at eight segments, or "one"; or "compile", which fills Triton's cache for them."""
    widths, batch, count = (256, 128, 64), 1 if what == "one" else 8, 99
    if context.is_rehearsal:
        widths, batch, count = (64,), 1, 2
    run = _compile if what == "compile" else _time
    found = []
    for kernel, width in itertools.product(KERNELS, widths):
        own = own_config(kernel, context.machine["target"], width, batch)
        for index, config in enumerate(neighbours(own)[:count]):
            key = f"{kernel} K={width} {config.block_tokens}x{config.block_slots}"
            key += f" warps {config.num_warps} stages {config.num_stages}"
            work = functools.partial(run, context, kernel, width, batch, own, config)
            found.append((index, Entry(key, work, 20.0)))
    # the nearest of all kernels before the next ones of any: time may run out
    return [entry for _, entry in sorted(found, key=lambda pair: pair[0])]


def own_config(kernel: str, target: str, width: int, batch: int) -> tables.AttentionConfig:
    """What the tables say in 16 bits."""
    sizes = (batch * _WIDTH // width, _TOKENS) if kernel == "forward" else ()
    return getattr(tables, f"attention_{kernel}")(target, torch.bfloat16, width, False, *sizes)


def neighbours(own: tables.AttentionConfig) -> list[tables.AttentionConfig]:
    """The table's own configuration, and those one step away. The compiler refuses some."""
    stages = (own.num_stages - 1, own.num_stages + 1, own.num_stages + 2)
    found = [own, *(own._replace(num_stages=count) for count in stages if count >= 1)]
    for name, low, high in (
        ("block_slots", 16, 256),
        ("block_tokens", 16, 256),
        ("num_warps", 4, 16),
    ):
        size = getattr(own, name)
        found += [own._replace(**{name: n}) for n in (size // 2, 2 * size) if low <= n <= high]
    return found


def _call(
    context: Context, kernel: str, width: int, batch: int, tokens: int
) -> Callable[[tables.AttentionConfig], list[Tensor]]:
    """A kernel by its configuration; those of the backward run after the delta pass."""
    torch.manual_seed(0)
    shape = (batch, tokens, 1 if context.is_rehearsal else _WIDTH // width, width)
    # the interpreter has float16 alone of 16 bits
    dtype = torch.float16 if context.is_rehearsal else torch.bfloat16
    dout, *inputs = (torch.randn(shape, device=context.device, dtype=dtype) for _ in range(4))
    inputs += [None, None]
    options = (True, 0, width**-0.5, None, 0.0)
    # below the layer that rewords Triton's errors
    run = functools.partial(memory_attention.memory_attention_forward, *inputs, *options)
    if kernel != "forward":
        wanted = (kernel == "dquery", kernel == "dkey_value")
        backward = memory_attention.memory_attention_backward
        run = functools.partial(backward, dout, *inputs, *run(), *options, *wanted)

    def under(config: tables.AttentionConfig) -> list[Tensor]:
        with mock.patch.object(tables, f"attention_{kernel}", lambda *_, **__: config):
            return [tensor for tensor in run() if tensor.numel()]

    return under


def _compile(context, kernel, width, batch, own, config, end: float) -> dict:
    _call(context, kernel, width, 1, 32)(config)
    return {"line": "compiled"}


def _time(context, kernel, width, batch, own, config, end: float) -> dict:
    call = _call(context, kernel, width, batch, 32 if context.is_rehearsal else _TOKENS)
    pairs = [(g.double(), w.double()) for g, w in zip(call(config), call(own), strict=True)]
    error = max(float((got - want).norm() / want.norm()) for got, want in pairs)
    # kernels differ by half an ulp or so, wrong ones by far more; NaN is no less than anything
    agrees = error <= 2 * torch.finfo(torch.bfloat16).eps
    rows = {"table": own, "candidate": config}
    rows = {name: Row(functools.partial(call, choice), ()) for name, choice in rows.items()}
    times = measure.measure(rows, "forward", (), context.device, 0.3)
    speedup = measure.ratio(times["table"], times["candidate"])
    spent = statistics.median(times["candidate"])
    line = f"{1e6 * spent:.1f} us, {speedup:.3f} x the table"
    line += "" if agrees else f", WRONG: error {error:.2g}"
    # a wrong candidate is no fault of the package's
    found = {"ok": agrees or config != own, "line": line, "agrees": agrees}
    return found | {"speedup": speedup, "seconds": spent, "config": config._asdict()}
