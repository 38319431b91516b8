"""Other forms of the attention's kernels, and neighbours of the launch tables.

A configuration an entry, and numbers before times: a candidate that is wrong is fast for nothing.
"""

import functools
import itertools
import statistics
from collections.abc import Callable
from unittest import mock

import torch
import triton
from entries import Context, Entry
from torch import Tensor

from lm2_kernels.backends.triton import launch, memory_attention, tables
from lm2_kernels.bench import measure
from lm2_kernels.bench.works import Row

# with the number of their products
KERNELS = {"forward": 2, "dkey_value": 4, "dquery": 3}
_WIDTH, _TOKENS = 2048, 2048
# eight segments are what is tuned for; "compile" fills Triton's cache for both
_BATCHES = {"compile": (8, 1), "sweep": (8,), "sweep_one": (1,)}


def entries(context: Context, phase: str) -> list[Entry]:
    widths, batches, target = (256, 128, 64), _BATCHES[phase], context.target
    if context.is_rehearsal:
        # the interpreter runs every form
        widths, batches, target = (64,), (1,), "sm_90"
    found = {}
    for batch, kernel, width in itertools.product(batches, KERNELS, widths):
        own = own_config(kernel, target, width, batch)
        (_, *others), forms = neighbours(own), candidates(kernel, target, width)
        configs = [others[0], *list(forms)[:1]] if context.is_rehearsal else [own, *forms, *others]
        for index, config in enumerate(configs):
            key = f"{kernel} K={width} {config.block_tokens}x{config.block_slots}"
            key += f" warps {config.num_warps} stages {config.num_stages}"
            key += "" if config.form == "pointers" else f" {config.form}"
            options = (context.device, kernel, width, batch, own, config)
            if phase == "compile":
                work = functools.partial(_compile, *options)
            else:
                work = functools.partial(_time, *options, forms.get(config))
            found.setdefault(key, (index, Entry(key, work, 20.0)))
    # the nearest of all kernels before the next ones of any: time may run out
    return [entry for _, entry in sorted(found.values(), key=lambda pair: pair[0])]


def own_config(kernel: str, target: str, width: int, batch: int) -> tables.AttentionConfig:
    """What the tables say in 16 bits."""
    sizes = (batch * _WIDTH // width, _TOKENS, _TOKENS) if kernel == "forward" else (_TOKENS,)
    # of a call that a descriptor can serve, without dropout
    choose = getattr(tables, f"attention_{kernel}")
    return choose(target, torch.bfloat16, width, False, *sizes, True, False)


def candidates(kernel: str, target: str, width: int) -> dict[tables.AttentionConfig, int]:
    """The other forms that this release of Triton compiles, with the TFLOP/s predicted of each."""
    release = ".".join(triton.__version__.split(".")[:2])
    found = tables.CANDIDATES[kernel, width] if target == "sm_90" else ()
    return {c.config: c.predicted for c in found if not c.releases or release in c.releases}


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


def _time(device, kernel, width, batch, own, config, predicted, end: float) -> dict:
    tokens = 32 if device == "cpu" else _TOKENS
    call = _call(device, kernel, width, batch, tokens)
    pairs = [(g.double(), w.double()) for g, w in zip(call(config), call(own), strict=True)]
    error = max(float((got - want).norm() / want.norm()) for got, want in pairs)
    # kernels differ by half an ulp or so, wrong ones by far more; NaN is no less than anything
    agrees = error <= 2 * torch.finfo(torch.bfloat16).eps
    calls = {"table": functools.partial(call, own), "candidate": functools.partial(call, config)}
    rows = {name: Row(run, ()) for name, run in calls.items()}
    times = measure.measure(rows, "forward", (), device, 0.0 if device == "cpu" else 0.3)
    speedup = measure.ratio(times["table"], times["candidate"])
    spent = statistics.median(times["candidate"])
    # with the other kernels of the pass: of the backward the delta pass
    visible = tokens * (tokens + 1) // 2
    tflops = KERNELS[kernel] * 2e-12 * batch * _WIDTH * visible / spent
    line = f"{1e6 * spent:.1f} us, {speedup:.3f} x the table, {tflops:.0f} TFLOP/s"
    line += "" if predicted is None else f" of {predicted} predicted"
    line += "" if agrees else f", WRONG: error {error:.2g}"
    # a wrong candidate is no fault of the package's
    found = {"ok": agrees or config != own, "line": line, "agrees": agrees}
    found |= {"speedup": speedup, "seconds": spent, "config": config._asdict()}
    return found | {"tflops": tflops, "predicted": predicted}
