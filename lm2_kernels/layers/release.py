"""The memory layer of the authors' released code."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor, nn

from lm2_kernels import unchecked
from lm2_kernels.backends import (
    autocast_dtype,
    computed_dtype,
    get,
    requested_backend,
    select,
    use_backend,
)
from lm2_kernels.backends.contract import NORM_AND_TANH, NORM_OF_RELU
from lm2_kernels.checks import (
    check_dtypes,
    check_eps,
    check_int,
    check_mixed,
    check_pooled_sum,
    check_shape,
    check_tensors,
    go_together,
)
from lm2_kernels.chunks import num_rows
from lm2_kernels.layers.base import (
    BankReader,
    MemoryLayer,
    Reader,
    check_result,
    ordinary_parameter,
    project,
    shallow_copy,
    unrounded,
)
from lm2_kernels.layers.release_function import (
    LINEARS,
    ReleaseMemoryFunction,
    ReleaseOptions,
    ReleaseParameters,
    with_rows,
)
from lm2_kernels.plain import (
    ORDINARY,
    is_ordinary,
    is_plain,
    parameters_of_plain,
    plain_parameters,
)
from lm2_kernels.state.cache import SegmentCache, write_rows
from lm2_kernels.tanh import apply_tanh


class _Shared(nn.Module):
    """A Linear with a ReLU behind it, several times; in the state dict under each place's name.

    To everything else it is one module of one name, as functional_call, pruning and sharding need.
    """

    def __init__(self, module: nn.Module, places: int):
        super().__init__()
        self.places = places
        self.under_all_names = True
        self.add_module("0", module)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = project("ReleaseMemory.attention_mlp", x, layer, x.shape[-1], relu=True)
        return x

    def __len__(self) -> int:
        return self.places

    def __iter__(self) -> Iterator[nn.Module]:
        return itertools.repeat(self._modules["0"], self.places)

    def __getitem__(self, index: int) -> nn.Module:
        self._check_index(index)
        return self._modules["0"]

    def __setitem__(self, index: int, module: nn.Module) -> None:
        self._check_index(index)
        self._modules["0"] = module

    def _check_index(self, index: int) -> None:
        if not -self.places <= index < self.places:
            raise IndexError(f"index {index} is out of range for {self.places} places")

    def extra_repr(self) -> str:
        return f"places={self.places}"

    # by the names of the state dict: for get_submodule, set_submodule, distributed checkpoints

    def __getattr__(self, name: str):
        if not self._is_place(name):
            return super().__getattr__(name)
        module = super().__getattr__("0")
        return module if int(name) == 0 else _twin(module)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__("0" if self._is_place(name) else name, value)

    def _is_place(self, name: str) -> bool:
        return name.isdecimal() and int(name) < self.places

    def state_dict(self, *, destination=None, prefix="", keep_vars=False):
        """As of any module, with each tensor under the names of all places."""
        state = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        names = [name for name in state if name.startswith(f"{prefix}0.")]
        for place in range(1, self.places if self.under_all_names else 1):
            for name in names:
                tensor = state[name] if keep_vars else _owned(state[name])
                state[self._alias(name, prefix, place)] = tensor
        return state

    @staticmethod
    def _alias(name: str, prefix: str, place: int) -> str:
        return f"{prefix}{place}.{name.removeprefix(f'{prefix}0.')}"

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        names = list(self._modules["0"].state_dict(prefix=f"{prefix}0."))
        for place, name in itertools.product(range(1, self.places), names):
            alias = self._alias(name, prefix, place)
            if alias in state_dict:
                tensor = state_dict.pop(alias)
                if not _are_equal(state_dict.setdefault(name, tensor), tensor):
                    error_msgs.append(f"{alias} differs from {name}, but they are one parameter")
            elif self.under_all_names:
                missing_keys.append(alias)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )


def _owned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it is a part of a larger one, as FSDP1's are, which it will free."""
    is_part = type(tensor) in ORDINARY and tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.clone() if is_part else tensor


def _are_equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of a state dict are one, in the narrower dtype; True where that cannot be
    seen.
    """
    for tensor in (first, second):
        if first is second or type(tensor) not in ORDINARY or tensor.is_meta:
            return True
    if first.shape != second.shape:
        return False
    narrow = min(first.dtype, second.dtype, key=lambda dtype: dtype.itemsize)
    first, second = (tensor.detach().to(first.device, narrow) for tensor in (first, second))
    return torch.allclose(first, second, rtol=0.0, atol=0.0, equal_nan=True)


class _TwinParameters(dict[str, Tensor | None]):
    """Parameters under a second name: what replaces one is the first name's too.

    A plain tensor is not, which functional_call puts in a parameter's place for a while: it has put
    it in the first place as well, and would put it there again in place of the parameter.
    """

    def __init__(self, first: dict[str, Tensor | None]):
        super().__init__(first)
        self._first = first

    def __setitem__(self, name: str, tensor: Tensor | None) -> None:
        super().__setitem__(name, tensor)
        if isinstance(tensor, nn.Parameter):
            self._first[name] = tensor


def _twin(module: nn.Module) -> nn.Module:
    """A module as it is found under a second name."""
    return shallow_copy(module, _TwinParameters(module._parameters), dict(module._buffers))


# (x (B, T, D), w (D,)) -> pooled (B, 1 or T, D) and the sum over all tokens so far (B, D)
Pool = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class _InputGateProjector(nn.Module):
    """The gates' part of the segment's tokens: a Linear of the pooled ``relu(w * x)``."""

    def __init__(self, dim: int, *, device=None, dtype=None):
        super().__init__()
        self.w = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.linear = nn.Linear(dim, 2 * dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
        # w is the pool's to take, but only here is it what pruning or offloading made of it
        pooled, new_sum = pool(x, self.w)
        name, width = "ReleaseMemory.input_gate_projector.linear", 2 * x.shape[-1]
        return project(name, pooled, self.linear, width), new_sum


class _MemoryGateProjector(nn.Module):
    """The gates' part of the memory's rows: a Linear of their tanh."""

    def __init__(self, dim: int, *, device=None, dtype=None):
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim, device=device, dtype=dtype)

    def forward(self, rows: Tensor) -> Tensor:
        name, width = "ReleaseMemory.memory_gate_projector.linear", 2 * rows.shape[-1]
        return project(name, apply_tanh(rows, requested_backend()), self.linear, width)


# as they are defined here: somebody may patch them
_SHARED_FORWARD = _Shared.forward
_INPUT_GATE_FORWARD = _InputGateProjector.forward
_MEMORY_GATE_FORWARD = _MemoryGateProjector.forward


class ReleaseMemory(MemoryLayer):
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
    the same parameters, and the one to stream with: with a cache; or without one, ``pooled_sum``
    passed on, at ``num_blocks=1``, as a second block reads rows that the first one rewrote, which
    later pieces of a segment lack.

    Our defaults differ from the released ones in two places: ``dropout`` is 0 (released: 0.9), and
    a token that sees no slot reads 0 (released: NaN).

    What is not the released code's: with ``candidate="token"``, tanh is of ``C_P + x Wc``, so that
    a token contributes more than its gates; and with ``write="chunk"`` there are fewer slots than
    tokens: token ``t`` is bound to slot ``o + t // c``, ``c`` being ``tokens_per_slot``, reads all
    slots as the segment found them, and a slot's new row is the mean of what its tokens propose
    (the right-hand side of M' above, with the slot's row for P). The output is ``x`` plus the
    token's own proposal. ``num_blocks`` is then 1: rows that a token has rewritten are not the
    slot's.

    Args:
        dim: model width D.
        num_heads: memory heads H; must divide ``dim``.
        num_blocks: how often the memory is attended before it is written.
        attention_mlp_layers: applications of the shared MLP Linear in each block.
        pooled_gate: "segment" (released) or "prefix" (causal).
        causal: whether the slots of later tokens are hidden in the attention; None is True for
            ``write="position"`` and False for "chunk", which refuses True. Without it a segment's
            tokens read the memory of earlier segments whole: causal where a bank is carried from
            segment to segment (``flow="time"``), but not where it comes from the block below.
        scale: factor on the scores, ``1 / sqrt(dim / num_heads)`` unless given.
        top_k: keep only the k largest probabilities of each row.
        dropout: on the attention probabilities, while training.
        eps: of both LayerNorms.
        write: which token writes which slot: "position", each its own, or "chunk",
            ``tokens_per_slot`` neighbours the same. A chunk of one token is a position.
        tokens_per_slot: of "chunk", c.
        candidate: "read", or "token" for a candidate with a term of the token, by
            ``candidate_proj``.
        recompute: keep x and memory alone for backward, instead of about 13 tensors of their size
            (T = N), and compute the rest again there: the same gradients bit for bit, for a second
            forward pass. Where a part of the layer is not plain (hooked, adapted, ...), options and
            ``training`` must be in backward what they were in forward. A submodule that changes its
            own buffers in forward, as a spectral norm does while training, is refused in backward.
            A segment fed in pieces with ``cache``, which holds keys and values anyway, is not
            recomputed; one fed whole is. With dropout, not under
            ``torch.compile(backend="eager")``: PyTorch's debug backend draws another mask in
            backward (its others do not).
        backend: force a backend for this layer; None takes the default (``use_backend``).
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of range.
    """

    OPS = ("memory_attention", "memory_update", "residual_layer_norm", "pooled_gate")
    FUNCTION = ReleaseMemoryFunction

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_blocks: int = 1,
        attention_mlp_layers: int = 2,
        pooled_gate: str = "segment",
        causal: bool | None = None,
        scale: float | None = None,
        top_k: int | None = None,
        dropout: float = 0.0,
        eps: float = 1e-5,
        write: str = "position",
        tokens_per_slot: int = 1,
        candidate: str = "read",
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
            tokens_per_slot=tokens_per_slot,
            candidate=candidate,
            recompute=recompute,
            backend=backend,
        )
        check_int("ReleaseMemory", "attention_mlp_layers", attention_mlp_layers, 1)
        check_eps("ReleaseMemory", eps)
        self.num_blocks = num_blocks
        self.pooled_gate = pooled_gate
        self._check_options()
        like = {"device": device, "dtype": dtype}
        self.query_proj = nn.Linear(dim, dim, **like)
        self.key_proj = nn.Linear(dim, dim, **like)
        self.value_proj = nn.Linear(dim, dim, **like)
        self.attention_mlp = _Shared(nn.Linear(dim, dim, **like), attention_mlp_layers)
        self.attended_memory_layernorm = nn.LayerNorm(dim, eps=eps, **like)
        self.attended_memory_layernorm2 = nn.LayerNorm(dim, eps=eps, **like)
        self.input_gate_projector = _InputGateProjector(dim, **like)
        self.memory_gate_projector = _MemoryGateProjector(dim, **like)
        if candidate == "token":
            self.candidate_proj = nn.Linear(dim, dim, **like)
        # (): the released shape, which FSDP refuses
        self.input_bias = nn.Parameter(torch.empty(1, **like))
        self.forget_bias = nn.Parameter(torch.empty(1, **like))
        self.reset_parameters()

    def _check_options(self) -> None:
        super()._check_options()
        check_int("ReleaseMemory", "num_blocks", self.num_blocks, 1)
        if self.write == "chunk" and self.num_blocks > 1:
            raise ValueError(
                f"ReleaseMemory: write='chunk' takes num_blocks=1, got {self.num_blocks}: what a "
                f"second block reads are rows that tokens have rewritten, one each"
            )
        if self.pooled_gate not in ("segment", "prefix"):
            raise ValueError(
                f"ReleaseMemory: pooled_gate must be 'segment' or 'prefix', got "
                f"{self.pooled_gate!r}"
            )

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

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # the two biases in the shape that they have here, () or (1,)
        for name in ("input_bias", "forget_bias"):
            saved, own = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(saved, Tensor) and saved.shape != own.shape and saved.numel() == 1:
                state_dict[prefix + name] = saved.reshape(own.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

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
        ``num_blocks`` with ``causal``, one without. The "segment" gate takes a whole segment in one
        piece, and no second one.

        Args:
            x: (B, T, D).
            memory: (B, N, D) with ``slot_offset + T / tokens_per_slot <= N``; may be float32 beside
                a 16-bit ``x``.
            slot_offset: the slot that row 0 is bound to. With the "prefix" gate and without
                ``pooled_sum`` the segment begins there: the gate's mean is over these rows alone.
            slot_mask: (B, N) bool, True = takes part in reading; not with ``cache``.
            cache: the piece's; it is extended, and holds the pooled sum too.
            pooled_sum: (B, D) float32 (float64 for float64), for a later piece of a segment that
                began at slot 0: what the piece before returned. Needs ``pooled_gate="prefix"``.
            return_pooled_sum: also return the sum for the next piece.

        Returns:
            output (B, T, D) in ``x``'s dtype, new memory (B, N, D) in ``memory``'s dtype (with
            ``cache`` the new rows, or the tokens' proposals for them), and with
            ``return_pooled_sum`` the pooled sum (B, D).

        Raises:
            TypeError, ValueError: an input does not fit; the text names it.
        """
        if cache is not None:
            if pooled_sum is not None or return_pooled_sum:
                raise ValueError("ReleaseMemory: with a cache, the pooled sum is in the cache")
            if self.num_blocks > 1 and not self.causal:
                raise ValueError(
                    "ReleaseMemory: causal=False cannot stream with num_blocks above 1: a second "
                    "block reads rows that later tokens have rewritten"
                )
            whole = self._as_one(x, memory, slot_mask, slot_offset, None, cache=cache)
            if whole is not None:
                return whole[:2]
            self._check_piece(x, memory, cache, slot_offset, slot_mask)
            return self._run(self._forward_piece, (x, memory), cache)
        whole = self._as_one(x, memory, slot_mask, slot_offset, pooled_sum)
        if whole is None:
            self._check(x, memory, slot_offset, slot_mask)
            self._check_pooled_sum(x, pooled_sum)
            tensors = (x, memory, slot_mask, pooled_sum)
            whole = self._run(self._forward, tensors, slot_offset)
        output, new_memory, new_sum = whole
        return (output, new_memory, new_sum) if return_pooled_sum else (output, new_memory)

    if TYPE_CHECKING:
        # nn.Module's takes and returns Any; and how many tensors come back
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

    def _check_pooled_sum(self, x: Tensor, pooled_sum: Tensor | None) -> None:
        if pooled_sum is not None:
            if self.pooled_gate != "prefix":
                raise ValueError(
                    "ReleaseMemory: pooled_sum needs pooled_gate='prefix': the gate of a whole "
                    "segment cannot be continued in pieces"
                )
            check_pooled_sum("ReleaseMemory", pooled_sum, x)

    def _parts(self) -> tuple[tuple[Tensor | None, ...], tuple[object, ...]] | None:
        modules = self._modules
        mlp, pool = modules.get("attention_mlp"), modules.get("input_gate_projector")
        of_rows = modules.get("memory_gate_projector")
        for module, kind, forward in (
            (mlp, _Shared, _SHARED_FORWARD),
            (pool, _InputGateProjector, _INPUT_GATE_FORWARD),
            (of_rows, _MemoryGateProjector, _MEMORY_GATE_FORWARD),
        ):
            if type(module) is not kind or kind.forward is not forward or not is_plain(module):
                return None
        linears = [
            modules.get("query_proj"),
            modules.get("key_proj"),
            modules.get("value_proj"),
            mlp._modules.get("0"),
            pool._modules.get("linear"),
            of_rows._modules.get("linear"),
        ]
        parameters: list[Tensor | None] = []
        if self.candidate == "token":
            linears.append(modules.get("candidate_proj"))
        names = "attended_memory_layernorm", "attended_memory_layernorm2"
        norms = [modules.get(name) for name in names]
        for module, kind in (
            *((linear, nn.Linear) for linear in linears),
            *((norm, nn.LayerNorm) for norm in norms),
        ):
            pair = None if module is None else parameters_of_plain(module, kind)
            if pair is None:
                return None
            parameters += pair
        if self.candidate != "token":
            parameters[LINEARS - 2 : LINEARS - 2] = (None, None)
        for owner, name in (
            (pool, "w"),
            (self, "input_bias"),
            (self, "forget_bias"),
        ):
            # as FSDP1 sets plain attributes
            vector = owner.__dict__.get(name, owner._parameters.get(name))
            if not is_ordinary(vector):
                return None
            parameters.append(vector)
        more = self.num_blocks, self.pooled_gate, mlp.places, norms[0].eps, norms[1].eps
        return tuple(parameters), more

    def _fits(self, parameters: tuple[Tensor | None, ...], x: Tensor) -> bool:
        p, dim = ReleaseParameters(*parameters), self.dim
        pairs = zip(parameters[:LINEARS:2], parameters[1:LINEARS:2], strict=True)
        widths = (dim,) * 4 + (2 * dim,) * 2 + (dim,)
        vectors = (
            p.first_norm_weight,
            p.first_norm_bias,
            p.second_norm_weight,
            p.second_norm_bias,
            p.pool_weight,
        )
        return (
            self.num_blocks == 1
            and all(vector is not None and vector.shape == (dim,) for vector in vectors)
            and all(
                weight.dtype == bias.dtype and go_together(computed_dtype(x), weight.dtype)
                for weight, bias in (vectors[:2], vectors[2:4])
            )
            and go_together(x.dtype, p.pool_weight.dtype)
            and all(b.numel() == 1 and b.dim() < 2 for b in (p.input_bias, p.forget_bias))
            and all(
                weight is None or self._linear_fits(weight, bias, x, width)
                for (weight, bias), width in zip(pairs, widths, strict=True)
            )
        )

    def _more_options(
        self, x: Tensor, memory: Tensor, slot_offset: int, pooled_sum: Tensor | None
    ) -> ReleaseOptions:
        self._check_pooled_sum(x, pooled_sum)
        first, second = self.attended_memory_layernorm, self.attended_memory_layernorm2
        check_eps("ReleaseMemory.attended_memory_layernorm", first.eps)
        check_eps("ReleaseMemory.attended_memory_layernorm2", second.eps)
        weight, computed = (
            self.input_gate_projector.w,
            x.new_empty(x.shape, dtype=computed_dtype(x)),
        )
        rows = memory[:, : num_rows(x.shape[1], self.tokens_per_slot)]
        is_cast = autocast_dtype(x.device.type) is not None
        normed = (computed, rows, first.weight, first.bias)
        norm = select("residual_layer_norm", normed, self.backend)
        tanh_dtype = memory.dtype if is_cast else x.dtype
        return ReleaseOptions(
            prefix=self.pooled_gate == "prefix",
            num_pooled=0 if pooled_sum is None else slot_offset * self.tokens_per_slot,
            applications=self.attention_mlp.places,
            tanh_dtype=tanh_dtype,
            tanh=requested_backend() if self.backend is None else self.backend,
            # where tokens share a row, the norm has one for each; in another dtype the tanh would
            # be rounded elsewhere
            tanh_by_norm=self.tokens_per_slot == 1
            and memory.dtype == tanh_dtype
            and hasattr(get(norm), f"{NORM_AND_TANH}_forward"),
            relu_by_norm=hasattr(get(norm), f"{NORM_OF_RELU}_forward"),
            first_eps=first.eps,
            second_eps=second.eps,
            norm=norm,
            pool=select("pooled_gate", (x, weight), self.backend),
        )

    def _more_backends(self, more: ReleaseOptions) -> tuple[str, ...]:
        return more.norm, more.pool

    def _forward(
        self,
        x: Tensor,
        memory: Tensor,
        slot_mask: Tensor | None,
        pooled_sum: Tensor | None,
        slot_offset: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`forward` without a cache, its inputs checked; with the pooled sum."""
        c = self.tokens_per_slot
        pool = functools.partial(self._pool, pooled_sum=pooled_sum, num_pooled=slot_offset * c)
        gate_bias, new_sum = self._gate_bias(x, pool)
        reader = BankReader(self, memory, slot_offset, slot_mask)
        rows = memory[:, slot_offset : slot_offset + num_rows(x.shape[1], c)]
        gates = self._gates_of_rows(self._operand(rows, x))
        output, new_rows = self._rewrite(x, rows, gates, gate_bias, reader, c)
        return output, write_rows(memory, new_rows, slot_offset), new_sum

    def _forward_piece(
        self, x: Tensor, memory: Tensor, cache: SegmentCache
    ) -> tuple[Tensor, Tensor]:
        """:meth:`forward` with a cache, its inputs checked."""
        gate_bias, _ = self._gate_bias(x, functools.partial(self._pool_piece, cache=cache))
        rows, c = self._piece_rows(memory, cache), self.tokens_per_slot
        gates = self._gates_of_rows(self._operand(rows, x))
        if not cache.writes_rows:
            rows, gates, c = unrounded(cache.by_token(rows)), cache.by_token(gates), 1
        return self._rewrite(x, rows, gates, gate_bias, self._reader(memory, x, cache), c)

    def _gates_of_rows(self, rows: Tensor) -> Tensor:
        if self.backend is None:
            return self.memory_gate_projector(rows)
        # hooks and patches of the module know it with rows alone
        with use_backend(self.backend):
            return self.memory_gate_projector(rows)

    def cache_shapes(self) -> dict[str, tuple[int, ...]]:
        """What the layer keeps in a cache, of a token or of a slot: name -> shape."""
        return {**self._attention_cache(self.num_blocks), "pooled.sum": (self.dim,)}

    def _pool_piece(self, x: Tensor, w: Tensor, cache: SegmentCache) -> tuple[Tensor, Tensor]:
        """The pooled gate's input (B, 1 or T, D), for rows of any position and length."""
        if self.pooled_gate == "segment" and cache.start != 0:
            raise ValueError(
                "ReleaseMemory: pooled_gate='segment' cannot stream: its gate is a mean over the "
                "whole segment, later tokens included; use pooled_gate='prefix', which has the "
                "same parameters"
            )
        real = cache.real(x.device)
        if real is not None:
            # relu(w * 0) adds nothing to the sum
            x = torch.where(real, x, 0.0)
        pooled_sum = cache.running_sum("pooled")
        pooled, new_sum = self._pool(x, w, pooled_sum, cache.start or 0)
        cache.set_running_sum("pooled", new_sum)
        if cache.start is None or (real is not None and self.pooled_gate == "segment"):
            # rows have pooled different numbers of tokens
            counts = cache.tokens_read(x.shape[0], x.device)
            pooled = (new_sum / counts[:, None])[:, None].to(x.dtype)
        return pooled, new_sum

    def _pool(
        self, x: Tensor, w: Tensor, pooled_sum: Tensor | None, num_pooled: int
    ) -> tuple[Tensor, Tensor]:
        op, name = type(self).__name__, "input_gate_projector.w"
        check_tensors(op, x=x, **{name: w})
        check_shape(op, name, w, "(D,)", (self.dim,))
        check_mixed(op, x=x.dtype, **{name: w.dtype})
        return unchecked.pooled_gate(
            x,
            w,
            prefix=self.pooled_gate == "prefix",
            pooled_sum=pooled_sum,
            num_pooled=0 if pooled_sum is None else num_pooled,
            backend=self.backend,
        )

    def _gate_bias(self, x: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
        """The pooled part of the gates with all biases (B, 1 or T, 2 D), and the pooled sum."""
        gates, new_sum = self.input_gate_projector(x, pool)
        biases = torch.cat([bias.expand(self.dim) for bias in (self.input_bias, self.forget_bias)])
        return gates + biases.to(gates.dtype), new_sum

    def _rewrite(
        self,
        x: Tensor,
        rows: Tensor,
        gates: Tensor,
        gate_bias: Tensor,
        reader: Reader,
        tokens_per_slot: int,
    ) -> tuple[Tensor, Tensor]:
        candidate = self._candidate(self._attend(x, rows, reader, tokens_per_slot), x)
        input_gate, forget_gate = gates.chunk(2, dim=-1)
        return unchecked.memory_update(
            x,
            candidate,
            rows,
            input_gate,
            forget_gate,
            gate_bias=gate_bias,
            tokens_per_slot=tokens_per_slot,
            backend=self.backend,
        )

    def _attend(self, x: Tensor, rows: Tensor, reader: Reader, tokens_per_slot: int) -> Tensor:
        """The attended rows C_P after ``num_blocks`` rounds. (B, T, D)"""
        query = self._project("query_proj", x, self.query_proj)
        for block in range(self.num_blocks):
            read = reader.read(query, rows, block)
            name = "attended_memory_layernorm"
            norm = self.attended_memory_layernorm
            both = with_rows(read, rows, tokens_per_slot)
            attended = self._normalise(name, *both, norm).view(read.shape)
            op, mixed = f"{type(self).__name__}.attention_mlp", self.attention_mlp(attended)
            mixed = check_result(op, mixed, attended, self.dim, attended.dtype, is_cast=True)
            name = "attended_memory_layernorm2"
            rows = self._normalise(name, mixed, attended, self.attended_memory_layernorm2)
        return rows

    def _normalise(self, name: str, x: Tensor, residual: Tensor, norm: nn.Module) -> Tensor:
        """``norm(x + residual)``, (B, T, D) in the dtype of x: LayerNorm's by the op."""
        op = type(self).__name__
        weight, bias = plain_parameters(norm, nn.LayerNorm) or (None, None)
        if weight is None or bias is None:
            parameter = ordinary_parameter(norm)
            dtype = x.dtype if parameter is None else parameter.dtype
            result = norm(x.to(dtype) + residual.to(dtype))
            return check_result(f"{op}.{name}", result, x, self.dim, x.dtype, is_cast=True)
        vectors = {f"{name}.weight": weight, f"{name}.bias": bias}
        check_tensors(op, x=x, **vectors)
        for what, vector in vectors.items():
            check_shape(op, what, vector, "(D,)", (self.dim,))
        check_mixed(op, x=x.dtype, **{f"{name}.weight": weight.dtype})
        check_dtypes(op, weight.dtype, (), **{f"{name}.bias": bias})
        check_eps(f"{op}.{name}", norm.eps)
        return unchecked.residual_layer_norm(
            x, residual, weight, bias, norm.eps, backend=self.backend
        )
