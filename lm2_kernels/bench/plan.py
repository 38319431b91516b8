"""What a model of a configuration takes, before anything is run: :func:`plan`.

The model itself runs, on tensors that have shapes, dtypes and nothing else (PyTorch's fake
tensors), so that what is counted is what a run does: parameters, floating-point operations, bytes
kept for backward, the state of a text. No time is measured; bounds follow from ceilings.
"""

import contextlib
import dataclasses
import functools
import inspect
import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lm2_kernels import backends, operators
from lm2_kernels.backends import eager
from lm2_kernels.backends.contract import OPTIONAL, RESULTS
from lm2_kernels.bench.pairs import seen_pairs
from lm2_kernels.checks import check_int
from lm2_kernels.layers.base import MemoryLayer
from lm2_kernels.model.config import LM2Config
from lm2_kernels.model.decoder import MLP, LM2ForCausalLM, SelfAttention

__all__ = ["CEILINGS", "Ceiling", "Part", "Plan", "plan"]

# the parts of a model, in the order of a table
SELF_ATTENTION, MEMORY, MLPS, LOSS = "self-attention", "memory", "MLP", "logits and loss"
REST = "embedding, norms, residuals"
_KINDS = {SelfAttention: SELF_ATTENTION, MemoryLayer: MEMORY, MLP: MLPS}
# float32 weights, their gradients, and the two averages of AdamW
_STATES = {"weights": 1, "gradients": 1, "optimizer": 2}
_DTYPES = (torch.float32, torch.bfloat16)
_LARGEST = 2**31 - 1
# products over the pairs of a token and what it sees
_FORWARD, _BACKWARD = 2, 5
_PRODUCTS = {"memory_attention_forward": _FORWARD, "memory_attention_backward": _BACKWARD}


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """What a device can do at most, by its maker's data sheet.

    Args:
        flops: of dense products a second, by the dtype of the operands ("float32" without tensor
            cores).
        bandwidth: bytes of memory a second.
        memory: bytes, at most.
    """

    flops: dict[str, float]
    bandwidth: float
    memory: float


# dense figures of NVIDIA's data sheets (SXM, 80 GB); nothing here was measured
CEILINGS = {
    "a100": Ceiling({"float32": 19.5e12, "bfloat16": 312e12}, 2.039e12, 80 * 2**30),
    "h100": Ceiling({"float32": 67e12, "bfloat16": 989e12}, 3.35e12, 80 * 2**30),
    "h200": Ceiling({"float32": 67e12, "bfloat16": 989e12}, 4.8e12, 141 * 2**30),
}


@dataclasses.dataclass
class Part:
    """A part of a model.

    Args:
        parameters: that it has; what is shared counts once.
        forward, backward: floating-point operations of matrix products and attention; of pairs of a
            token and a slot that it does not see, none.
        kept: bytes that autograd keeps of its forward pass.
    """

    parameters: int = 0
    forward: float = 0.0
    backward: float = 0.0
    kept: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a model takes.

    Args:
        parts: by their names, of a training step.
        batch, tokens, dtype: of the step.
        training: bytes of memory by what they are of; results on their way are not in it.
        decode_flops: of a segment's last token, of every row; None if the model cannot go on within
            a segment.
        decoding: bytes of memory by what they are of, before that token.
        decode_read: bytes that the token reads.
    """

    parts: dict[str, Part]
    batch: int
    tokens: int
    dtype: str
    training: dict[str, int]
    decode_flops: float | None
    decoding: dict[str, int]
    decode_read: int

    def total(self, name: str) -> float:
        """Of all parts: "parameters", "forward", "backward" or "kept"."""
        return sum(getattr(part, name) for part in self.parts.values())

    def seconds(self, ceiling: Ceiling) -> dict[str, float | None]:
        """The least time of a training step and of a segment's last token.

        Operations at the ceiling of products, or bytes through memory, whichever takes longer: of
        the step weights, gradients, averages and what is kept, once in and once out; of the token
        what it reads.
        """
        rate = ceiling.flops[self.dtype]
        flops = self.total("forward") + self.total("backward")
        step = max(flops / rate, 2 * sum(self.training.values()) / ceiling.bandwidth)
        token = None
        if self.decode_flops is not None:
            token = max(self.decode_flops / rate, self.decode_read / ceiling.bandwidth)
        return {"training step": step, "last token": token}


def plan(config: LM2Config, *, batch: int, tokens: int, dtype: torch.dtype = torch.float32) -> Plan:
    """What a model of a configuration takes.

    Args:
        config: of the model.
        batch: rows.
        tokens: of a row, in a training step.
        dtype: bfloat16 is autocast in training, and of the weights in decoding.

    Raises:
        TypeError, ValueError: a number does not fit, or the dtype.
    """
    for name, value in (("batch", batch), ("tokens", tokens)):
        check_int("plan", name, value, 1, _LARGEST)
    if dtype not in _DTYPES:
        raise ValueError(f"plan: dtype must be one of {_DTYPES}, got {dtype}")
    parts = {name: Part() for name in (REST, SELF_ATTENTION, MEMORY, MLPS, LOSS)}
    shapes = _Shapes()
    try:
        with backends.register(shapes.name, shapes), _surroundings():
            model = LM2ForCausalLM(dataclasses.replace(config, backend=shapes.name))
            _cast(model, torch.float32)
            _count_parameters(model, parts)
            ids = torch.zeros(batch, tokens, dtype=torch.int64)
            _count_step(model, ids, dtype, parts, shapes)
            _cast(model.requires_grad_(False), dtype)
            decode_flops, state = _count_token(model, batch, shapes)
    except RuntimeError as error:
        # sizes that no tensor has
        raise ValueError(f"plan: too large: {str(error).splitlines()[0]}") from None
    weights = sum(part.parameters for part in parts.values())
    training = {name: 4 * count * weights for name, count in _STATES.items()}
    training["kept for backward"] = sum(part.kept for part in parts.values())
    decoding = {"weights": dtype.itemsize * weights, **state}
    # of an embedding that is no head a token reads its own row
    unread = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    read = decoding["weights"] - dtype.itemsize * unread + decoding["within a segment"]
    name = str(dtype).removeprefix("torch.")
    return Plan(parts, batch, tokens, name, training, decode_flops, decoding, read)


@contextlib.contextmanager
def _surroundings() -> Iterator[None]:
    """Fake tensors, and nothing of what the caller has set."""
    # imports torch._dynamo, which importing the package does not wait for
    from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: PLC0415

    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
        FakeTensorMode(),
    ):
        yield


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """As ``model.to``, which cannot cast fake tensors in place."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                needs_grad = parameter.requires_grad
                module._parameters[name] = nn.Parameter(parameter.detach().to(dtype), needs_grad)


def _part_of(module: nn.Module) -> str | None:
    return next((name for kind, name in _KINDS.items() if isinstance(module, kind)), None)


def _count_parameters(model: nn.Module, parts: dict[str, Part]) -> None:
    counted: set[Tensor] = set()
    for module in model.modules():
        name = LOSS if module is model.lm_head else _part_of(module)
        for parameter in [] if name is None else module.parameters():
            if parameter not in counted:
                counted.add(parameter)
                parts[name].parameters += parameter.numel()
    parts[REST].parameters = sum(p.numel() for p in model.parameters() if p not in counted)


def _count_step(
    model: LM2ForCausalLM,
    ids: Tensor,
    dtype: torch.dtype,
    parts: dict[str, Part],
    shapes: "_Shapes",
) -> None:
    """Operations and kept bytes of a training step, part by part."""
    where, before, counter = [REST], 0.0, None
    known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    # alive together, so that no two have one address
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            alive.append(tensor)
            parts[where[-1]].kept += storage.nbytes()
        return tensor

    def settle() -> None:
        # what was counted since the last border is of the part that the work is in
        nonlocal before
        now = 0.0 if counter is None else counter.get_total_flops()
        parts[where[-1]].forward += now - before
        before = now

    def enter(module: nn.Module, *_: object) -> None:
        settle()
        where.append(_part_of(module))

    def leave(*_: object) -> None:
        settle()
        where.pop()

    handles = []
    for module in model.modules():
        if _part_of(module) is not None:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)

    def forward() -> Tensor:
        with autocast:
            hidden, _ = model.read(ids, keep=False)
            settle()
            where.append(LOSS)
            loss = model.loss(hidden, ids)
            settle()
        where.pop()
        return loss

    # by itself, as who counts operators has the layers made of ops
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    counter = FlopCounterMode(display=False)
    shapes.taken()
    with counter:
        loss = forward()
    for handle in handles:
        handle.remove()
    with FlopCounterMode(display=False) as backward:
        attention = shapes.taken()
        loss.backward()
    # a product has two in backward; logits are computed again there; and the memory has the rest:
    # some have one, where the bank is no parameter, and what is recomputed three
    for name, times in ((REST, 2), (SELF_ATTENTION, 2), (MLPS, 2), (LOSS, 3)):
        parts[name].backward = times * parts[name].forward
    rest = sum(part.backward for part in parts.values())
    parts[MEMORY].backward = backward.get_total_flops() - rest + shapes.taken()
    parts[MEMORY].forward += attention
    pairs = ids.shape[0] * _pairs(model.config, ids.shape[1])
    parts[SELF_ATTENTION].forward += _FORWARD * pairs
    parts[SELF_ATTENTION].backward += _BACKWARD * pairs


def _pairs(config: LM2Config, tokens: int) -> float:
    """FLOPs of one product of a row's self-attentions: a token sees its segment's up to itself."""
    whole, rest = divmod(tokens, config.segment_length)
    sizes = ((whole, config.segment_length), (1, rest))
    seen = sum(number * seen_pairs(size, size, 0) for number, size in sizes)
    return 2.0 * config.num_hidden_layers * config.hidden_size * seen


def _count_token(
    model: LM2ForCausalLM, batch: int, shapes: "_Shapes"
) -> tuple[float | None, dict[str, int]]:
    """Operations of the last token of a segment, and bytes of the state that it finds."""
    config = model.config
    ids = torch.zeros(batch, config.segment_length, dtype=torch.int64)
    with torch.no_grad():
        state = model.initial_state(batch, ids.device)
        banks = sum(bank.nbytes for bank in state.banks)
        try:
            model.check_streaming()
        except ValueError:
            # what it could go on with does not exist
            return None, {"banks": banks, "within a segment": 0}
        if config.segment_length > 1:
            _, state = model.read(ids[:, 1:], state)
        shapes.taken()
        with FlopCounterMode(display=False) as counter:
            hidden, _ = model.read(ids[:, :1], state)
            model.logits(hidden)
    seen = config.num_hidden_layers * config.hidden_size * config.segment_length
    flops = counter.get_total_flops() + shapes.taken() + _FORWARD * 2.0 * batch * seen
    return flops, {"banks": banks, "within a segment": state.nbytes - banks}


class _Shapes:
    """A backend whose results have shapes and nothing else, and which counts what it would do.

    For the thread that made it alone: what others compute is theirs.
    """

    DEVICES = None

    def __init__(self):
        self.name = f"shapes_{id(self)}"
        self._thread = threading.get_ident()
        self._flops = 0.0
        # with the optional ones, as the backends that layers are trained with
        for function in (*RESULTS, *OPTIONAL):
            if function in _PRODUCTS:
                setattr(self, function, functools.partial(self._attention, function))
            else:
                setattr(self, function, operators.shapes(function))

    def unsupported_reason(self, op: str, *tensors: Tensor) -> str | None:
        """See :mod:`lm2_kernels.backends.contract`."""
        return None if threading.get_ident() == self._thread else "it is another thread's plan"

    def _attention(self, function: str, *args: Any) -> tuple[Tensor, ...]:
        given = inspect.signature(getattr(eager, function)).bind(*args).arguments
        (batch, tokens, *heads), slots = given["query"].shape, given["key"].shape[1]
        first = given["slot_offset"] if given["causal"] else None
        pairs = seen_pairs(tokens, slots, first)
        self._flops += _PRODUCTS[function] * 2.0 * batch * math.prod(heads) * pairs
        return operators.shapes(function)(*args)

    def taken(self) -> float:
        """FLOPs of attentions since the last call."""
        flops, self._flops = self._flops, 0.0
        return flops
