"""The two memory layers as ``nn.Module``: projections and the ops of ``functional``, no maths of
their own. State goes in and comes out; nothing is hidden in a buffer, and nothing is detached.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor, nn

from lm2_kernels import functional
from lm2_kernels.backends import (
    OPS,
    autocast_dtype,
    check_choice,
    computed_dtype,
    requested_backend,
    select,
    use_backend,
)
from lm2_kernels.functional import (
    check_bool,
    check_dropout,
    check_eps,
    check_int,
    check_nonempty,
    check_scale,
    check_shape,
    check_slot_mask,
    check_tensors,
)
from lm2_kernels.projections import pack, project, split_columns
from lm2_kernels.state import SegmentCache, write_rows

__all__ = ["PaperMemory", "ReleaseMemory"]


# (queries (B, T, D), rows (B, T, D), number of the block) -> what the queries read (B, T, D)
_Read = Callable[[Tensor, Tensor, int], Tensor]


class _MemoryLayer(nn.Module):
    """What both layers share: their options, the checks of their inputs, reading and writing."""

    # names of Linear layers that read one input: each group is one matrix product
    PACKED: tuple[tuple[str, ...], ...] = ()
    OPS: tuple[str, ...] = ()

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool,
        scale: float | None,
        top_k: int | None,
        dropout: float,
        write: str,
        recompute: bool,
        backend: str | None,
    ):
        super().__init__()
        op = type(self).__name__
        check_int(op, "dim", dim, 1)
        check_int(op, "num_heads", num_heads, 1)
        if dim % num_heads:
            raise ValueError(f"{op}: num_heads ({num_heads}) must divide dim ({dim})")
        if top_k is not None:
            check_int(op, "top_k", top_k, 1)
        if scale is not None:
            check_scale(op, scale)
        check_bool(op, "causal", causal)
        check_dropout(op, dropout)
        check_bool(op, "recompute", recompute)
        if write != "position":
            raise ValueError(f"{op}: write must be 'position', got {write!r}")
        if backend is not None:
            check_choice(backend)
        self.dim = dim
        self.num_heads = num_heads
        self.causal = causal
        self.scale = scale
        self.top_k = top_k
        self.dropout = dropout
        self.write = write
        self.recompute = recompute
        self.backend = backend

    def _pack(self) -> None:
        for names in self.PACKED:
            pack(*(getattr(self, name) for name in names))

    def _apply(self, fn, recurse=True):
        # .to(), .cuda() and the like move parameters one by one
        super()._apply(fn, recurse)
        self._pack()
        return self

    def __setstate__(self, state):
        # copied or unpickled parameters lie apart
        super().__setstate__(state)
        self._pack()

    def extra_repr(self) -> str:
        options = {
            "causal": (self.causal, True),
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
        if slot_offset + num_tokens > num_slots:
            raise ValueError(
                f"{op}: slot_offset + T must be at most N = {num_slots}, got {slot_offset} + "
                f"{num_tokens}; feed longer inputs in segments of at most N tokens, carrying the "
                f"memory over"
            )
        if self.top_k is not None and self.top_k > num_slots:
            raise ValueError(f"{op}: top_k must be between 1 and N = {num_slots}, got {self.top_k}")
        if slot_mask is not None:
            check_slot_mask(op, slot_mask, x.shape[0], num_slots, x.device)

    def _check_piece(
        self,
        x: Tensor,
        rows: Tensor,
        cache: SegmentCache,
        slot_offset: int,
        slot_mask: Tensor | None,
    ) -> None:
        op = type(self).__name__
        self._check_tensors(x, rows)
        check_shape(op, "memory (with a cache, the rows)", rows, "(B, T, D)", tuple(x.shape))
        if x.shape[1] != cache.num_tokens:
            raise ValueError(f"{op}: the cache is for {cache.num_tokens} tokens, got {x.shape[1]}")
        if self.top_k is not None and self.top_k > cache.slots:
            raise ValueError(
                f"{op}: top_k must be between 1 and N = {cache.slots}, got {self.top_k}"
            )
        if slot_offset != 0 or slot_mask is not None:
            raise ValueError(f"{op}: a piece with a cache takes no slot_offset and no slot_mask")
        if not self.causal:
            raise ValueError(
                f"{op}: causal=False cannot stream: its tokens read slots that are not bound yet"
            )

    def _check_tensors(self, x: Tensor, memory: Tensor) -> None:
        op = type(self).__name__
        # any parameter will do: a projection may have been replaced by a module without weights
        weight = next(self.parameters())
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
        self, function: Callable[..., tuple[Tensor, ...]], cache: SegmentCache | None, *inputs
    ) -> tuple[Tensor, ...]:
        """``function(*inputs)``; with ``recompute``, keeping the inputs alone for backward.

        ``inputs`` are all tensors that the function reads besides the layer's parameters.
        """
        # a second run would extend an open cache again; a closed one neither has nor keeps anything
        is_open = cache is not None and cache.is_open
        if not self.recompute or is_open or not torch.is_grad_enabled():
            return function(*inputs)
        parameters = tuple(self.parameters())
        if not any(isinstance(t, Tensor) and t.requires_grad for t in (*inputs, *parameters)):
            return function(*inputs)
        # imports torch._dynamo, which importing the package does not wait for
        from torch.utils.checkpoint import checkpoint  # noqa: PLC0415

        options = {
            "use_reentrant": False,
            # the same dropout mask: its seed is drawn again
            "preserve_rng_state": self.training and self.dropout > 0.0,
        }
        if torch.compiler.is_compiling():
            return checkpoint(function, *inputs, **options)
        backend = requested_backend()

        def again(*tensors: Tensor | None) -> tuple[Tensor, ...]:
            own = tuple(parameter.data_ptr() for parameter in self.parameters())
            if own != tuple(tensor.data_ptr() for tensor in tensors[len(inputs) :]):
                raise RuntimeError(
                    f"{type(self).__name__}: with recompute=True, backward needs the parameters "
                    f"that forward had, but they were replaced; use recompute=False here"
                )
            # backward may run outside of the caller's use_backend
            with use_backend(backend):
                return function(*tensors[: len(inputs)])

        # the parameters as inputs: autograd then notices if they change before backward
        return checkpoint(again, *inputs, *parameters, **options)

    def _operand(self, tensor: Tensor, x: Tensor) -> Tensor:
        """A float32 memory as a matrix operand beside a 16-bit x (autocast does it itself)."""
        if autocast_dtype(x.device.type) is not None:
            return tensor
        return tensor.to(x.dtype)

    def _heads(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (self.num_heads, self.dim // self.num_heads))

    def _read_bank(
        self,
        query: Tensor,  # (B, T, D)
        rows: Tensor,  # (B, T, D)
        block: int,
        *,
        bank: Tensor,  # (B, N, D)
        slot_offset: int,
        slot_mask: Tensor | None,
    ) -> Tensor:
        """Read a whole bank, with the rows that the ``block`` blocks before have made. (B, T, D)"""
        if block > 0:
            bank = write_rows(bank, rows, slot_offset)
        if self.causal:
            # later slots are hidden from every token: no need to project them
            end = slot_offset + query.shape[1]
            bank = bank[:, :end]
            slot_mask = None if slot_mask is None else slot_mask[:, :end]
        if slot_mask is not None:
            # 0 * NaN is NaN in the gradients of the projections too
            bank = bank.masked_fill(~slot_mask[:, :, None], 0.0)
        key, value = project(bank, self.key_proj, self.value_proj)
        return self._attention(
            query, self._heads(key), self._heads(value), self.causal, slot_offset, slot_mask
        )

    def _read_cache(
        self, query: Tensor, rows: Tensor, block: int, *, cache: SegmentCache
    ) -> Tensor:
        """Read the piece's rows, and the earlier ones by their cached keys and values. (B, T, D)"""
        key, value = project(self._operand(rows, query), self.key_proj, self.value_proj)
        key = cache.extend(f"key{block}", self._heads(key))
        value = cache.extend(f"value{block}", self._heads(value))
        if cache.start is None:
            return self._attention(query, key, value, False, 0, cache.visible(query.device))
        return self._attention(query, key, value, True, cache.start, None)

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
        num_slots = key.shape[1]
        read = functional.memory_attention(
            self._heads(query),
            key,
            value,
            causal=causal,
            slot_offset=slot_offset,
            slot_mask=slot_mask,
            scale=self.scale,
            # of fewer slots all are kept
            top_k=None if self.top_k is None or self.top_k >= num_slots else self.top_k,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return read.flatten(-2)


class PaperMemory(_MemoryLayer):
    """The memory layer of the LM2 paper (arXiv 2502.06049, equations 1 to 6).

    With R the memory attention of ``x`` over ``memory`` and P the rows ``o .. o + T`` of memory::

        output = x + sigma(R Wout) * R
        M'[o : o+T] = sigma(x Win) * tanh(R) + sigma(R Wf) * P

    Row ``t`` of the segment is bound to slot ``o + t``. All tokens read the memory as it entered;
    with ``causal`` row ``t`` depends on tokens and slots ``<= t`` only, so a segment fed in pieces
    (``slot_offset`` advancing, each piece given the same incoming memory) gives what one pass
    gives. ``x`` is the block's self-attention output and ``output`` what the block adds to its
    residual stream.

    Parameters are ``query_proj``, ``key_proj``, ``value_proj``, ``output_gate_proj``,
    ``input_gate_proj``, ``forget_gate_proj``: ``nn.Linear(dim, dim)``.

    Args:
        dim: model width D.
        num_heads: memory heads H; must divide ``dim``.
        bias: whether the projections have a bias.
        causal: whether the slots of later tokens are hidden.
        scale: factor on the scores, ``1 / sqrt(dim / num_heads)`` unless given.
        top_k: keep only the k largest probabilities of each row.
        dropout: on the attention probabilities, while training.
        output: "read", or "memory" for equation 3 read literally: ``x + sigma(R Wout) * P``.
        write: which token writes which slot; "position" is the only rule so far.
        recompute: keep x and memory alone for backward, instead of about 9 tensors of their size
            (T = N), and compute the rest again there: the same gradients bit for bit, for a second
            forward pass. Options, ``training`` and parameters must then be in backward what they
            were in forward. A segment fed in pieces with ``cache``, which holds keys and values
            anyway, is not recomputed; one fed whole is.
        backend: force a backend for this layer; None takes the default (``use_backend``).
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of range.
    """

    OPS = ("memory_attention", "memory_update")
    PACKED = (
        ("query_proj", "input_gate_proj"),
        ("key_proj", "value_proj"),
        # in the order in which memory_update writes their gradients
        ("forget_gate_proj", "output_gate_proj"),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        bias: bool = False,
        causal: bool = True,
        scale: float | None = None,
        top_k: int | None = None,
        dropout: float = 0.0,
        output: str = "read",
        write: str = "position",
        recompute: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            dim,
            num_heads,
            causal=causal,
            scale=scale,
            top_k=top_k,
            dropout=dropout,
            write=write,
            recompute=recompute,
            backend=backend,
        )
        if output not in ("read", "memory"):
            raise ValueError(f"PaperMemory: output must be 'read' or 'memory', got {output!r}")
        self.output = output

        def projection() -> nn.Linear:
            return nn.Linear(dim, dim, bias=bias, device=device, dtype=dtype)

        self.query_proj = projection()
        self.key_proj = projection()
        self.value_proj = projection()
        self.output_gate_proj = projection()
        self.input_gate_proj = projection()
        self.forget_gate_proj = projection()
        self.reset_parameters()
        self._pack()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights and zero biases, as ``nn.MultiheadAttention`` starts."""
        for layer in self.children():
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        memory: Tensor,  # (B, N, D)
        *,
        slot_offset: int = 0,
        slot_mask: Tensor | None = None,  # (B, N)
        cache: SegmentCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Read and rewrite the memory.

        With ``cache``, which has the keys and values of the segment's earlier tokens, x is the
        segment's next piece and ``memory`` only the rows (B, T, D) that it is bound to, as the
        segment found them. Pieces one after the other give what one call gives for the segment from
        slot 0 on (:meth:`lm2_kernels.MemoryState.piece`).

        Args:
            x: (B, T, D).
            memory: (B, N, D) with ``slot_offset + T <= N``; may be float32 beside a 16-bit ``x``.
            slot_offset: the slot that row 0 is bound to; the cache knows its own.
            slot_mask: (B, N) bool, True = takes part in reading; not with ``cache``.
            cache: the piece's; it is extended.

        Returns:
            output (B, T, D) in ``x``'s dtype, new memory (B, N, D) in ``memory``'s dtype (with
            ``cache`` the new rows).

        Raises:
            TypeError, ValueError: an input does not fit; the text names it.
        """
        if cache is not None:
            self._check_piece(x, memory, cache, slot_offset, slot_mask)
            read = functools.partial(self._read_cache, cache=cache)
            return self._run(functools.partial(self._rewrite, read=read), cache, x, memory)
        self._check(x, memory, slot_offset, slot_mask)
        function = functools.partial(self._forward, slot_offset)
        return self._run(function, None, x, memory, slot_mask)

    if TYPE_CHECKING:
        # nn.Module's takes and returns Any
        def __call__(
            self,
            x: Tensor,
            memory: Tensor,
            *,
            slot_offset: int = 0,
            slot_mask: Tensor | None = None,
            cache: SegmentCache | None = None,
        ) -> tuple[Tensor, Tensor]: ...

    def _forward(
        self, slot_offset: int, x: Tensor, memory: Tensor, slot_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """:meth:`forward` without a cache, its inputs checked."""
        read = functools.partial(
            self._read_bank,
            bank=self._operand(memory, x),
            slot_offset=slot_offset,
            slot_mask=slot_mask,
        )
        rows = memory[:, slot_offset : slot_offset + x.shape[1]]
        output, new_rows = self._rewrite(x, rows, read)
        return output, write_rows(memory, new_rows, slot_offset)

    def cache_shapes(self) -> dict[str, tuple[int, ...]]:
        """What the layer keeps of a token in a cache: name -> shape."""
        heads = (self.num_heads, self.dim // self.num_heads)
        return {"key0": heads, "value0": heads}

    def _rewrite(self, x: Tensor, rows: Tensor, read: _Read) -> tuple[Tensor, Tensor]:
        query, input_gate = project(x, self.query_proj, self.input_gate_proj)
        candidate = read(query, rows, 0)
        forget_gate, output_gate = project(candidate, self.forget_gate_proj, self.output_gate_proj)
        return functional.memory_update(
            x,
            candidate,
            rows,
            input_gate,
            forget_gate,
            output_gate,
            output=self.output,
            backend=self.backend,
        )


class _GateProjector(nn.Module):
    """A Linear to both gates under the released module's names; ``w`` scales the pooled input."""

    def __init__(self, dim: int, *, scaled: bool, device=None, dtype=None):
        super().__init__()
        if scaled:
            self.w = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.linear = nn.Linear(dim, 2 * dim, device=device, dtype=dtype)


class ReleaseMemory(_MemoryLayer):
    """The memory layer that the LM2 authors' released code computes, at any shape.

    ``num_blocks`` times, from C = memory: with R the memory attention of ``x`` over C,
    ``C1 = LayerNorm1(C_P + R)``, ``h`` the ReLU MLP of ``C1`` (one shared Linear, applied
    ``attention_mlp_layers`` times), ``C_P <- LayerNorm2(C1 + h)``, where P are the rows
    ``o .. o + T``. Then, with sigma(input + b_in) and sigma(forget + b_f) as i and f::

        gates = Linear_in(mean_t relu(w * x)) + Linear_mem(tanh(P))      # [input | forget]
        M'[P] = i * tanh(C_P) + f * P,   output = x + M'[P]

    At T = N = D this is the released module exactly, and ``load_state_dict`` takes its state dict
    key for key (the shared Linear under both its names). **The released gate pools over the whole
    segment, so early tokens see later ones**; ``pooled_gate="prefix"`` is the causal repair with
    the same parameters, and the one to stream with (with a cache; without one at ``num_blocks=1``,
    as a second block reads rows that the first one rewrote, which later pieces of a segment
    lack).

    Our defaults differ from the released ones in two places: ``dropout`` is 0 (released: 0.9), and
    a token that sees no slot reads 0 (released: NaN).

    Args:
        dim: model width D.
        num_heads: memory heads H; must divide ``dim``.
        num_blocks: how often the memory is attended before it is written.
        attention_mlp_layers: applications of the shared MLP Linear in each block.
        pooled_gate: "segment" (released) or "prefix" (causal).
        causal: whether the slots of later tokens are hidden in the attention.
        scale: factor on the scores, ``1 / sqrt(dim / num_heads)`` unless given.
        top_k: keep only the k largest probabilities of each row.
        dropout: on the attention probabilities, while training.
        eps: of both LayerNorms.
        write: which token writes which slot; "position" is the only rule so far.
        recompute: keep x and memory alone for backward, instead of about 13 tensors of their size
            (T = N), and compute the rest again there: the same gradients bit for bit, for a second
            forward pass. Options, ``training`` and parameters must then be in backward what they
            were in forward. A segment fed in pieces with ``cache``, which holds keys and values
            anyway, is not recomputed; one fed whole is.
        backend: force a backend for this layer; None takes the default (``use_backend``).
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of range.
    """

    OPS = OPS
    PACKED = (("key_proj", "value_proj"),)

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_blocks: int = 1,
        attention_mlp_layers: int = 2,
        pooled_gate: str = "segment",
        causal: bool = True,
        scale: float | None = None,
        top_k: int | None = None,
        dropout: float = 0.0,
        eps: float = 1e-5,
        write: str = "position",
        recompute: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            dim,
            num_heads,
            causal=causal,
            scale=scale,
            top_k=top_k,
            dropout=dropout,
            write=write,
            recompute=recompute,
            backend=backend,
        )
        check_int("ReleaseMemory", "num_blocks", num_blocks, 1)
        check_int("ReleaseMemory", "attention_mlp_layers", attention_mlp_layers, 1)
        check_eps("ReleaseMemory", eps)
        if pooled_gate not in ("segment", "prefix"):
            raise ValueError(
                f"ReleaseMemory: pooled_gate must be 'segment' or 'prefix', got {pooled_gate!r}"
            )
        self.num_blocks = num_blocks
        self.pooled_gate = pooled_gate
        like = {"device": device, "dtype": dtype}
        self.query_proj = nn.Linear(dim, dim, **like)
        self.key_proj = nn.Linear(dim, dim, **like)
        self.value_proj = nn.Linear(dim, dim, **like)
        # one Linear under several names, as in the released state dict
        self.attention_mlp = nn.ModuleList([nn.Linear(dim, dim, **like)] * attention_mlp_layers)
        self.attended_memory_layernorm = nn.LayerNorm(dim, eps=eps, **like)
        self.attended_memory_layernorm2 = nn.LayerNorm(dim, eps=eps, **like)
        self.input_gate_projector = _GateProjector(dim, scaled=True, **like)
        self.memory_gate_projector = _GateProjector(dim, scaled=False, **like)
        self.input_bias = nn.Parameter(torch.empty((), **like))
        self.forget_bias = nn.Parameter(torch.empty((), **like))
        self.reset_parameters()
        self._pack()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights and zero biases; ``w`` 1, input bias 0, forget bias 1."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.ones_(self.input_gate_projector.w)
        nn.init.zeros_(self.input_bias)
        nn.init.ones_(self.forget_bias)

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, num_blocks={self.num_blocks}"
        return f"{text}, pooled_gate={self.pooled_gate!r}"

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        memory: Tensor,  # (B, N, D)
        *,
        slot_offset: int = 0,
        slot_mask: Tensor | None = None,  # (B, N)
        cache: SegmentCache | None = None,
        pooled_sum: Tensor | None = None,  # (B, D)
        return_pooled_sum: bool = False,
    ) -> tuple[Tensor, ...]:
        """Read and rewrite the memory.

        With ``cache`` as :meth:`PaperMemory.forward`: exact for ``pooled_gate="prefix"``, any
        ``num_blocks``. The "segment" gate takes a whole segment in one piece, and no second one.

        Args:
            x: (B, T, D).
            memory: (B, N, D) with ``slot_offset + T <= N``; may be float32 beside a 16-bit ``x``.
            slot_offset: the slot that row 0 is bound to.
            slot_mask: (B, N) bool, True = takes part in reading; not with ``cache``.
            cache: the piece's; it is extended, and holds the pooled sum too.
            pooled_sum: (B, D) float32 (float64 for float64), for a later piece of a segment that
                began at slot 0: what the piece before returned. Needs ``pooled_gate="prefix"``.
            return_pooled_sum: also return the sum for the next piece.

        Returns:
            output (B, T, D) in ``x``'s dtype, new memory (B, N, D) in ``memory``'s dtype (with
            ``cache`` the new rows), and with ``return_pooled_sum`` the pooled sum (B, D).

        Raises:
            TypeError, ValueError: an input does not fit; the text names it.
        """
        if cache is not None:
            if pooled_sum is not None or return_pooled_sum:
                raise ValueError("ReleaseMemory: with a cache, the pooled sum is in the cache")
            self._check_piece(x, memory, cache, slot_offset, slot_mask)
            return self._run(functools.partial(self._forward_piece, cache), cache, x, memory)
        self._check(x, memory, slot_offset, slot_mask)
        if pooled_sum is not None and self.pooled_gate != "prefix":
            raise ValueError(
                "ReleaseMemory: pooled_sum needs pooled_gate='prefix': the gate of a whole segment "
                "cannot be continued in pieces"
            )
        function = functools.partial(self._forward, slot_offset)
        output, new_memory, new_sum = self._run(function, None, x, memory, slot_mask, pooled_sum)
        return (output, new_memory, new_sum) if return_pooled_sum else (output, new_memory)

    if TYPE_CHECKING:
        # as above; and how many tensors come back
        @overload
        def __call__(
            self,
            x: Tensor,
            memory: Tensor,
            *,
            slot_offset: int = 0,
            slot_mask: Tensor | None = None,
            cache: SegmentCache | None = None,
            pooled_sum: Tensor | None = None,
            return_pooled_sum: Literal[False] = False,
        ) -> tuple[Tensor, Tensor]: ...

        @overload
        def __call__(
            self,
            x: Tensor,
            memory: Tensor,
            *,
            slot_offset: int = 0,
            slot_mask: Tensor | None = None,
            cache: SegmentCache | None = None,
            pooled_sum: Tensor | None = None,
            return_pooled_sum: Literal[True],
        ) -> tuple[Tensor, Tensor, Tensor]: ...

        @overload
        def __call__(
            self,
            x: Tensor,
            memory: Tensor,
            *,
            slot_offset: int = 0,
            slot_mask: Tensor | None = None,
            cache: SegmentCache | None = None,
            pooled_sum: Tensor | None = None,
            return_pooled_sum: bool,
        ) -> tuple[Tensor, ...]: ...

    def _forward(
        self,
        slot_offset: int,
        x: Tensor,
        memory: Tensor,
        slot_mask: Tensor | None,
        pooled_sum: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`forward` without a cache, its inputs checked; with the pooled sum."""
        # first, as it checks pooled_sum: attention must not run on inputs that are refused
        pooled, new_sum = functional.pooled_gate(
            x,
            self.input_gate_projector.w,
            prefix=self.pooled_gate == "prefix",
            pooled_sum=pooled_sum,
            num_pooled=0 if pooled_sum is None else slot_offset,
            backend=self.backend,
        )
        read = functools.partial(
            self._read_bank,
            bank=self._operand(memory, x),
            slot_offset=slot_offset,
            slot_mask=slot_mask,
        )
        rows = memory[:, slot_offset : slot_offset + x.shape[1]]
        output, new_rows = self._rewrite(x, rows, pooled, read)
        return output, write_rows(memory, new_rows, slot_offset), new_sum

    def _forward_piece(self, cache: SegmentCache, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`forward` with a cache, its inputs checked."""
        pooled = self._pool_piece(x, cache)
        return self._rewrite(x, rows, pooled, functools.partial(self._read_cache, cache=cache))

    def cache_shapes(self) -> dict[str, tuple[int, ...]]:
        """What the layer keeps of a token in a cache: name -> shape."""
        heads = (self.num_heads, self.dim // self.num_heads)
        names = [f"{kind}{block}" for block in range(self.num_blocks) for kind in ("key", "value")]
        return {**dict.fromkeys(names, heads), "pooled.sum": (self.dim,)}

    def _pool_piece(self, x: Tensor, cache: SegmentCache) -> Tensor:
        """The pooled gate's input (B, 1 or T, D), for rows of any position and length."""
        if self.pooled_gate == "segment" and cache.start != 0:
            raise ValueError(
                "ReleaseMemory: pooled_gate='segment' cannot stream: its gate is a mean over the "
                "whole segment, later tokens included; use pooled_gate='prefix', which has the "
                "same parameters"
            )
        real, is_prefix = cache.real(x.device), self.pooled_gate == "prefix"
        if real is not None:
            # relu(w * 0) adds nothing to the sum
            x = torch.where(real, x, 0.0)
        pooled_sum = cache.running_sum("pooled")
        pooled, new_sum = functional.pooled_gate(
            x,
            self.input_gate_projector.w,
            prefix=is_prefix,
            pooled_sum=pooled_sum,
            num_pooled=0 if pooled_sum is None else cache.start or 0,
            backend=self.backend,
        )
        cache.set_running_sum("pooled", new_sum)
        if cache.start is None or (real is not None and not is_prefix):
            # rows have pooled different numbers of tokens
            counts = cache.counts(x.shape[0], x.device)
            pooled = (new_sum / counts[:, None])[:, None].to(x.dtype)
        return pooled

    def _rewrite(
        self, x: Tensor, rows: Tensor, pooled: Tensor, read: _Read
    ) -> tuple[Tensor, Tensor]:
        gate_bias = self._gate_bias(pooled)
        candidate = self._attend(x, rows, read)
        (gates,) = project(torch.tanh(self._operand(rows, x)), self.memory_gate_projector.linear)
        input_gate, forget_gate = split_columns(gates, 2)
        return functional.memory_update(
            x,
            candidate,
            rows,
            input_gate,
            forget_gate,
            gate_bias=gate_bias,
            backend=self.backend,
        )

    def _attend(self, x: Tensor, rows: Tensor, read: _Read) -> Tensor:
        """The attended rows C_P after ``num_blocks`` rounds. (B, T, D)"""
        (query,) = project(x, self.query_proj)
        for block in range(self.num_blocks):
            attended = self._normalise(
                read(query, rows, block), rows, self.attended_memory_layernorm
            )
            mixed = attended
            for layer in self.attention_mlp:
                (mixed,) = project(mixed, layer, relu=True)
            rows = self._normalise(mixed, attended, self.attended_memory_layernorm2)
        return rows

    def _normalise(self, x: Tensor, residual: Tensor, norm: nn.LayerNorm) -> Tensor:
        return functional.residual_layer_norm(
            x, residual, norm.weight, norm.bias, norm.eps, backend=self.backend
        )

    def _gate_bias(self, pooled: Tensor) -> Tensor:
        """The pooled part of the gates with all biases. (B, 1 or T, 2 D)"""
        (gates,) = project(pooled, self.input_gate_projector.linear)
        biases = torch.stack((self.input_bias, self.forget_bias)).repeat_interleave(self.dim)
        return gates + biases.to(gates.dtype)
