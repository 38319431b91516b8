"""What both memory layers share: options, checks of inputs, reading and writing."""

import functools
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lm2_kernels import backends, unchecked
from lm2_kernels.backends import (
    autocast_dtype,
    check_choice,
    computed_dtype,
    requested_backend,
    select,
    use_backend,
)
from lm2_kernels.backends.contract import accumulation_dtype
from lm2_kernels.checks import (
    DTYPES,
    check_bool,
    check_dropout,
    check_dtypes,
    check_int,
    check_nonempty,
    check_scale,
    check_shape,
    check_slot_mask,
    check_tensors,
    go_together,
)
from lm2_kernels.chunks import num_rows
from lm2_kernels.layers import function, in_cpp
from lm2_kernels.linear import apply_linear
from lm2_kernels.machine import keep_freed_pages
from lm2_kernels.plain import (
    ORDINARY,
    calls_are_plain,
    is_ordinary,
    ops_are_watched,
    plain_parameters,
)
from lm2_kernels.state.cache import SegmentCache, write_rows

# what layers were called with -> what their Functions are, or None where one is made of ops
_known: dict[tuple, function.Options | None] = {}
# so many at most: lengths and offsets may be any
_MOST_KNOWN = 1024


class MemoryLayer(nn.Module):
    """What both layers share: their options, the checks of their inputs, reading and writing."""

    OPS: tuple[str, ...] = ()
    FUNCTION: type[function.LayerFunction]

    # layers that were pickled when there was nothing else have none of their own
    tokens_per_slot: int = 1
    candidate: str = "read"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool | None,
        scale: float | None,
        top_k: int | None,
        dropout: float,
        write: str,
        tokens_per_slot: int,
        candidate: str,
        recompute: bool,
        backend: str | None,
    ):
        super().__init__()
        op = type(self).__name__
        check_int(op, "dim", dim, 1)
        check_int(op, "num_heads", num_heads, 1)
        if dim % num_heads:
            raise ValueError(f"{op}: num_heads ({num_heads}) must divide dim ({dim})")
        check_bool(op, "recompute", recompute)
        if backend is not None:
            check_choice(backend)
        self.dim = dim
        self.num_heads = num_heads
        # whether tokens must not see the slots of later ones
        self.causal = default_causal(write) if causal is None else causal
        self.scale = scale
        self.top_k = top_k
        self.dropout = dropout
        self.write = write
        self.tokens_per_slot = tokens_per_slot
        self.candidate = candidate
        self.recompute = recompute
        self.backend = backend

    def _check_options(self) -> None:
        """What the ops are given besides tensors; anybody may have changed it since the start."""
        op = type(self).__name__
        if self.top_k is not None:
            check_int(op, "top_k", self.top_k, 1)
        if self.scale is not None:
            check_scale(op, self.scale)
        check_bool(op, "causal", self.causal)
        check_dropout(op, self.dropout)
        check_write(op, self.write, self.tokens_per_slot, self.causal, self.candidate)

    def extra_repr(self) -> str:
        options = {
            "causal": (self.causal, default_causal(self.write)),
            "write": (self.write, "position"),
            "tokens_per_slot": (self.tokens_per_slot, 1),
            "candidate": (self.candidate, "read"),
            "scale": (self.scale, None),
            "top_k": (self.top_k, None),
            "dropout": (self.dropout, 0.0),
            "recompute": (self.recompute, False),
            "backend": (self.backend, None),
        }
        text = f"dim={self.dim}, num_heads={self.num_heads}"
        for name, (value, default) in options.items():
            if value != default:
                text += f", {name}={value!r}"
        return text

    def _check(self, x: Tensor, memory: Tensor, slot_offset: int, slot_mask: Tensor | None) -> None:
        op = type(self).__name__
        self._check_tensors(x, memory)
        check_nonempty(op, "memory", memory, {"slots N": 1})
        num_tokens, num_slots = x.shape[1], memory.shape[1]
        check_int(op, "slot_offset", slot_offset, 0)
        if slot_offset + num_rows(num_tokens, self.tokens_per_slot) > num_slots:
            c = "" if self.tokens_per_slot == 1 else f" / {self.tokens_per_slot}"
            most = "N" if self.tokens_per_slot == 1 else f"{self.tokens_per_slot} N"
            raise ValueError(
                f"{op}: slot_offset + T{c} must be at most N = {num_slots}, got {slot_offset} + "
                f"{num_tokens}{c}; feed longer inputs in segments of at most {most} tokens, "
                f"carrying the memory over"
            )
        if self.top_k is not None and self.top_k > num_slots:
            raise ValueError(f"{op}: top_k must be between 1 and N = {num_slots}, got {self.top_k}")
        if slot_mask is not None:
            check_slot_mask(op, slot_mask, x.shape[0], num_slots, x.device)

    def _check_piece(
        self,
        x: Tensor,
        memory: Tensor,
        cache: SegmentCache,
        slot_offset: int,
        slot_mask: Tensor | None,
    ) -> None:
        op = type(self).__name__
        self._check_tensors(x, memory)
        if x.shape[1] != cache.num_tokens:
            raise ValueError(f"{op}: the cache is for {cache.num_tokens} tokens, got {x.shape[1]}")
        for name in ("causal", "tokens_per_slot"):
            if getattr(self, name) != getattr(cache, name):
                raise ValueError(
                    f"{op}: the layer has {name}={getattr(self, name)}, the cache "
                    f"{getattr(cache, name)}; ask MemoryState.piece for the layer's"
                )
        if self.causal:
            check_shape(op, "memory (with a cache, the rows)", memory, "(B, T, D)", tuple(x.shape))
        else:
            needed, there = num_rows(cache.size, self.tokens_per_slot), memory.shape[1]
            if needed > there:
                raise ValueError(
                    f"{op}: a segment of {cache.size} tokens wants at least {needed} slots, memory "
                    f"has {there}"
                )
            if self.top_k is not None and self.top_k > there:
                raise ValueError(f"{op}: top_k must be between 1 and N = {there}, got {self.top_k}")
        if slot_offset != 0 or slot_mask is not None:
            raise ValueError(f"{op}: a piece with a cache takes no slot_offset and no slot_mask")

    def _parts(self) -> tuple[tuple[Tensor | None, ...], tuple[object, ...]] | None:
        """Parameters in the order in which :attr:`FUNCTION` takes them, and the options that the
        other layer has not; None if a part is not plain, given that calls are.
        """
        raise NotImplementedError

    def _fits(self, parameters: tuple[Tensor | None, ...], x: Tensor) -> bool:
        """Whether the Function takes parameters of these shapes and dtypes."""
        raise NotImplementedError

    def _more_options(
        self, x: Tensor, memory: Tensor, slot_offset: int, *more_inputs: Tensor | None
    ) -> object:
        """What :class:`function.Options` has as ``more``, the other inputs checked."""
        raise NotImplementedError

    def _more_backends(self, more: object) -> tuple[str, ...]:
        """Of the ops that the other layer has not."""
        return ()

    def _as_one(
        self,
        x: Tensor,
        memory: Tensor,
        slot_mask: Tensor | None,
        slot_offset: int,
        *more_inputs: Tensor | None,
        cache: SegmentCache | None = None,
    ) -> tuple[Tensor, ...] | None:
        """The layer as one Function, where every part of it is plain; else None.

        A piece with a cache is one if it is a whole segment: its memory is what it reads, and of
        that the rows come back that it writes.

        What was called before with these options, and tensors of these shapes, dtypes and devices,
        is not checked again.
        """
        piece = None
        if cache is not None:
            if cache.is_open or cache.lengths is not None or slot_offset or slot_mask is not None:
                return None
            piece = cache.num_tokens, cache.causal, cache.tokens_per_slot
        if (
            torch.compiler.is_compiling()
            or not calls_are_plain()
            # whoever counts or transforms ops knows them by their names
            or ops_are_watched()
            or torch._C._are_functorch_transforms_active()
            or torch._C._get_tracing_state() is not None
            or getattr(forward_ad, "_current_level", 0) >= 0
        ):
            return None
        inputs = (x, memory, slot_mask, *more_inputs)
        for tensor in inputs:
            if tensor is not None and (not is_ordinary(tensor) or tensor.is_nested):
                return None
        parts = self._parts() if _is_as_written(type(self)) else None
        if parts is None:
            return None
        parameters, more = parts
        tensors = (*inputs, *parameters)
        values = (
            slot_offset,
            self.num_heads,
            self.causal,
            self.scale,
            self.top_k,
            self.dropout,
            self.training,
            self.write,
            self.tokens_per_slot,
            self.candidate,
            self.recompute,
            requested_backend() if self.backend is None else self.backend,
            *more,
        )
        key = (
            type(self),
            piece,
            values,
            # True is not 1 to the checks
            tuple(map(type, values)),
            autocast_dtype(x.device.type),
            backends.revision,
            tuple([None if t is None else (t.shape, t.dtype, t.device) for t in tensors]),
        )
        try:
            options = _known.get(key, _known)
        except TypeError:
            # an option that cannot be one, as the checks will say
            return None
        if options is _known:
            if len(_known) >= _MOST_KNOWN:
                _known.clear()
            if cache is None:
                self._check(x, memory, slot_offset, slot_mask)
            else:
                self._check_piece(x, memory, cache, slot_offset, slot_mask)
            options = self._options(
                parameters, x, memory, slot_offset, *more_inputs, gives_rows=cache is not None
            )
            _known[key] = options
            if x.device.type == "cpu":
                keep_freed_pages()
        if options is None:
            return None
        seed = unchecked.draw_seed(x.device) if options.read.dropout > 0.0 else None
        return self.FUNCTION.of(options, x, memory, slot_mask, seed, *more_inputs, *parameters)

    def _options(
        self,
        parameters: tuple[Tensor | None, ...],
        x: Tensor,
        memory: Tensor,
        slot_offset: int,
        *more_inputs: Tensor | None,
        gives_rows: bool,
    ) -> function.Options | None:
        """What the layer's Function is called with, inputs that were checked; None where the
        parameters do not fit: of what happens then the layer made of ops knows.
        """
        same_device = all(p is None or p.device == x.device for p in parameters)
        if not same_device or not self._fits(parameters, x):
            return None
        more = self._more_options(x, memory, slot_offset, *more_inputs)
        batch, num_tokens, _ = x.shape
        num_slots, dtype = memory.shape[1], computed_dtype(x)
        num_seen = slot_offset + num_tokens if self.causal else num_slots
        heads = (self.num_heads, self.dim // self.num_heads)
        query = x.new_empty(batch, num_tokens, *heads, dtype=dtype)
        key = x.new_empty(batch, num_seen, *heads, dtype=dtype)
        rows = memory[:, : num_rows(num_tokens, self.tokens_per_slot)]
        read = function.Read(
            num_heads=self.num_heads,
            num_slots=num_slots,
            causal=self.causal,
            slot_offset=slot_offset,
            scale=unchecked.default_scale(query) if self.scale is None else float(self.scale),
            # of fewer slots all are kept
            top_k=None if self.top_k is None or self.top_k >= num_seen else self.top_k,
            dropout=float(self.dropout) if self.training else 0.0,
            backend=select("memory_attention", (query, key, key), self.backend),
        )
        update = select("memory_update", (x, query.flatten(-2), rows), self.backend)
        is_cast = any(t is not None and t.dtype != dtype for t in (x, memory, *parameters))
        names = (read.backend, update, *self._more_backends(more))
        may_be_one_call = (
            not is_cast
            and self.tokens_per_slot == 1
            # of others a part is seen, which has gaps
            and (num_seen == num_slots or batch == 1)
            and in_cpp.is_possible(x.device.type, dtype, names)
        )
        return function.Options(
            layer=type(self).__name__,
            read=read,
            tokens_per_slot=self.tokens_per_slot,
            dtype=dtype,
            is_cast=is_cast,
            recompute=self.recompute,
            gives_rows=gives_rows,
            update=update,
            backends=names,
            in_cpp=may_be_one_call,
            more=more,
        )

    def _linear_fits(self, weight: Tensor, bias: Tensor | None, x: Tensor, width: int) -> bool:
        """Whether a Linear to this width computes in the dtype of x."""
        shape, dtype = (width, self.dim), computed_dtype(x)
        is_cast = autocast_dtype(x.device.type) is not None
        return all(
            p.shape == wanted and (p.dtype == dtype or (is_cast and go_together(dtype, p.dtype)))
            for p, wanted in ((weight, shape), (bias, shape[:1]))
            if p is not None
        )

    def any_parameter(self) -> Tensor | None:
        """A parameter whose dtype and device stand for the layer's; None if it has none.

        Not one that a module in a projection's place computes with in its own way: what it makes of
        its input is checked, its weights are its own affair.
        """
        weight = self.query_proj.weight if isinstance(self.query_proj, nn.Linear) else None
        if _is_computed_with(weight):
            return weight
        return ordinary_parameter(self)

    def _check_tensors(self, x: Tensor, memory: Tensor) -> None:
        op = type(self).__name__
        self._check_options()
        weight = self.any_parameter()
        if weight is None:
            weight = x
        check_tensors(op, x=x, memory=memory)
        if weight.device != x.device and plain_parameters(self.query_proj, nn.Linear):
            # not offloaded: nobody moves them when the projection is called
            check_tensors(op, x=x, memory=memory, parameters=weight)
        check_shape(op, "x", x, "(B, T, D)", (None, None, self.dim))
        check_shape(op, "memory", memory, "(B, N, D)", (x.shape[0], None, self.dim))
        check_nonempty(op, "x", x, {"tokens T": 1})
        if (self.backend or requested_backend()) != "auto":
            # "auto" always finds one. Judged by what autocast makes of x, in which attention and
            # update run, and by which a reason against a dtype is the layer's
            computed = x.new_empty((0, self.dim), dtype=computed_dtype(x))
            for name in self.OPS:
                select(name, (computed,), self.backend)
        autocast = autocast_dtype(x.device.type)
        if autocast is not None and weight.dtype != torch.float64:
            allowed = (torch.float32, autocast)
            for name, tensor in (("x", x), ("memory", memory)):
                if tensor.dtype not in allowed:
                    raise TypeError(
                        f"{op}: {name} is {tensor.dtype}, but under autocast it must be one of "
                        f"{allowed}; cast it"
                    )
            return
        if x.dtype != weight.dtype:
            raise TypeError(
                f"{op}: x is {x.dtype} but the parameters are {weight.dtype}; cast one or use "
                f"torch.autocast"
            )
        if memory.dtype not in (x.dtype, torch.float32) or (
            memory.dtype == torch.float32 and x.dtype == torch.float64
        ):
            raise TypeError(
                f"{op}: memory must be {x.dtype}, the dtype of x, or float32 beside a 16-bit x, "
                f"got {memory.dtype}"
            )

    def _run(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        tensors: tuple[Tensor | None, ...],
        place: "int | SegmentCache",
    ) -> tuple[Tensor, ...]:
        """``function(*tensors, place)``; with ``recompute``, which keeps the tensors alone.

        Args:
            function: computes the layer.
            tensors: all that it reads besides the layer's parameters.
            place: the slot that row 0 is bound to, or the piece's cache.
        """
        # a second run would extend an open cache again; a closed one neither has nor keeps anything
        is_open = isinstance(place, SegmentCache) and place.is_open
        if not self.recompute or is_open or not torch.is_grad_enabled():
            return function(*tensors, place)
        parameters = tuple(self.parameters())
        if not any(t is not None and t.requires_grad for t in (*tensors, *parameters)):
            return function(*tensors, place)
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling and torch._C._are_functorch_transforms_active():
            # torch.func.grad and the like take no checkpoints: all is kept, for the same gradients
            return function(*tensors, place)
        # imports torch._dynamo, which importing the package does not wait for
        from torch.utils.checkpoint import checkpoint  # noqa: PLC0415

        modules = list(self.modules())
        # dropout, ours or that of an adapter in a submodule's place, draws the same masks again
        options = {
            "use_reentrant": False,
            "preserve_rng_state": any(module.training for module in modules),
        }
        if is_compiling:
            return checkpoint(function, *tensors, place, **options)
        backend = requested_backend()
        held = [(module, dict(module._parameters), dict(module._buffers)) for module in modules]
        # as inputs: autograd then notices if they change before backward
        values = {t: None for _, *dicts in held for d in dicts for t in d.values() if t is not None}

        def again(*inputs: Tensor | None) -> tuple[Tensor, ...]:
            # backward may run outside of the caller's use_backend, and of a functional_call
            with use_backend(backend):
                return function.__func__(_as_held(self, held), *inputs[: len(tensors)], place)

        return checkpoint(again, *tensors, *values, **options)

    def _operand(self, tensor: Tensor, x: Tensor) -> Tensor:
        """A float32 memory as a matrix operand beside a 16-bit x (autocast does it itself)."""
        if autocast_dtype(x.device.type) is not None:
            return tensor
        return tensor.to(x.dtype)

    def _reader(self, memory: Tensor, x: Tensor, cache: SegmentCache) -> "Reader":
        """Where a piece reads."""
        if self.causal:
            return PieceReader(self, cache)
        return ConstantReader(self, memory, cache)

    def _piece_rows(self, memory: Tensor, cache: SegmentCache) -> Tensor:
        """The rows that a piece's tokens are bound to, (B, R, D)."""
        return memory if self.causal else cache.rows_of(memory)

    def _attention_cache(self, num_blocks: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the keys and values that are kept within a segment."""
        names = [f"{kind}{block}" for block in range(num_blocks) for kind in ("key", "value")]
        names = names if self.causal else map(SegmentCache.constant_name, names)
        return dict.fromkeys(names, (self.num_heads, self.dim // self.num_heads))

    def _candidate(self, read: Tensor, x: Tensor) -> Tensor:
        """What is written, before the tanh. (B, T, D)"""
        if self.candidate == "read":
            return read
        if "candidate_proj" not in self._modules:
            raise ValueError(
                f"{type(self).__name__}: candidate='token' needs a candidate_proj, which a layer "
                f"has that was made with it"
            )
        return read + self._project("candidate_proj", x, self.candidate_proj)

    def _project(self, name: str, x: Tensor, layer: nn.Module, *, relu: bool = False) -> Tensor:
        """A projection of x to the layer's width; see :func:`project`."""
        return project(f"{type(self).__name__}.{name}", x, layer, self.dim, relu=relu)

    def _heads(self, tensor: Tensor) -> Tensor:
        return tensor.view(*tensor.shape[:-1], self.num_heads, self.dim // self.num_heads)

    def _attention(
        self,
        query: Tensor,  # (B, T, D)
        key: Tensor,  # (B, N, H, K)
        value: Tensor,  # (B, N, H, K)
        causal: bool,
        slot_offset: int,
        slot_mask: Tensor | None,
    ) -> Tensor:
        """Memory attention of projected queries. (B, T, D)"""
        read = unchecked.memory_attention(
            self._heads(query),
            key,
            value,
            causal=causal,
            slot_offset=slot_offset,
            slot_mask=slot_mask,
            scale=self.scale,
            # of fewer slots all are kept
            top_k=None if self.top_k is None or self.top_k >= key.shape[1] else self.top_k,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return read.flatten(-2)


@functools.cache
def _is_as_written(kind: type[MemoryLayer]) -> bool:
    """Whether a layer's class, or the one of ours that it extends, computes what its Function does.

    Somebody's own may change how the layer is made of ops, by the methods that do it.
    """
    own = [c for c in kind.__mro__ if not c.__module__.startswith(f"{__package__}.")]
    ours = next(c for c in kind.__mro__ if c not in own)
    return not any(
        hasattr(ours, name) and name.startswith("_") and not name.startswith("__")
        for c in own[: own.index(nn.Module)]
        for name in vars(c)
    )


def default_causal(write: str) -> bool:
    """What ``causal=None`` is."""
    return write == "position"


def check_write(op: str, write: str, tokens_per_slot: int, causal: bool, candidate: str) -> None:
    """Raise unless the options of what is written, and what is seen, go together."""
    for name, value, choices in (
        ("write", write, ("position", "chunk")),
        ("candidate", candidate, ("read", "token")),
    ):
        if value not in choices:
            raise ValueError(f"{op}: {name} must be one of {choices}, got {value!r}")
    check_int(op, "tokens_per_slot", tokens_per_slot, 1)
    if write == "position" and tokens_per_slot != 1:
        raise ValueError(
            f"{op}: write='position' binds one token to a slot, got tokens_per_slot="
            f"{tokens_per_slot}; for several take write='chunk'"
        )
    if write == "chunk" and causal:
        raise ValueError(
            f"{op}: write='chunk' takes causal=False or None (of a model: memory_causal=False), "
            f"got True: every token sees every slot, as the segment found them, which says nothing "
            f"of later tokens"
        )


def unrounded(rows: Tensor) -> Tensor:
    """Rows in the dtype that proposals are summed up in."""
    return rows.to(accumulation_dtype(rows))


def shallow_copy(
    module: nn.Module, parameters: dict[str, Tensor | None], buffers: dict[str, Tensor | None]
) -> nn.Module:
    """A module that shares all with another but its parameters and buffers."""
    copied = object.__new__(type(module))
    copied.__dict__.update(module.__dict__, _parameters=parameters, _buffers=buffers)
    return copied


# of each module its parameters and buffers
_Held = list[tuple[nn.Module, dict[str, Tensor | None], dict[str, Tensor | None]]]


def _as_held(layer: MemoryLayer, held: _Held) -> MemoryLayer:
    """The layer with the tensors that it held: itself, or else a copy that shares all but those.

    Of what is sharded the sharding decides what there is, and sets plain attributes meanwhile.
    """
    if not any(
        name in now and now[name] is not tensor
        for module, *dicts in held
        for now, then in zip((module._parameters, module._buffers), dicts, strict=True)
        for name, tensor in then.items()
        if type(tensor) in ORDINARY and type(now.get(name)) in ORDINARY
    ):
        return layer
    copies: dict[nn.Module, nn.Module] = {}
    for module, parameters, buffers in held:
        copies[module] = shallow_copy(module, parameters, buffers)
    for copied in copies.values():
        own = {name: copies.get(child, child) for name, child in copied._modules.items()}
        copied.__dict__["_modules"] = own
    return copies[layer]


def project(op: str, x: Tensor, layer: nn.Module, width: int, *, relu: bool = False) -> Tensor:
    """``layer(x)``, or its ReLU, (B, T, width) in the dtype that x is computed in.

    The ops take it as it is: what a module that somebody put in a Linear's place, or hooked, made
    of x is checked here. ``op`` names the layer in errors.
    """
    dtype, device = computed_dtype(x), x.device
    for parameter in layer._parameters.values():
        if parameter is not None and (parameter.dtype != dtype or parameter.device != device):
            _check_parameters(op, x, layer, dtype)
    return check_result(op, apply_linear(x, layer, relu=relu), x, width, dtype)


def _check_parameters(op: str, x: Tensor, layer: nn.Module, dtype: torch.dtype) -> None:
    """Refuse a Linear of another dtype or device than x: called, other modules have their way."""
    is_cast = autocast_dtype(x.device.type) is not None
    weight, bias = plain_parameters(layer, nn.Linear) or (None, None)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_tensors(op, input=x, **{name: parameter})
            if not (is_cast and go_together(dtype, parameter.dtype)):
                check_dtypes(op, dtype, (), **{name: parameter})


def check_result(
    op: str, result: Tensor, x: Tensor, width: int, dtype: torch.dtype, *, is_cast: bool = False
) -> Tensor:
    """What a submodule made of x, (B, T, width) in ``dtype``; TypeError or ValueError if it is not.

    ``is_cast``: whether a result of another dtype that goes with ``dtype`` is cast to it, as it is
    under autocast.
    """
    shape = (*x.shape[:-1], width)
    if result.dtype == dtype and result.device == x.device and result.shape == shape:
        return result
    check_tensors(op, input=x, result=result)
    check_shape(op, "result", result, "(B, T, width)", shape)
    is_cast = is_cast or autocast_dtype(x.device.type) is not None
    if not is_cast or not go_together(dtype, result.dtype):
        check_dtypes(op, dtype, (), result=result)
    return result.to(dtype)


def ordinary_parameter(module: nn.Module) -> Tensor | None:
    """The first parameter in a dtype that the ops compute in; None if there is none."""
    return next(filter(_is_computed_with, module.parameters()), None)


def _is_computed_with(weight: object) -> bool:
    return isinstance(weight, Tensor) and weight.dtype in DTYPES and weight.layout == torch.strided


class Reader(Protocol):
    """Where a layer's queries read."""

    def read(self, query: Tensor, rows: Tensor, block: int) -> Tensor:
        """What the queries (B, T, D) of the round ``block`` read, (B, T, D).

        ``rows`` (B, T, D) are those that the tokens are bound to, as the rounds before left them.
        """


class BankReader:
    """Reads a whole bank."""

    def __init__(
        self,
        layer: MemoryLayer,
        bank: Tensor,  # (B, N, D)
        slot_offset: int,
        slot_mask: Tensor | None,  # (B, N)
    ):
        self._layer = layer
        self._bank = bank
        self._slot_offset = slot_offset
        self._slot_mask = slot_mask

    def read(self, query: Tensor, rows: Tensor, block: int) -> Tensor:
        """See :class:`Reader`."""
        layer, bank, slot_mask = self._layer, self._bank, self._slot_mask
        if block > 0:
            bank = write_rows(bank, rows, self._slot_offset)
        if layer.causal:
            # later slots are hidden from every token: no need to project them
            end = self._slot_offset + query.shape[1]
            bank = bank[:, :end]
            slot_mask = None if slot_mask is None else slot_mask[:, :end]
        if slot_mask is not None:
            # 0 * NaN is NaN in the gradients of the projections too
            bank = bank.masked_fill(~slot_mask[:, :, None], 0.0)
        bank = layer._operand(bank, query)
        key = layer._heads(layer._project("key_proj", bank, layer.key_proj))
        value = layer._heads(layer._project("value_proj", bank, layer.value_proj))
        return layer._attention(query, key, value, layer.causal, self._slot_offset, slot_mask)


class PieceReader:
    """Reads a piece's rows, and the segment's earlier ones by their cached keys and values."""

    def __init__(self, layer: MemoryLayer, cache: SegmentCache):
        self._layer = layer
        self._cache = cache

    def read(self, query: Tensor, rows: Tensor, block: int) -> Tensor:
        """See :class:`Reader`."""
        layer, cache = self._layer, self._cache
        operand = layer._operand(rows, query)
        key = layer._heads(layer._project("key_proj", operand, layer.key_proj))
        value = layer._heads(layer._project("value_proj", operand, layer.value_proj))
        key, value = cache.extend(f"key{block}", key), cache.extend(f"value{block}", value)
        if cache.start is None:
            visible = cache.visible(query.device)
            return layer._attention(query, key, value, False, 0, visible)
        return layer._attention(query, key, value, True, cache.start, None)


class ConstantReader:
    """Reads a whole bank, the same for all of a segment: its keys and values are projected once."""

    def __init__(self, layer: MemoryLayer, bank: Tensor, cache: SegmentCache):
        self._layer = layer
        self._bank = bank  # (B, N, D)
        self._cache = cache

    def read(self, query: Tensor, rows: Tensor, block: int) -> Tensor:
        """See :class:`Reader`."""
        layer, (batch, num_slots, dim) = self._layer, self._bank.shape
        shape = (batch, num_slots, layer.num_heads, dim // layer.num_heads)
        projections = {"key": layer.key_proj, "value": layer.value_proj}
        key, value = (
            self._cache.constant(
                f"{kind}{block}",
                functools.partial(self._projected, f"{kind}_proj", projection, query),
                query,
                shape,
            )
            for kind, projection in projections.items()
        )
        return layer._attention(query, key, value, False, 0, None)

    def _projected(
        self, name: str, projection: nn.Module, x: Tensor, rows: Tensor | None
    ) -> Tensor:
        """(B, N, H, K), of some batch rows alone if they are given."""
        layer, bank = self._layer, self._bank
        if rows is not None:
            bank = bank.index_select(0, rows)
        return layer._heads(layer._project(name, layer._operand(bank, x), projection))
