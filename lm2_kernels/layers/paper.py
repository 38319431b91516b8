"""The memory layer of the LM2 paper."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lm2_kernels import unchecked
from lm2_kernels.chunks import num_rows
from lm2_kernels.layers.base import BankReader, MemoryLayer, Reader, unrounded
from lm2_kernels.layers.paper_function import PROJECTIONS, PaperMemoryFunction
from lm2_kernels.plain import parameters_of_plain
from lm2_kernels.state.cache import SegmentCache, write_rows


class PaperMemory(MemoryLayer):
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

    What is not the paper's: with ``candidate="token"``, tanh is of ``R + x Wc`` in place of R, so
    that a token contributes more than its gates; and with ``write="chunk"`` there are fewer slots
    than tokens: token ``t`` is bound to slot ``o + t // c``, ``c`` being ``tokens_per_slot``, reads
    all slots as the segment found them, and a slot's new row is the mean of what its tokens propose
    (right-hand sides of M' above, with the slot's row for P).

    Args:
        dim: model width D.
        num_heads: memory heads H; must divide ``dim``.
        bias: whether the projections have a bias.
        causal: whether the slots of later tokens are hidden; None is True for ``write="position"``
            and False for "chunk", which refuses True. Without it a segment's tokens read the memory
            of earlier segments whole: causal where a bank is carried from segment to segment
            (``flow="time"``), but not where it comes from the block below.
        scale: factor on the scores, ``1 / sqrt(dim / num_heads)`` unless given.
        top_k: keep only the k largest probabilities of each row.
        dropout: on the attention probabilities, while training.
        output: "read", or "memory" for equation 3 read literally: ``x + sigma(R Wout) * P``.
        write: which token writes which slot: "position", each its own, or "chunk",
            ``tokens_per_slot`` neighbours the same. A chunk of one token is a position.
        tokens_per_slot: of "chunk", c.
        candidate: "read", or "token" for a candidate with a term of the token, by
            ``candidate_proj``.
        recompute: keep x and memory alone for backward, instead of about 9 tensors of their size (T
            = N), and compute the rest again there: the same gradients bit for bit, for a second
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

    OPS = ("memory_attention", "memory_update")
    FUNCTION = PaperMemoryFunction

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        bias: bool = False,
        causal: bool | None = None,
        scale: float | None = None,
        top_k: int | None = None,
        dropout: float = 0.0,
        output: str = "read",
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
        self.output = output
        self._check_options()

        def projection() -> nn.Linear:
            return nn.Linear(dim, dim, bias=bias, device=device, dtype=dtype)

        self.query_proj = projection()
        self.key_proj = projection()
        self.value_proj = projection()
        self.output_gate_proj = projection()
        self.input_gate_proj = projection()
        self.forget_gate_proj = projection()
        if candidate == "token":
            self.candidate_proj = projection()
        self.reset_parameters()

    def _check_options(self) -> None:
        super()._check_options()
        if self.output not in ("read", "memory"):
            raise ValueError(f"PaperMemory: output must be 'read' or 'memory', got {self.output!r}")

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
        segment's next piece and ``memory`` what :meth:`lm2_kernels.MemoryState.piece` gives for it:
        with ``causal`` only the rows (B, T, D) that it is bound to, as the segment found them, else
        the whole bank. What comes back goes to :meth:`lm2_kernels.MemoryState.after`. Pieces one
        after the other give what one call gives for the segment from slot 0 on.

        Args:
            x: (B, T, D).
            memory: (B, N, D) with ``slot_offset + T / tokens_per_slot <= N``; may be float32 beside
                a 16-bit ``x``.
            slot_offset: the slot that row 0 is bound to; the cache knows its own.
            slot_mask: (B, N) bool, True = takes part in reading; not with ``cache``.
            cache: the piece's; it is extended.

        Returns:
            output (B, T, D) in ``x``'s dtype, new memory (B, N, D) in ``memory``'s dtype (with
            ``cache`` the new rows, or the tokens' proposals for them).

        Raises:
            TypeError, ValueError: an input does not fit; the text names it.
        """
        whole = self._as_one(x, memory, slot_mask, slot_offset, cache=cache)
        if whole is not None:
            return whole
        if cache is not None:
            self._check_piece(x, memory, cache, slot_offset, slot_mask)
            return self._run(self._forward_piece, (x, memory), cache)
        self._check(x, memory, slot_offset, slot_mask)
        return self._run(self._forward, (x, memory, slot_mask), slot_offset)

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

    def _parts(self) -> tuple[tuple[Tensor | None, ...], tuple[object, ...]] | None:
        parameters: list[Tensor | None] = []
        for name in PROJECTIONS:
            if name == "candidate_proj" and self.candidate == "read":
                parameters += (None, None)
                continue
            module = self._modules.get(name)
            pair = None if module is None else parameters_of_plain(module, nn.Linear)
            if pair is None:
                return None
            parameters += pair
        return tuple(parameters), (self.output,)

    def _fits(self, parameters: tuple[Tensor | None, ...], x: Tensor) -> bool:
        pairs = zip(parameters[::2], parameters[1::2], strict=True)
        return all(
            weight is None or self._linear_fits(weight, bias, x, self.dim) for weight, bias in pairs
        )

    def _more_options(self, x: Tensor, memory: Tensor, slot_offset: int) -> str:
        return self.output

    def _forward(
        self, x: Tensor, memory: Tensor, slot_mask: Tensor | None, slot_offset: int
    ) -> tuple[Tensor, Tensor]:
        """:meth:`forward` without a cache, its inputs checked."""
        reader = BankReader(self, memory, slot_offset, slot_mask)
        rows = memory[:, slot_offset : slot_offset + num_rows(x.shape[1], self.tokens_per_slot)]
        output, new_rows = self._rewrite(x, rows, reader, self.tokens_per_slot)
        return output, write_rows(memory, new_rows, slot_offset)

    def _forward_piece(
        self, x: Tensor, memory: Tensor, cache: SegmentCache
    ) -> tuple[Tensor, Tensor]:
        """:meth:`forward` with a cache, its inputs checked."""
        rows, c = self._piece_rows(memory, cache), self.tokens_per_slot
        if not cache.writes_rows:
            rows, c = unrounded(cache.by_token(rows)), 1
        return self._rewrite(x, rows, self._reader(memory, x, cache), c)

    def _rewrite(
        self, x: Tensor, rows: Tensor, reader: Reader, tokens_per_slot: int
    ) -> tuple[Tensor, Tensor]:
        read = reader.read(self._project("query_proj", x, self.query_proj), rows, 0)
        candidate = self._candidate(read, x)
        is_own = candidate is not read and self.output == "read"
        return unchecked.memory_update(
            x,
            candidate,
            rows,
            self._project("input_gate_proj", x, self.input_gate_proj),
            self._project("forget_gate_proj", read, self.forget_gate_proj),
            self._project("output_gate_proj", read, self.output_gate_proj),
            read=read if is_own else None,
            output=self.output,
            tokens_per_slot=tokens_per_slot,
            backend=self.backend,
        )

    def cache_shapes(self) -> dict[str, tuple[int, ...]]:
        """What the layer keeps in a cache, of a token or of a slot: name -> shape."""
        return self._attention_cache(1)
