"""What both layers are made of as one ``torch.autograd.Function`` each.

A layer whose every part is plain (:mod:`lm2_kernels.plain`) is one node of autograd's graph for a
whole segment: its forward is that of its ops bit for bit (but for a tanh that a backend's norm
takes along: to round-off), its backward is derived by hand from theirs, and sums of gradients are
made by the products that they are sums of. Kernels are the backends', called as the ops call them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lm2_kernels.autograd import first_order, refuse_mapped
from lm2_kernels.backends import call_without_autocast as call
from lm2_kernels.backends import check_mark, cpu_products, mark, without_autocast
from lm2_kernels.backends.contract import accumulation_dtype
from lm2_kernels.chunks import num_rows
from lm2_kernels.linear import linear
from lm2_kernels.state.cache import write_rows

# the name of all that is kept behind what has names
REST = "rest"
# one for each tensor of a call, and for each result: None where there is none
Tensors = tuple[Tensor | None, ...]


class Read(NamedTuple):
    """Options of reading a bank, checked.

    Args:
        num_heads: H.
        num_slots: N.
        causal: whether the slots of later tokens are hidden.
        slot_offset: the slot that row 0 is bound to.
        scale: factor on the scores.
        top_k: None where all slots are kept.
        dropout: 0 unless training.
        backend: of the attention.
    """

    num_heads: int
    num_slots: int
    causal: bool
    slot_offset: int
    scale: float
    top_k: int | None
    dropout: float
    backend: str


class Options(NamedTuple):
    """What a layer is called with besides tensors, checked.

    Args:
        layer: its name, for errors.
        read: of reading.
        tokens_per_slot: c.
        dtype: in which products are computed.
        is_cast: whether anything has another dtype.
        recompute: whether the inputs alone are kept for backward.
        gives_rows: whether the rows that were written come back, not the whole bank.
        update: the backend of the update.
        backends: of all ops.
        in_cpp: whether it may be one call of the compiled backend.
        more: what the other layer has not.
    """

    layer: str
    read: Read
    tokens_per_slot: int
    dtype: torch.dtype
    is_cast: bool
    recompute: bool
    gives_rows: bool
    update: str
    backends: tuple[str, ...]
    in_cpp: bool
    more: Any

    def rows_of(self, memory: Tensor, num_tokens: int) -> Tensor:
        """The rows (B, R, D) that the tokens are bound to."""
        first, count = self.read.slot_offset, num_rows(num_tokens, self.tokens_per_slot)
        return memory if count == memory.shape[1] else memory.narrow(1, first, count)

    def new_memory(self, memory: Tensor, new_rows: Tensor) -> Tensor:
        """What comes back of the memory."""
        return new_rows if self.gives_rows else write_rows(memory, new_rows, self.read.slot_offset)

    def gradients_of_rows(
        self, dnew_memory: Tensor | None, num_tokens: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """That of the rows that were written, and of the bank that came back beside them."""
        if dnew_memory is None or self.gives_rows:
            return dnew_memory, None
        return self.rows_of(dnew_memory, num_tokens), dnew_memory

    def operand(self, x: Tensor) -> Tensor:
        """A tensor as products take it."""
        return x.to(self.dtype) if self.is_cast else x

    def operands(self, *parameters: Tensor | None) -> Tensors:
        """Parameters as they are computed with: themselves, or under autocast copies."""
        if not self.is_cast:
            return parameters
        return tuple(None if p is None else p.to(self.dtype) for p in parameters)


class Reading(NamedTuple):
    """What a read keeps for backward."""

    bank: Tensor  # (B, N, D)
    query: Tensor  # (B, T, H, K)
    key: Tensor  # (B, N, H, K)
    value: Tensor  # (B, N, H, K)
    by_head: Tensor  # (B, T, H, K), what was read
    statistics: Tensor  # (B, H, 2, T)
    slot_mask: Tensor | None
    seed: Tensor | None


class LayerFunction(torch.autograd.Function):
    """``(options, *tensors) -> results`` of a layer.

    Keeps for backward what its subclass says, all by reference, and a mark of the backends; with
    ``recompute`` the tensors that it is given alone, from which the others are computed again.
    """

    # (options, whether anything is kept, *tensors) -> results, what is kept for backward
    compute: Callable[..., tuple[Tensors, Tensors]]
    # (options, which tensors need a gradient, gradients of results, what was kept) -> gradients
    differentiate: Callable[..., Tensors]
    # parts of what is kept, and the places of the tensors one of which must need a gradient for a
    # part to be of use
    uses: tuple[tuple[slice, tuple[int, ...]], ...]

    @classmethod
    def of(cls, options: Options, *tensors: Tensor | None) -> Tensors:
        """The layer, as a node of a graph if there is one."""
        if not torch.is_grad_enabled():
            return _compute(cls, options, False, tensors)[0]
        if not any([tensor is not None and tensor.requires_grad for tensor in tensors]):
            # as within a Function: products take the ways that have no derivative
            with torch.no_grad():
                return _compute(cls, options, False, tensors)[0]
        # Function.apply without its detour for torch.func, under which nobody gets here
        return super(torch.autograd.Function, cls).apply(options, *tensors)

    @classmethod
    def forward(cls, ctx, options, *tensors):
        results, kept = _compute(cls, options, not options.recompute, tensors)
        ctx.options = options
        ctx.set_materialize_grads(False)
        if options.recompute:
            ctx.save_for_backward(*tensors)
            return results
        useful = list(kept)
        for place in _useless(cls, ctx.needs_input_grad[1:]):
            useful[place] = [None] * len(useful[place])
        ctx.save_for_backward(*useful, mark(options.backends))
        return results

    @classmethod
    def backward(cls, ctx, *gradients):
        needs = ctx.needs_input_grad[1:]
        if all(gradient is None for gradient in gradients):
            return (None,) * (1 + len(needs))
        refuse_mapped(gradients)
        # read once: checkpointing unpacks what was saved a single time
        saved = ctx.saved_tensors
        if not ctx.options.recompute:
            *saved, made_by = saved
            check_mark(ctx.options.layer, made_by, ctx.options.backends)
        backward = functools.partial(_backward, cls, ctx.options, needs, len(gradients))
        return None, *first_order(ctx.options.layer, backward, *gradients, *saved)


def _compute(
    cls: type[LayerFunction], options: Options, keeps: bool, tensors: Tensors
) -> tuple[Tensors, Tensors]:
    return without_autocast(tensors[0].device.type, cls.compute, options, keeps, *tensors)


@functools.cache
def _useless(cls: type[LayerFunction], needs: tuple[bool, ...]) -> list[slice]:
    """Which parts of what is kept are of no use if these tensors need a gradient."""
    return [place for place, users in cls.uses if not any(needs[user] for user in users)]


def places(
    kept: tuple[str, ...], tensors: tuple[str, ...], **uses: str
) -> tuple[tuple[slice, tuple[int, ...]], ...]:
    """:attr:`LayerFunction.uses` by names: of what is kept, and of tensors between blanks."""
    found = []
    for name, users in uses.items():
        place = kept.index(name)
        part = slice(place, None if name == REST else place + 1)
        found.append((part, tuple(map(tensors.index, users.split()))))
    return tuple(found)


def _backward(
    cls: type[LayerFunction],
    options: Options,
    needs: tuple[bool, ...],
    num_results: int,
    *tensors: Tensor | None,
) -> Tensors:
    gradients, saved = tensors[:num_results], tensors[num_results:]
    some = next(gradient for gradient in gradients if gradient is not None)

    def run() -> Tensors:
        kept = cls.compute(options, True, *saved)[1] if options.recompute else saved
        return cls.differentiate(options, needs, gradients, kept)

    return without_autocast(some.device.type, run)


# --- reading -----------------------------------------------------------------------------------


def read(
    options: Options,
    keeps: bool,
    query: Tensor,  # (B, T, D)
    memory: Tensor,  # (B, N, D)
    slot_mask: Tensor | None,
    seed: Tensor | None,
    key_weight: Tensor,
    key_bias: Tensor | None,
    value_weight: Tensor,
    value_bias: Tensor | None,
) -> tuple[Tensor, Reading | None]:
    """What projected queries read of a bank, (B, T, D), and what backward needs besides if anything
    is kept for it.
    """
    how = options.read
    bank, slot_mask = bank_of(options, query.shape[1], memory, slot_mask)
    query = heads(query, how)
    key = heads(linear(bank, key_weight, key_bias), how)
    value = heads(linear(bank, value_weight, value_bias), how)
    out, statistics = call(
        how.backend,
        "memory_attention_forward",
        query,
        key,
        value,
        slot_mask,
        seed,
        how.causal,
        how.slot_offset,
        how.scale,
        how.top_k,
        how.dropout,
    )
    reading = Reading(bank, query, key, value, out, statistics, slot_mask, seed) if keeps else None
    return out.flatten(-2), reading


def bank_of(
    options: Options, num_tokens: int, memory: Tensor, slot_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The slots that some token sees, as products take them, and their mask."""
    how, bank = options.read, memory
    if how.causal:
        # later slots are hidden from every token: no need to project them
        end = how.slot_offset + num_tokens
        bank = bank if end == how.num_slots else bank[:, :end]
        slot_mask = None if slot_mask is None else slot_mask[:, :end]
    if slot_mask is not None:
        # 0 * NaN is NaN in the gradients of the projections too
        bank = bank.masked_fill(~slot_mask[:, :, None], 0.0)
    return options.operand(bank), slot_mask


def read_backward(
    options: Options, dread: Tensor, reading: Reading, needs_dquery: bool, needs_dkey_value: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of query (B T, D), and of key and value (B, N, 2 D) side by side, given that of
    what was read.
    """
    how = options.read
    _, query, key, value, out, statistics, slot_mask, seed = reading
    dquery, dkey_value = call(
        how.backend,
        "memory_attention_backward",
        dread.view(out.shape),
        query,
        key,
        value,
        slot_mask,
        seed,
        out,
        statistics,
        how.causal,
        how.slot_offset,
        how.scale,
        how.top_k,
        how.dropout,
        needs_dquery,
        needs_dkey_value,
    )
    return (
        dquery.flatten(-2).flatten(0, 1) if needs_dquery else None,
        dkey_value.flatten(2) if needs_dkey_value else None,
    )


def heads(x: Tensor, how: Read) -> Tensor:
    """(B, T, H, K)"""
    # Tensor.unflatten is longer in Python than this in C++
    return x.view(*x.shape[:-1], how.num_heads, x.shape[-1] // how.num_heads)


# --- gradients ---------------------------------------------------------------------------------


class Sum:
    """A sum of gradients of one tensor (..., D), to which a product is added as it is computed.

    Args:
        term: the first one, which is not written to; None: there is none so far.
    """

    def __init__(self, term: Tensor | None = None):
        self.total = term
        self._is_own = False

    def add(self, term: Tensor | None) -> None:
        """Add a tensor that is ours, and which nobody reads again."""
        if term is None:
            return
        if self.total is None:
            self.total = term
        elif self._is_own:
            self.total += term
        else:
            self.total = self.total + term
        self._is_own = True

    def add_product(self, dy: Tensor | None, weight: Tensor) -> None:
        """Add ``dy @ weight``, of (..., L) and (L, D)."""
        if dy is None:
            return
        if self.total is None:
            self.add(times(dy, weight))
        elif self.total.dtype != dy.dtype:
            self.add(times(dy, weight).view(self.total.shape))
        else:
            shape = self.total.shape
            # of what is ours a view, which is written to
            total = matrix(self.total)
            total = cpu_products.add_product(total, matrix(dy), weight, in_place=self._is_own)
            self.total, self._is_own = total.view(shape), True

    def add_products(self, dy: Tensor, *weights: Tensor) -> None:
        """Add ``dy_i @ weight_i`` for each of the weights (L, D), of dy_i side by side (..., n L).

        By one product with the weights one below another, unless these are more to copy than what
        they are multiplied with.
        """
        if dy.numel() >= len(weights) * weights[0].numel():
            self.add_product(dy, torch.cat(weights))
            return
        for part, weight in zip(dy.chunk(len(weights), -1), weights, strict=True):
            self.add_product(part, weight)


def matrix(x: Tensor) -> Tensor:
    """All but the last axis as one."""
    return x if x.dim() == 2 else x.flatten(0, -2)


def times(dy: Tensor, weight: Tensor) -> Tensor:
    """``dy @ weight``, (..., D)."""
    rows = cpu_products.product(matrix(dy), weight)
    return rows if dy.dim() == 2 else rows.view(*dy.shape[:-1], weight.shape[1])


def of_linear(
    dy: Tensor | None,  # (..., L)
    x: Tensor,  # (..., D)
    needs_dweight: bool,
    needs_dbias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight (L, D) and bias (L,); autograd casts them to their dtypes."""
    if dy is None:
        return None, None
    if needs_dweight:
        return cpu_products.product_and_sums(matrix(dy), matrix(x), needs_sums=needs_dbias)
    return None, sum_of_rows(dy) if needs_dbias else None


def sum_of_rows(x: Tensor) -> Tensor:
    """The sum (D,) over all but the last axis, in the dtype of sums."""
    return matrix(x).sum(dim=0, dtype=accumulation_dtype(x))


def of_memory(
    options: Options,
    rows: Tensor,  # (B, R, D)
    drows: Tensor | None,  # (B, R, D), ours
    dbank: Tensor | None,  # (B, N, D), of the bank that came back
    reading: Reading,
    dkey_value: Tensor | None,  # (B, N or fewer, 2 D)
    key_weight: Tensor,
    value_weight: Tensor,
) -> Tensor | None:
    """The gradient of a memory: of what was kept, of the rows that were rewritten, of the read."""
    total = of_bank(options, rows, drows, dbank)
    if dkey_value is None:
        return total.total
    slot_mask, is_whole = reading.slot_mask, dkey_value.shape[1] == options.read.num_slots
    of_read = total if is_whole and slot_mask is None else Sum()
    of_read.add_products(dkey_value, key_weight, value_weight)
    if of_read is total:
        return total.total
    return with_read(options, rows, total, of_read.total, slot_mask)


def of_bank(options: Options, rows: Tensor, drows: Tensor | None, dbank: Tensor | None) -> Sum:
    """The same, but for the read."""
    num_slots, total = options.read.num_slots, Sum()
    if rows.shape[1] == num_slots:
        total.add(drows)
    elif drows is not None or dbank is not None:
        shape = (rows.shape[0], num_slots, rows.shape[2])
        whole = rows.new_zeros(shape) if dbank is None else dbank.clone()
        place = options.read.slot_offset, rows.shape[1]
        whole.narrow(1, *place).copy_(whole.new_zeros(()) if drows is None else drows)
        total.add(whole)
    return total


def with_read(
    options: Options,
    rows: Tensor,
    total: Sum,
    of_read: Tensor,  # (B, N or fewer, D), ours
    slot_mask: Tensor | None,
) -> Tensor:
    """The sum, with what is read of those slots that take part."""
    if slot_mask is not None:
        of_read.masked_fill_(~slot_mask[:, :, None], 0.0)
    if total.total is None:
        total.add(rows.new_zeros(rows.shape[0], options.read.num_slots, rows.shape[2]))
    total.total[:, : of_read.shape[1]] += of_read
    return total.total
