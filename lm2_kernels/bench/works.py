"""The works that are benchmarked, and for each the rows: everything that can do it.

A work is a computation at one shape in one dtype. Its rows share inputs and weights, and
each is held to the float64 oracle before it is timed.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm2_kernels import backends, functional, reference, testing
from lm2_kernels.backends import cpu_products
from lm2_kernels.bench.pairs import seen_pairs
from lm2_kernels.bench.peers import (
    SDPA_KERNELS,
    ReleasedStyleMemory,
    SdpaPaperMemory,
    SdpaReleaseMemory,
    sdpa,
    sdpa_options,
)
from lm2_kernels.functional import initial_memory
from lm2_kernels.layers.paper import PaperMemory
from lm2_kernels.layers.release import ReleaseMemory
from lm2_kernels.model.config import LM2Config
from lm2_kernels.model.decoder import LM2ForCausalLM
from lm2_kernels.testing.cases import Shape

PASSES = ("forward", "backward", "both")
ORACLE = "oracle"
RELEASED = "released way"
SDPA_OP = "SDPA"
SDPA = "eager + SDPA"
# which torch does not choose by itself where it is the fastest
SDPA_CUDNN = "eager + SDPA cudnn"
NO_CACHE = "no cache"
TORCH_NORM = "torch layer_norm"
# of our first backend: less memory for more time
RECOMPUTE = "recompute"
# the matrix products by the best library and our attention, alone: what a layer cannot go below
LIMIT = "limit"
# torch.compile of a row, by its mode
_COMPILED = {"compiled": None, "max-autotune": "max-autotune"}
_ON_GPUS_ALONE = ("SDPA efficient", "SDPA cudnn", "max-autotune")
DROPOUT = "attention dropout 0.9"  # the released model's, in training

# beside the backends
_OTHER_ROWS = (
    RECOMPUTE,
    *(
        name
        for row in (ORACLE, RELEASED, SDPA, SDPA_CUDNN)
        for name in (row, *(f"{row}, {how}" for how in _COMPILED))
    ),
    *(*SDPA_KERNELS, TORCH_NORM, NO_CACHE, LIMIT),
)

# bytes of the scores that an oracle may hold at once
_MAX_SCORES = 2**30

Outputs = tuple[Tensor, ...]


class Row(NamedTuple):
    """One way to do a work."""

    forward: Callable[[], Outputs]
    leaves: Sequence[Tensor]  # whose gradients are taken, x and memory first
    is_ours: bool = False
    # a limit computes no result to compare, a peer with dropout one of its own
    is_checked: bool = True
    # of the limit, which is no differentiable function: the products and attention of backward
    backward: Callable[[Outputs], object] | None = None
    # of a row whose calls go on from one another: back to the first
    restart: Callable[[], object] | None = None


@dataclasses.dataclass
class Work:
    """One computation with all its rows."""

    name: str
    shape: Shape
    dtype: torch.dtype
    device: str
    rows: dict[str, Callable[[], Row]]  # made when asked for: compiling takes long
    passes: tuple[str, ...]
    # by pass; 0 where they are not counted
    flops: dict[str, float]  # causal ones counted half
    bytes: dict[str, float]  # that must move: inputs and outputs once
    oracle: Callable[[], Row] | None = None  # in float64
    cotangents: Outputs = ()

    @property
    def id(self) -> str:
        return f"{self.name} {self.shape.name} {dtype_name(self.dtype)}"


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` as "float32"."""
    return str(dtype).removeprefix("torch.")


def row_names() -> tuple[str, ...]:
    """Every row that some work has."""
    return (*backends.NAMES, *_OTHER_ROWS)


def our_backends(device: str) -> tuple[str, ...]:
    """The backends that can run float32 tensors on this device, best first."""
    x = torch.empty(1, 1, 1, 16, device=device)
    found = []
    for name in backends.NAMES:
        if name == "triton" and device == "cpu":
            continue  # an interpreter is for tests
        if backends.unsupported_reason(name, "memory_attention", x, x, x) is None:
            found.append(name)
    return tuple(found)


# --- ops ---------------------------------------------------------------------------------------


def _op(op: str, shape: Shape, dtype: torch.dtype, device: str, dropout_p: float = 0.0) -> Work:
    """An op through the public function, as the layers call it."""
    case = next(case for case in shape.cases() if case.op == op)
    if dropout_p:
        case = case._replace(options=(*case.options, ("dropout_p", dropout_p)))
    inputs = testing.make_inputs(case, dtype, device)

    def row(function: Callable, inputs=inputs, is_checked=True, **options) -> Row:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs.tensors.values()]

        def forward() -> Outputs:
            named = dict(zip(inputs.tensors, leaves, strict=True))
            outputs = function(**named, **inputs.constants, **options)
            return outputs if isinstance(outputs, tuple) else (outputs,)

        return Row(forward, leaves, is_ours=bool(options), is_checked=is_checked)

    def oracle() -> Row:
        tensors = {name: tensor.double() for name, tensor in inputs.tensors.items()}
        function = getattr(reference, op)
        scores = 8 * shape.batch * shape.heads * shape.tokens * shape.slots
        if dropout_p or scores > _MAX_SCORES:
            # which is proven against the equations, holds a block of scores at a time, and drops
            # what the other backends do
            function = functools.partial(getattr(functional, op), backend="eager")
        return row(function, inputs._replace(tensors=tensors))

    rows = {
        name: functools.partial(row, getattr(functional, op), backend=name)
        for name in our_backends(device)
    }
    if not dropout_p:
        rows[ORACLE] = functools.partial(row, getattr(reference, op))
        rows |= _compiled(ORACLE, lambda wrap: row(wrap(getattr(reference, op))), device)
    if op == "memory_attention":
        rows |= _sdpa_rows(row, shape, device, dropout_p)
    elif op == "residual_layer_norm":

        def torch_norm(x, residual, weight, bias):
            return F.layer_norm(x + residual, weight.shape, weight, bias)

        rows[TORCH_NORM] = functools.partial(row, torch_norm)
    flops = _attention_flops(shape) if op == "memory_attention" else dict.fromkeys(PASSES, 0.0)
    cotangents = inputs.cotangents
    sizes = {name: tensor.nbytes for name, tensor in inputs.tensors.items()}
    read = sum(sizes.values())
    forward = read + sum(tensor.nbytes for tensor in cotangents)
    # backward reads inputs and cotangents and writes a gradient of each input, but for what is a
    # cotangent itself (of hidden, which is not read either) or another's (of residual, x's)
    backward = forward + read - 2 * sizes.get("hidden", 0) - sizes.get("residual", 0)
    traffic = {"forward": forward, "backward": backward, "both": forward + backward}
    name = DROPOUT if dropout_p else op
    return Work(name, shape, dtype, device, rows, PASSES, flops, traffic, oracle, cotangents)


def _sdpa_rows(
    row: Callable[..., Row], shape: Shape, device: str, dropout_p: float
) -> dict[str, Callable[[], Row]]:
    # the mask is made once, as somebody would who calls it often
    options = {}
    if shape.tokens_per_slot == 1:
        options = sdpa_options(shape.tokens, shape.slots, shape.slot_offset, torch.device(device))

    def forced(name: str) -> Row:
        def function(query, key, value, causal=True, slot_offset=0, dropout_p=0.0):
            return sdpa(query, key, value, SDPA_KERNELS[name], dropout_p=dropout_p, **options)

        # theirs drop what their own random numbers say
        return row(function, is_checked=not dropout_p)

    return {
        name: functools.partial(forced, name)
        for name in SDPA_KERNELS
        if device == "cuda" or name not in _ON_GPUS_ALONE
    }


def _compiled(
    name: str, make: Callable[[Callable], Row], device: str
) -> dict[str, Callable[[], Row]]:
    """Rows of torch.compile; ``make`` gets what wraps the function."""

    def row(mode: str | None) -> Row:
        return make(functools.partial(torch.compile, mode=mode, dynamic=False))

    return {
        f"{name}, {how}": functools.partial(row, mode)
        for how, mode in _COMPILED.items()
        if device == "cuda" or how not in _ON_GPUS_ALONE
    }


def _autocast(
    device: str, dtype: torch.dtype, wide: bool
) -> contextlib.AbstractContextManager[object]:
    """16 bits as users run them; nothing for float32, nor for the oracle in float64."""
    if wide or dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device, dtype)


# --- layers ------------------------------------------------------------------------------------


def _layer(formulation: str, shape: Shape, dtype: torch.dtype, device: str) -> Work:
    """A whole memory layer; below float32 as users run it, under autocast from float32 weights."""
    is_paper, c = formulation == "paper", shape.tokens_per_slot
    ours = PaperMemory if is_paper else ReleaseMemory
    if c > 1:
        ours = functools.partial(ours, write="chunk", tokens_per_slot=c)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(shape.dim)
        layer = ours(shape.dim, shape.heads)
        if not is_paper:
            _keep_from_kinks(layer)
        state = layer.state_dict()
        x = torch.randn(shape.batch, shape.tokens, shape.dim).to(device, dtype)
        memory = 0.3 * torch.randn(shape.batch, shape.slots, shape.dim)
        cotangents = tuple(torch.randn_like(tensor.float()) for tensor in (x.cpu(), memory))
    memory = (memory + initial_memory(shape.batch, shape.slots, shape.dim)).to(device, dtype)
    cotangents = tuple(tensor.to(device, dtype) for tensor in cotangents)
    offset = shape.slot_offset

    def row(layer: nn.Module, function: Callable | None = None, *, ours=False, wide=False) -> Row:
        layer.load_state_dict(state)
        layer.to(device, torch.float64 if wide else None)
        inputs = [t.detach().to(torch.float64 if wide else t.dtype) for t in (x, memory)]
        leaves = [tensor.requires_grad_() for tensor in inputs]
        function = layer if function is None else function

        def forward() -> Outputs:
            # whole segments alone are what the released way can do
            options = {"slot_offset": offset} if offset else {}
            with _autocast(device, dtype, wide):
                return function(*leaves, **options)

        # modules define their parameters in orders of their own
        named = dict(layer.named_parameters())
        return Row(forward, [*leaves, *(named[key] for key in sorted(named))], is_ours=ours)

    def oracle_row(wrap: Callable = lambda function: function, wide: bool = False) -> Row:
        layer = ours(shape.dim, shape.heads)
        # shared weights too, each under all its names
        parameters = dict(layer.named_parameters(remove_duplicate=False))
        call = reference.paper_memory if is_paper else reference.release_memory

        def function(x: Tensor, memory: Tensor, slot_offset: int = 0) -> Outputs:
            options = {"causal": False, "tokens_per_slot": c} if c > 1 else {}
            options |= {"num_heads": shape.heads, "slot_offset": slot_offset}
            return call(x, memory, parameters, **options)[:2]

        made = row(layer, wrap(function), wide=wide)
        # moving a layer may replace its parameters
        parameters.update(layer.named_parameters(remove_duplicate=False))
        return made

    def peer_rows(kind: Callable[..., nn.Module], name: str) -> dict[str, Callable[[], Row]]:
        def peer(wrap: Callable = lambda layer: layer) -> Row:
            layer = kind(shape.dim, shape.heads)
            return row(layer, wrap(layer))

        return {name: peer} | _compiled(name, peer, device)

    rows = {
        name: functools.partial(
            lambda name: row(ours(shape.dim, shape.heads, backend=name), ours=True), name
        )
        for name in our_backends(device)
    }
    best = our_backends(device)[0]
    rows[RECOMPUTE] = lambda: row(
        ours(shape.dim, shape.heads, backend=best, recompute=True), ours=True
    )
    rows[ORACLE] = oracle_row
    rows |= _compiled(ORACLE, oracle_row, device)
    if is_paper or shape.slot_offset == 0:
        if not is_paper and c == 1:
            rows |= peer_rows(ReleasedStyleMemory, RELEASED)
        kind = SdpaPaperMemory if is_paper else SdpaReleaseMemory
        peer = functools.partial(kind, tokens_per_slot=c)
        rows |= peer_rows(peer, SDPA)
        if device == "cuda":
            cudnn = functools.partial(peer, kernel=SDPA_KERNELS["SDPA cudnn"])
            rows |= peer_rows(cudnn, SDPA_CUDNN)
    products_of = _paper_products if is_paper else _release_products
    rows[LIMIT] = lambda: _limit(products_of(shape), shape, dtype, device)
    flops = _attention_flops(shape)
    matmul = sum(2.0 * math.prod(sizes) for sizes in products_of(shape))
    for name, times in (("forward", 1), ("backward", 2), ("both", 3)):
        flops[name] += times * matmul
    # the layer's own: a state dict has shared weights twice
    weights = sum(weight.nbytes for weight in ours(shape.dim, shape.heads).parameters())
    activations = x.nbytes + memory.nbytes
    traffic = {"forward": weights + 2 * activations, "backward": 2 * weights + 3 * activations}
    traffic["both"] = traffic["forward"] + traffic["backward"]
    name = f"{formulation} layer"
    oracle = functools.partial(oracle_row, wide=True)
    return Work(name, shape, dtype, device, rows, PASSES, flops, traffic, oracle, cotangents)


def _keep_from_kinks(layer: ReleaseMemory) -> None:
    """Have no ReLU of the MLP near 0, where float32 may take the other side than the oracle: of
    millions a few would, and their tokens' gradients differ by far more than round-off. Half of
    the units are on at every token, half off.
    """
    linear = layer.attention_mlp[0]
    with torch.no_grad():
        linear.weight *= 0.1
        linear.bias[0::2] = 1.0
        linear.bias[1::2] = -1.0


def _paper_products(shape: Shape) -> list[tuple[int, int, int]]:
    """(rows, inner, columns) of each matrix product of the forward pass."""
    tokens, seen, dim = shape.batch * shape.tokens, _seen(shape), shape.dim
    return [(tokens, dim, 2 * dim), (seen, dim, 2 * dim), (tokens, dim, 2 * dim)]


def _release_products(shape: Shape) -> list[tuple[int, int, int]]:
    tokens, seen, dim = shape.batch * shape.tokens, _seen(shape), shape.dim
    rows = tokens // shape.tokens_per_slot
    square = (tokens, dim, dim)
    return [square, (seen, dim, 2 * dim), square, square, (rows, dim, 2 * dim)]


def _seen(shape: Shape) -> int:
    """The slots that some token sees, of all batch entries."""
    return shape.batch * min(shape.slots, shape.slot_offset + shape.tokens)


def _limit(sizes: list[tuple[int, int, int]], shape: Shape, dtype: torch.dtype, device: str) -> Row:
    """The layer's matrix products by the best library, and its attention, one after the other."""
    operands = []
    for rows, inner, columns in sizes:
        x = torch.randn(rows, inner, device=device, dtype=dtype)
        weight = torch.randn(columns, inner, device=device, dtype=dtype)
        operands.append((x, weight, torch.randn(rows, columns, device=device, dtype=dtype)))
    attention = _op("memory_attention", shape, dtype, device)
    best = attention.rows[our_backends(device)[0]]()

    @torch.no_grad()
    def multiply(backward: bool) -> None:
        for x, weight, dy in operands:
            if not backward:
                cpu_products.product(x, weight.t())
                continue
            cpu_products.product(dy, weight)
            cpu_products.product(dy.t(), x)

    def forward() -> Outputs:
        multiply(backward=False)
        return best.forward()

    def backward(outputs: Outputs) -> None:
        multiply(backward=True)
        torch.autograd.grad(outputs, best.leaves, attention.cotangents)

    return Row(forward, best.leaves, is_checked=False, backward=backward)


# --- the model ---------------------------------------------------------------------------------

MODEL = {"vocab_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8}


def _model(shape: Shape, device: str, **options: object) -> LM2ForCausalLM:
    config = LM2Config(
        hidden_size=shape.dim,
        intermediate_size=4 * shape.dim,
        memory_slots=shape.slots,
        segment_length=shape.tokens,
        memory_heads=shape.heads,
        # as the peers have it
        candidate="read",
        **MODEL,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LM2ForCausalLM(config)
    # 16 bits are autocast
    return model.to(device, torch.float32)


def _released_model(shape: Shape, device: str, **options) -> LM2ForCausalLM:
    model = _model(shape, device, **options)
    for block in model.model.layers:
        layer = ReleasedStyleMemory(shape.dim, shape.heads)
        layer.load_state_dict(block.memory.state_dict())
        block.memory = layer.to(device)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = _TorchLinear
    return model


class _TorchLinear(nn.Linear):
    """What the model leaves to PyTorch, as it would an ``nn.Linear`` that somebody replaced."""


def _model_work(name: str, shape: Shape, dtype: torch.dtype, device: str) -> Work:
    """The reference model with four blocks: a training step (loss, backward) or a prefill."""
    options = {"formulation": "release", "pooled_gate": "segment"}
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(MODEL["vocab_size"], (shape.batch, shape.tokens), generator=generator)
    ids = ids.to(device)
    is_training = name == "training step"

    def row(make: Callable[[], LM2ForCausalLM], *, ours=False, wide=False) -> Row:
        model = make()
        model = model.double() if wide else model

        def forward() -> Outputs:
            with _autocast(device, dtype, wide):
                output = model(ids, labels=ids if is_training else None)
            return (output.loss,) if is_training else (output.logits[:, -1],)

        named = dict(model.named_parameters())
        return Row(forward, [named[key] for key in sorted(named)], is_ours=ours)

    def ours_by(backend: str | None) -> Callable[[], LM2ForCausalLM]:
        return functools.partial(_model, shape, device, backend=backend, **options)

    rows = {
        backend: functools.partial(row, ours_by(backend), ours=True)
        for backend in our_backends(device)
    }
    released = functools.partial(_released_model, shape, device, **options)
    rows[RELEASED] = functools.partial(row, released)
    oracle = functools.partial(row, released, wide=True)
    passes = ("both",) if is_training else ("forward",)
    flops, none = _model_flops(shape), dict.fromkeys(PASSES, 0.0)
    one = (torch.ones((), device=device),) if is_training else ()
    return Work(name, shape, dtype, device, rows, passes, flops, none, oracle, one)


def _model_flops(shape: Shape) -> dict[str, float]:
    blocks = MODEL["num_hidden_layers"]
    # a block's attention has four square products, its MLP three that are four times as wide
    weights = blocks * (4 + 3 * 4) * shape.dim**2 + MODEL["vocab_size"] * shape.dim
    memory = blocks * sum(math.prod(sizes) for sizes in _release_products(shape))
    matmul = 2.0 * (shape.batch * shape.tokens * weights + memory)
    # of the tokens to one another and to the memory, which are as many
    attention = _attention_flops(shape)
    return {
        name: times * matmul + 2 * blocks * attention[name]
        for name, times in (("forward", 1), ("backward", 2), ("both", 3))
    }


def _decode_step(shape: Shape, dtype: torch.dtype, device: str) -> Work:
    """The next token in the middle of a segment: by the caches, or reading the segment again."""
    past = shape.tokens // 2
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(MODEL["vocab_size"], (shape.batch, past + 1), generator=generator)
    ids = ids.to(device)

    def row(backend: str | None, *, cached: bool, wide: bool = False) -> Row:
        model = _model(shape, device, backend=backend).eval()
        model = model.double() if wide else model
        with torch.no_grad(), _autocast(device, dtype, wide):
            states = [model(ids[:, :-1], use_cache=True).memory] if cached else []

        def forward() -> Outputs:
            with _autocast(device, dtype, wide):
                if not cached:
                    return (model(ids).logits[:, -1],)
                output = model(ids[:, -1:], memory=states[-1], use_cache=True)
            # the next call goes on: a second one from one state would copy the caches. At the
            # segment's end back to its middle, which is one copy in many steps
            states[1:] = [output.memory] if output.memory.position[0] < shape.tokens - 1 else []
            return (output.logits[:, -1],)

        def restart() -> None:
            states[1:] = []

        return Row(forward, (), is_ours=cached, restart=restart)

    names = our_backends(device)
    rows = {name: functools.partial(row, name, cached=True) for name in names}
    rows[NO_CACHE] = functools.partial(row, names[0], cached=False)
    oracle = functools.partial(row, "eager", cached=False, wide=True)
    none = dict.fromkeys(PASSES, 0.0)
    return Work("decode step", shape, dtype, device, rows, ("forward",), none, none, oracle)


# --- all ---------------------------------------------------------------------------------------

_OPS = ("memory_attention", "memory_update", "residual_layer_norm")

WORKS: dict[str, Callable[[Shape, torch.dtype, str], Work]] = {
    **{op: functools.partial(_op, op) for op in _OPS},
    DROPOUT: functools.partial(_op, "memory_attention", dropout_p=0.9),
    "paper layer": functools.partial(_layer, "paper"),
    "release layer": functools.partial(_layer, "release"),
    "training step": functools.partial(_model_work, "training step"),
    "prefill": functools.partial(_model_work, "prefill"),
    "decode step": _decode_step,
}


def fits(name: str, shape: Shape) -> bool:
    """Whether a work makes sense at a shape."""
    if name in (*_OPS, DROPOUT):
        return True
    if name in ("training step", "prefill", "decode step"):
        return shape.tokens == shape.slots
    # a layer writes a slot for every token, or for so many
    return shape.tokens <= shape.slots or shape.tokens % shape.slots == 0


def _attention_flops(shape: Shape) -> dict[str, float]:
    """Two products forward, five backward, over the pairs of a token and a slot that it sees."""
    offset = None if shape.tokens_per_slot > 1 else shape.slot_offset
    product = 2.0 * shape.batch * shape.dim * seen_pairs(shape.tokens, shape.slots, offset)
    return {"forward": 2 * product, "backward": 5 * product, "both": 7 * product}
