"""The cases that every backend is held to: ops, shapes, options, and their random inputs."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lm2_kernels import backends
from lm2_kernels.chunks import num_rows

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


class Case(NamedTuple):
    """One op at one shape with its options. Unused sizes are 0."""

    op: str
    batch: int
    tokens: int
    slots: int
    heads: int
    width: int  # of a head for memory_attention, of the model elsewhere
    options: tuple[tuple[str, object], ...] = ()

    def option(self, name: str, default=None):
        return dict(self.options).get(name, default)

    @property
    def id(self) -> str:
        sizes = f"B{self.batch}-T{self.tokens}"
        if self.op == "memory_attention":
            sizes += f"-N{self.slots}-H{self.heads}-K{self.width}"
        else:
            sizes += f"-D{self.width}"
        options = "".join(f"-{name}={value}" for name, value in self.options)
        return f"{self.op}-{sizes}{options}"


def _attention(batch, tokens, slots, heads, width, **options) -> Case:
    return Case("memory_attention", batch, tokens, slots, heads, width, tuple(options.items()))


def _update(batch, tokens, width, **options) -> Case:
    return Case("memory_update", batch, tokens, 0, 0, width, tuple(options.items()))


def _norm(batch, tokens, width, **options) -> Case:
    return Case("residual_layer_norm", batch, tokens, 0, 0, width, tuple(options.items()))


def _pool(batch, tokens, width, **options) -> Case:
    return Case("pooled_gate", batch, tokens, 0, 0, width, tuple(options.items()))


# small enough for an interpreter; together they use every option of every op
SMALL_CASES = (
    _attention(1, 1, 1, 1, 16),
    # a tiny tensor makes a noisy yardstick: the batch pools 18 heads
    _attention(6, 3, 24, 3, 8),
    _attention(2, 17, 17, 3, 16, slot_mask="random"),
    _attention(1, 33, 40, 2, 17, slot_offset=7),
    _attention(2, 20, 37, 2, 9, causal=False, scale=-0.3),
    _attention(2, 21, 10, 2, 16),
    _attention(3, 9, 20, 2, 16, slot_offset=18),
    _attention(1, 40, 19, 1, 65, slot_mask="prefix"),
    _attention(2, 18, 33, 2, 32, dropout_p=0.3, slot_offset=3),
    _attention(1, 9, 21, 2, 24, top_k=3),
    _attention(1, 5, 7, 1, 264),
    _update(2, 3, 24),
    _update(1, 17, 65, output_gate=True),
    _update(2, 5, 40, output_gate=True, output="memory", hidden="float32"),
    _update(2, 9, 33, gate_bias="segment", memory="float32"),
    _update(1, 6, 16, gate_bias="prefix", broadcast=True),
    _update(2, 5, 24, output_gate=True, read=True),
    _update(2, 13, 24, tokens_per_slot=5, output_gate=True, read=True),
    _update(3, 8, 17, tokens_per_slot=4, output_gate=True, output="memory", memory="float32"),
    _update(2, 7, 40, tokens_per_slot=3, gate_bias="prefix", gates="slots", hidden="float32"),
    _update(2, 4, 24, tokens_per_slot=9, gate_bias="segment"),
    _update(2, 8, 40, tokens_per_slot=3, gate_bias="segment", gates="slots"),
    _norm(2, 3, 24),
    _norm(1, 17, 65, residual="float32"),
    _norm(2, 33, 7, parameters="float32"),
    _pool(2, 3, 24),
    _pool(1, 67, 33),
    _pool(2, 70, 20, prefix=True),
    _pool(1, 5, 65, prefix=True, num_pooled=4),
)
# shapes of real use, cut to what a CPU runs in a second
LARGE_CASES = (
    _attention(3, 16, 64, 4, 16),
    _attention(1, 127, 127, 8, 16),
    _attention(1, 129, 160, 10, 16, slot_mask="random"),
    _attention(2, 100, 96, 6, 16, causal=False),
    _attention(1, 70, 130, 2, 65, slot_offset=60),
    _attention(1, 64, 96, 2, 128),
    _attention(1, 65, 80, 2, 256, slot_mask="prefix"),
    _attention(2, 33, 48, 3, 48, dropout_p=0.5),
    _attention(2, 64, 64, 4, 40, top_k=8, dropout_p=0.25),
    _attention(1, 300, 300, 2, 32),
    # few slots, whose gradients kernels may sum in parts of the tokens
    _attention(1, 600, 12, 2, 32, causal=False),
    _attention(1, 24, 40, 2, 384, top_k=5),
    # a few rows, which kernels may walk the slots for
    _attention(4, 1, 130, 8, 20),
    _attention(3, 4, 150, 4, 17, slot_mask="random", slot_offset=100),
    _attention(3, 3, 140, 4, 9, causal=False, top_k=70, dropout_p=0.3),
    _update(3, 127, 160),
    _update(2, 100, 515, output_gate=True),
    _update(2, 64, 256, gate_bias="segment", memory="float32"),
    _update(2, 250, 160, tokens_per_slot=32, output_gate=True, read=True),
    _update(1, 300, 257, tokens_per_slot=2, gate_bias="prefix", gates="slots"),
    # a row is a sum over so many tokens that the order of adding tells
    _update(2, 1300, 48, tokens_per_slot=1000, output_gate=True, output="memory", gates="slots"),
    _norm(2, 100, 515),
    _norm(1, 64, 2048, residual="float32"),
    _pool(2, 300, 260),
    _pool(3, 257, 130, prefix=True, num_pooled=11),
    # a sum over so many tokens that the order of adding tells
    _pool(1, 1024, 200),
)
CASES = SMALL_CASES + LARGE_CASES


class Shape(NamedTuple):
    """A memory layer at work, as the benchmarks measure it and the tests check it."""

    name: str
    batch: int
    tokens: int
    slots: int
    heads: int
    dim: int  # D, of all heads together
    source: str  # where the numbers come from

    @property
    def slot_offset(self) -> int:
        """Pieces of a segment are its last tokens."""
        return self.slots - self.tokens if self.tokens < self.slots else 0

    @property
    def tokens_per_slot(self) -> int:
        """Above 1 the layers write chunks, whose tokens see all slots."""
        return max(self.tokens // self.slots, 1)

    def cases(self) -> list[Case]:
        """Each op as the layers at this shape call it."""
        seen: dict[str, object] = {"slot_offset": self.slot_offset} if self.slot_offset else {}
        bound: dict[str, object] = {}
        if self.tokens_per_slot > 1:
            seen, bound = {"causal": False}, {"tokens_per_slot": self.tokens_per_slot}
        rows = (self.batch, self.tokens, self.dim)
        head_width = self.dim // self.heads
        attention = _attention(self.batch, self.tokens, self.slots, self.heads, head_width, **seen)
        update = _update(*rows, output_gate=True, **bound)
        return [attention, update, _norm(*rows), _pool(*rows)]


SHAPES = (
    Shape("256", 4, 256, 256, 8, 256, "a small model; batches give all sizes like work"),
    Shape("512", 2, 512, 512, 8, 512, "a small model"),
    Shape("1024", 1, 1024, 1024, 8, 1024, "a middling model"),
    Shape("2048", 1, 2048, 2048, 8, 2048, "the released model: slots and width, default heads"),
    *(
        Shape(f"{slots} of {tokens}", 2048 // tokens, tokens, slots, 8, 512, "chunks of tokens")
        for tokens in (512, 2048)
        for slots in (16, 64, 256)
    ),
    Shape("decode", 1, 1, 2048, 8, 2048, "one token of the released model's segment"),
    Shape("odd", 2, 300, 333, 3, 195, "no size is a multiple of anything"),
)
# what fills a GPU: benchmarks take them there, tests do not
GPU_SHAPES = (Shape("2048x8", 8, 2048, 2048, 8, 2048, "the released model's size, eight segments"),)
# what a call costs beside its tensors: measured where it is asked for
TINY = Shape("tiny", 1, 8, 8, 2, 16, "tensors that take no time")
ALL_SHAPES = (*SHAPES, *GPU_SHAPES, TINY)
SHAPE_CASES = tuple(dict.fromkeys(case for shape in SHAPES for case in shape.cases()))


class Inputs(NamedTuple):
    """A case's tensors: ``tensors`` take gradients, ``constants`` do not."""

    tensors: dict[str, Tensor]
    constants: dict[str, object]
    cotangents: tuple[Tensor, ...]


# draws a tensor of a shape, in the case's dtype or in the one that an option names
_Draw = Callable[..., Tensor]


def _attention_inputs(case: Case, draw: _Draw, generator: torch.Generator) -> Inputs:
    bank = (case.batch, case.slots, case.heads, case.width)
    read = (case.batch, case.tokens, case.heads, case.width)
    tensors = {"query": draw(*read), "key": draw(*bank), "value": draw(*bank)}
    cotangents = (draw(*read),)
    constants = {
        name: value for name, value in case.options if name not in ("slot_mask", "dropout_p")
    }
    device = tensors["query"].device
    if case.option("slot_mask") == "random":
        mask = torch.rand(case.batch, case.slots, generator=generator) < 0.5
        constants["slot_mask"] = mask.to(device)
    elif case.option("slot_mask") == "prefix":
        # the first tokens of a causal read see nothing at all
        mask = torch.arange(case.slots) >= case.slots // 3
        constants["slot_mask"] = mask.expand(case.batch, -1).to(device)
    if case.option("dropout_p"):
        constants["dropout_p"] = case.option("dropout_p")
    return Inputs(tensors, constants, cotangents)


def _update_inputs(case: Case, draw: _Draw, generator: torch.Generator) -> Inputs:
    batch, tokens, width = case.batch, case.tokens, case.width
    tokens_per_slot = case.option("tokens_per_slot", 1)
    rows = (batch, tokens, width)
    bank = (batch, num_rows(tokens, tokens_per_slot), width)
    gate = (batch, 1, width) if case.option("broadcast") else rows
    gate = bank if case.option("gates") == "slots" else gate
    tensors = {
        "hidden": draw(*rows, like=case.option("hidden")),
        "candidate": draw(*rows),
        "memory": draw(*bank, like=case.option("memory")),
        "input_gate": draw(*gate),
        "forget_gate": draw(*(bank if case.option("gates") == "slots" else rows)),
    }
    constants: dict[str, object] = {}
    if tokens_per_slot > 1:
        constants["tokens_per_slot"] = tokens_per_slot
    if case.option("output_gate"):
        tensors["output_gate"] = draw(*gate)
        constants["output"] = case.option("output", "read")
    if case.option("read"):
        tensors["read"] = draw(*rows)
    if case.option("gate_bias"):
        biased = tokens if case.option("gate_bias") == "prefix" else 1
        tensors["gate_bias"] = draw(batch, biased, 2 * width)
    cotangents = (
        draw(*rows, like=case.option("hidden")),
        draw(*bank, like=case.option("memory")),
    )
    return Inputs(tensors, constants, cotangents)


def _layer_norm_inputs(case: Case, draw: _Draw, generator: torch.Generator) -> Inputs:
    rows = (case.batch, case.tokens, case.width)
    tensors = {
        "x": draw(*rows),
        "residual": draw(*rows, like=case.option("residual")),
        "weight": draw(case.width, like=case.option("parameters")),
        "bias": draw(case.width, like=case.option("parameters")),
    }
    return Inputs(tensors, {}, (draw(*rows),))


def _pool_inputs(case: Case, draw: _Draw, generator: torch.Generator) -> Inputs:
    batch, tokens, width = case.batch, case.tokens, case.width
    prefix = bool(case.option("prefix"))
    tensors = {"x": draw(batch, tokens, width), "weight": draw(width)}
    constants: dict[str, object] = {"prefix": prefix}
    if case.option("num_pooled"):
        tensors["pooled_sum"] = draw(batch, width, like="float32")
        constants["num_pooled"] = case.option("num_pooled")
    cotangents = (
        draw(batch, tokens if prefix else 1, width),
        draw(batch, width, like="float32"),
    )
    return Inputs(tensors, constants, cotangents)


INPUTS = {
    "memory_attention": _attention_inputs,
    "memory_update": _update_inputs,
    "residual_layer_norm": _layer_norm_inputs,
    "pooled_gate": _pool_inputs,
}


Layout = Callable[[Tensor], Tensor]
# elements from which on a CPU thread's normal numbers take longer than a GPU's kernels
_LARGE = 2**18


def make_inputs(
    case: Case,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    seed: int = 0,
    scale: float = 1.0,
    layout: Layout | None = None,
) -> Inputs:
    """Random tensors of the case in ``dtype`` (or the dtypes its options name).

    ``layout`` maps each tensor and each cotangent to one of equal values and other strides. Large
    ones of a GPU are drawn there: other values than on a CPU, of the same distribution.
    """
    generator = torch.Generator().manual_seed(seed)
    on_gpu = torch.device(device).type == "cuda"
    large = torch.Generator(device).manual_seed(seed) if on_gpu else generator

    def draw(*shape: int, like: str | None = None) -> Tensor:
        wanted = dtype if like is None or dtype == torch.float64 else DTYPES[like]
        source = large if math.prod(shape) >= _LARGE else generator
        options = {"generator": source, "device": source.device, "dtype": torch.float64}
        tensor = torch.randn(shape, **options) * scale
        tensor = tensor.to(wanted).to(device)
        return tensor if layout is None else layout(tensor)

    return INPUTS[case.op](case, draw, generator)


def example_tensors(op: str, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """The tensors of the op's first case, to ask a backend about a dtype on a device."""
    case = next(case for case in SMALL_CASES if case.op == op)
    return tuple(make_inputs(case, dtype, device).tensors.values())


def unsupported_reason(name: str, op: str, dtype: torch.dtype, device: str) -> str | None:
    """Why a backend cannot run an op in a dtype on a device, or None if it can."""
    return backends.unsupported_reason(name, op, *example_tensors(op, dtype, device))
