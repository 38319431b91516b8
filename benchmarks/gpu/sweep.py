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

from lm2_kernels.backends.contract import NORM, NORM_AND_TANH, NORM_OF_RELU
from lm2_kernels.backends.triton import launch, memory_attention, residual_layer_norm, tables
from lm2_kernels.bench import measure
from lm2_kernels.bench.pairs import seen_pairs
from lm2_kernels.bench.works import Row

# with the number of their products
KERNELS = {"forward": 2, "dkey_value": 4, "dquery": 3}
_WIDTH, _TOKENS = 2048, 2048
# numbers of slots where these are fewer than tokens
_FEW_SLOTS = (64, 128, 16, 256)
Config = tables.AttentionConfig | tables.Config
Call = Callable[[Config], list[Tensor]]

# eight segments are what is tuned for
_BATCHES = {"sweep": 8, "sweep_one": 1}


def entries(context: Context, phase: str) -> list[Entry]:
    """The most promising first: time may run out."""
    widths, batch, target = (256, 128, 64), _BATCHES[phase], context.target
    if context.is_rehearsal:
        # the interpreter runs every form
        widths, batch, target = (64,), 1, "sm_90"
    device, few_slots = context.device, _FEW_SLOTS[: 1 if context.is_rehearsal else None]
    # forms of many slots by what is predicted, then of few, then what has no prediction
    ranked: list[tuple[tuple[int, int], Entry]] = []

    def add(rank: tuple[int, int], key: str, call: Callable[[int, int], Call], *rest) -> None:
        """``rest``: of :func:`_time`."""
        work = functools.partial(_time, call, device, batch, *rest)
        ranked.append((rank, Entry(key, work, 20.0)))

    tokens = _tokens(device)
    for kernel, width, slots in itertools.product(KERNELS, widths, (None, *few_slots)):
        # of slots None is as many as tokens
        own = own_config(kernel, target, width, batch, slots)
        forms = candidates(kernel, target, width, slots)
        others = [] if slots else neighbours(own)[1:]
        # each is timed beside the table's own
        configs = [config for config in (*forms, *others) if config != own]
        if context.is_rehearsal:
            configs = [*others[:1], *list(forms)[:1]]
        call = functools.partial(_attention, device, kernel, width, slots)
        flops = 2.0 * KERNELS[kernel] * _WIDTH * seen_pairs(tokens, slots or tokens, 0)
        for index, config in enumerate(configs):
            key = f"{kernel} K={width} " + (f"N={slots} " if slots else "")
            key += f"{config.block_tokens}x{config.block_slots}"
            key += f" warps {config.num_warps} stages {config.num_stages}"
            key += "" if config.form == "pointers" else f" {config.form}"
            predicted = forms.get(config)
            rank = (3, index) if predicted is None else (1 if slots else 0, -predicted)
            add(rank, key, call, own, config, flops, predicted)
    own = tables.residual_layer_norm(target, _WIDTH, backward=True)
    for name in (NORM, NORM_AND_TANH, NORM_OF_RELU):
        call = functools.partial(_norm, device, name, _WIDTH)
        for index, config in enumerate(norms(own)[1 : 3 if context.is_rehearsal else None]):
            key = f"{name} backward warps {config.num_warps} stages {config.num_stages}"
            add((2, index), key, call, own, config, 0.0, None)
    return [entry for _, entry in sorted(ranked, key=lambda pair: pair[0])]


def norms(own: tables.Config) -> list[tables.Config]:
    """The table's own configuration, and what else the backward of a LayerNorm may be."""
    found = [own._replace(num_stages=stages) for stages in (1, 2, 3)]
    found += [own._replace(num_warps=warps) for warps in (4, 16)]
    return [own, *(config for config in found if config != own)]


def own_config(
    kernel: str, target: str, width: int, batch: int, slots: int | None
) -> tables.AttentionConfig:
    """What the tables say in 16 bits."""
    sizes = (slots or _TOKENS,)
    if kernel == "forward":
        sizes = (batch * _WIDTH // width, _TOKENS, *sizes)
    # of a call that a descriptor can serve, without dropout and TF32
    choose = getattr(tables, f"attention_{kernel}")
    return choose(target, torch.bfloat16, width, False, *sizes, True, False, False)


def candidates(
    kernel: str, target: str, width: int, slots: int | None
) -> dict[tables.AttentionConfig, int]:
    """The other forms that this release of Triton compiles, with the TFLOP/s predicted of each."""
    if target != "sm_90":
        return {}
    table = tables.CANDIDATES if slots is None else tables.CANDIDATES_FEW
    found = [c for c in table.get((kernel, width), ()) if c.is_for(triton.__version__)]
    if slots is None:
        return {c.config: c.predicted for c in found}
    return {
        c.config._replace(block_slots=slots): min(c.predicted, int(tables.FEW_BY_MEMORY * slots))
        for c in found
        if slots <= c.config.block_slots
    }


def neighbours(own: tables.AttentionConfig) -> list[tables.AttentionConfig]:
    """The table's own configuration, and those one step away. The compiler refuses some."""
    stages = (own.num_stages - 1, own.num_stages + 1, own.num_stages + 2)
    found = [own, *(own._replace(num_stages=count) for count in stages if count >= 1)]
    limits = (("block_slots", 16, 256), ("block_tokens", 16, 256), ("num_warps", 4, 16))
    for name, low, high in limits:
        size = getattr(own, name)
        found += [own._replace(**{name: n}) for n in (size // 2, 2 * size) if low <= n <= high]
    return found


def _by_config(function: str, run: Callable[[], tuple[Tensor, ...]]) -> Call:
    """The call by a configuration, in place of what this function of the tables gives.

    Launches are remembered as they are outside, for each configuration apart.
    """
    layouts: dict[Config, dict] = {}

    def under(config: Config) -> list[Tensor]:
        if config in layouts:
            # the process is this measurement's alone
            launch._layouts = layouts[config]
            return [tensor for tensor in run() if tensor.numel()]
        launch._layouts = {}
        with mock.patch.object(tables, function, lambda *_, **__: config):
            results = [tensor for tensor in run() if tensor.numel()]
        layouts[config] = launch._layouts
        return results

    return under


def _attention(
    device: str, kernel: str, width: int, slots: int | None, batch: int, tokens: int
) -> Call:
    """Those of the backward run after the delta pass."""
    torch.manual_seed(0)
    # the interpreter has float16 alone of 16 bits, and one head is enough for it
    heads, dtype = (1, torch.float16) if device == "cpu" else (_WIDTH // width, torch.bfloat16)
    dout, *inputs = (
        torch.randn(batch, rows, heads, width, device=device, dtype=dtype)
        for rows in (tokens, tokens, slots or tokens, slots or tokens)
    )
    inputs += [None, None]
    options = (True, 0, width**-0.5, None, 0.0)
    # below the layer that rewords Triton's errors
    run = functools.partial(memory_attention.memory_attention_forward, *inputs, *options)
    if kernel != "forward":
        wanted = (kernel == "dquery", kernel == "dkey_value")
        backward = memory_attention.memory_attention_backward
        run = functools.partial(backward, dout, *inputs, *run(), *options, *wanted)
    return _by_config(f"attention_{kernel}", run)


def _norm(device: str, name: str, width: int, batch: int, tokens: int) -> Call:
    """The backward of a LayerNorm, one of the contract's."""
    torch.manual_seed(0)
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    dout, x, residual, *more = (
        torch.randn(batch, tokens, width, device=device, dtype=dtype) for _ in range(5)
    )
    weight = torch.ones(width, device=device)
    forward, backward = (
        getattr(residual_layer_norm, f"{name}_{way}") for way in ("forward", "backward")
    )
    _, mean, rstd, *_ = forward(x, residual, weight, weight, 1e-5)
    # what comes back beside a norm
    rest = {NORM: (True,), NORM_AND_TANH: more, NORM_OF_RELU: ()}[name]
    inputs = (dout, x, residual, weight, mean, rstd, *rest, True)
    return _by_config("residual_layer_norm", functools.partial(backward, *inputs))


def _time(
    call: Callable[[int, int], Call],
    device: str,
    batch: int,
    own: Config,
    config: Config,
    flops: float,
    predicted: int | None,
    end: float,
) -> dict:
    """``flops``: of a batch entry."""
    run = call(batch, _tokens(device))
    pairs = [(g.double(), w.double()) for g, w in zip(run(config), run(own), strict=True)]
    error = max(float((got - want).norm() / want.norm()) for got, want in pairs)
    # kernels differ by half an ulp or so, wrong ones by far more; NaN is no less than anything
    agrees = error <= 2 * torch.finfo(torch.bfloat16).eps
    calls = {"table": functools.partial(run, own), "candidate": functools.partial(run, config)}
    rows = {name: Row(one, ()) for name, one in calls.items()}
    times = measure.measure(rows, "forward", (), device, 0.0 if device == "cpu" else 0.3)
    speedup = measure.ratio(times["table"], times["candidate"])
    spent = statistics.median(times["candidate"])
    line = f"{1e6 * spent:.1f} us, {speedup:.3f} x the table"
    # with the other kernels of the pass: of the attention's backward the delta pass
    tflops = 1e-12 * batch * flops / spent
    line += f", {tflops:.0f} TFLOP/s" if flops else ""
    line += "" if predicted is None else f" of {predicted} predicted"
    line += "" if agrees else f", WRONG: error {error:.2g}"
    # a wrong candidate is no fault of the package's
    found = {"line": line, "agrees": agrees}
    found |= {"speedup": speedup, "seconds": spent, "config": config._asdict()}
    return found | {"tflops": tflops, "predicted": predicted}


def _tokens(device: str) -> int:
    return 32 if device == "cpu" else _TOKENS
