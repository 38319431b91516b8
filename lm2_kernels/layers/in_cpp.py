"""A layer's pass over CPU tensors as one call of the compiled backend (csrc/cpu/layers.h).

It computes what :mod:`paper_function` and :mod:`release_function` do with its kernels, forward bit
for bit: at small sizes their Python takes a tenth of the time, and at the smallest most of it.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lm2_kernels import backends
from lm2_kernels.backends import cpp, cpu_products
from lm2_kernels.layers.function import Options, Reading, Tensors, bank_of, of_bank, with_read
from lm2_kernels.plain import ORDINARY

# off: a layer's parts are called one by one, as they are where anybody watches them
enabled = True
_DTYPES = (torch.float32, torch.float64)


def is_possible(device_type: str, dtype: torch.dtype, names: Iterable[str]) -> bool:
    """Whether a layer on this type of device, which computes in this dtype, may be one call if its
    ops have these backends.
    """
    return (
        device_type == "cpu"
        and set(names) == {"cpp"}
        and dtype in _DTYPES
        and cpp.has("release_layer_forward")
    )


def fits(options: Options, tensors: Iterable[Tensor | None], parameters: Tensors) -> bool:
    """Whether a layer with these options can be one call now: where nobody watches what is called,
    all tensors are there and not empty, and neither they nor the parameters have gaps.
    """
    if not options.in_cpp or not enabled or backends.is_recording():
        return False
    # modes count operators or give them meaning, by the names that they know; of fake tensors
    # without their mode our operators know nothing
    if torch._C._len_torch_dispatch_stack() > 0:
        return False
    for tensor in tensors:
        if tensor is None or type(tensor) not in ORDINARY:
            return False
        if not tensor.is_contiguous() or tensor.numel() == 0:
            return False
    return all([p is None or p.is_contiguous() for p in parameters])


def _reading(options: Options, products: Iterable[bool]) -> tuple:
    """The products that go to oneDNN, as csrc/cpu/layers.h numbers them; the options of reading."""
    how, ways = options.read, 0
    if options.dtype == torch.float32:
        for place, is_by_onednn in enumerate(products):
            ways |= is_by_onednn << place
    return (
        ways,
        how.num_heads,
        how.causal,
        how.slot_offset,
        how.scale,
        how.top_k,
        how.dropout,
    )


def _forward_products(x: Tensor, bank: Tensor, pooled_rows: int) -> Iterator[bool]:
    dim = x.shape[-1]
    tokens, slots = x.numel() // dim, bank.numel() // dim
    yield cpu_products.is_linear_by_onednn(tokens, dim, dim)
    yield cpu_products.is_linear_by_onednn(slots, dim, dim)
    if pooled_rows > 0:
        yield cpu_products.is_linear_by_onednn(tokens, dim, 2 * dim)
        yield cpu_products.is_linear_by_onednn(pooled_rows, dim, 2 * dim)


def _backward_products(x: Tensor, bank: Tensor, pooled_rows: int) -> Iterator[bool]:
    dim = x.shape[-1]
    tokens, slots = x.numel() // dim, bank.numel() // dim
    # dy W, then dy^T x
    yield cpu_products.is_by_onednn(tokens, dim, dim, True, True)
    yield cpu_products.is_by_onednn(slots, dim, dim, True, True)
    yield cpu_products.is_by_onednn(dim, tokens, dim, False, True)
    yield cpu_products.is_by_onednn(dim, slots, dim, False, True)
    if pooled_rows > 0:
        yield cpu_products.is_by_onednn(tokens, 2 * dim, dim, True, True)
        yield cpu_products.is_by_onednn(pooled_rows, 2 * dim, dim, True, True)
        yield cpu_products.is_by_onednn(2 * dim, tokens, dim, False, True)
        yield cpu_products.is_by_onednn(2 * dim, pooled_rows, dim, False, True)


def _is_whole(options: Options, rows: Tensor, reading: Reading) -> bool:
    """Whether all of a memory is read and rewritten."""
    return rows.shape[1] == options.read.num_slots and reading.slot_mask is None


def _of_memory(
    options: Options,
    found: Iterator[Tensor],
    rows: Tensor,
    dbank: Tensor | None,
    reading: Reading,
) -> Tensor:
    """The next gradient, a memory's, or what it is made of."""
    if _is_whole(options, rows, reading):
        return next(found)
    total = of_bank(options, rows, next(found), dbank)
    return with_read(options, rows, total, next(found), reading.slot_mask)


def paper_forward(
    options: Options,
    keeps: bool,
    x: Tensor,
    memory: Tensor,
    slot_mask: Tensor | None,
    seed: Tensor | None,
    parameters: Tensors,
    has_candidate: bool,
) -> tuple[Tensors, tuple]:
    """Results; and if anything is kept the rows, what was read, the candidate, the gates of input,
    forget and output, and what is kept of the read.
    """
    rows = options.rows_of(memory, x.shape[1])
    bank, slot_mask = bank_of(options, x.shape[1], memory, slot_mask)
    output, new_rows, *made = cpp.call(
        "paper_layer_forward",
        x,
        rows,
        bank,
        slot_mask,
        seed,
        parameters,
        *_reading(options, _forward_products(x, bank, 0)),
        options.more,
        keeps,
    )
    results = output, options.new_memory(memory, new_rows)
    if not keeps:
        return results, ()
    candidate = made.pop(1) if has_candidate else None
    out, *gates, query, key, value, by_head, statistics = made
    reading = Reading(bank, query, key, value, by_head, statistics, slot_mask, seed)
    return results, (rows, out, candidate, gates, reading)


def paper_backward(
    options: Options,
    needs_memory: bool,
    needs: list[tuple[bool, bool]],
    doutput: Tensor,
    dnew_memory: Tensor,
    kept,
    weights: Tensors,
    reading: Reading,
) -> tuple[Tensor, Tensor | None, list[Tensors]]:
    """Gradients of x, of the memory, and of weight and bias of each Linear.

    ``needs`` says which of weight and bias need one: all weights that there are do. ``kept`` is a
    ``paper_function._Kept``.
    """
    dnew_rows, dbank = options.gradients_of_rows(dnew_memory, kept.x.shape[1])
    found = iter(
        cpp.call(
            "paper_layer_backward",
            doutput,
            dnew_rows,
            kept.x,
            kept.rows,
            kept.out,
            kept.candidate,
            kept.input_gate,
            kept.forget_gate,
            kept.output_gate,
            *reading,
            weights,
            [needs_bias for _, needs_bias in needs],
            *_reading(options, _backward_products(kept.x, reading.bank, 0)),
            options.more,
            needs_memory,
            _is_whole(options, kept.rows, reading),
        )
    )
    dx = next(found).view(kept.x.shape)
    dmemory = _of_memory(options, found, kept.rows, dbank, reading) if needs_memory else None
    of = {}
    # query, key, value, candidate, input, forget and output gate
    for place in (0, 1, 2, 6, 4, 5, 3):
        of[place] = tuple(next(found) if needed else None for needed in needs[place])
    return dx, dmemory, [of[place] for place in range(len(needs))]


def release_forward(
    options: Options,
    keeps: bool,
    x: Tensor,
    memory: Tensor,
    slot_mask: Tensor | None,
    seed: Tensor | None,
    pooled_sum: Tensor | None,
    parameters: Tensors,
) -> tuple[Tensors, dict[str, Tensor], Reading | None, list[Tensor]]:
    """Results; and if anything is kept what ``release_function._Kept`` names, what is kept of the
    read, and the MLP's results between its first input and its last result.
    """
    more, batch, num_tokens = options.more, *x.shape[:2]
    rows = options.rows_of(memory, num_tokens)
    bank, slot_mask = bank_of(options, num_tokens, memory, slot_mask)
    pooled_rows = batch * num_tokens if more.prefix else batch
    output, new_rows, new_sum, *made = cpp.call(
        "release_layer_forward",
        x,
        rows,
        bank,
        slot_mask,
        seed,
        pooled_sum,
        parameters,
        *_reading(options, _forward_products(x, bank, pooled_rows)),
        more.prefix,
        more.num_pooled,
        more.applications,
        more.first_eps,
        more.second_eps,
        keeps,
    )
    results = output, options.new_memory(memory, new_rows), new_sum
    if not keeps:
        return results, {}, None, []
    kept = dict(zip(_MADE, made, strict=False), rows=rows)
    query, key, value, by_head, statistics, *mixed = made[len(_MADE) :]
    reading = Reading(bank, query, key, value, by_head, statistics, slot_mask, seed)
    return results, kept, reading, mixed


_STATISTICS = ("first_mean", "first_rstd", "second_mean", "second_rstd")
# of release_function._Kept, in the order of the operator's results
_MADE = ("pooled", "tanh_operand", "gates", "gate_bias", "out", "attended", "mixed", "candidate")
_MADE += _STATISTICS


def release_backward(
    options: Options,
    needs_memory: bool,
    needs: list[tuple[bool, bool]],
    gradients: Tensors,
    kept,
    weights: Tensors,
    reading: Reading,
    mixed: Tensors,
) -> tuple[Tensor, Tensor | None, list[Tensors], list[Tensor]]:
    """Gradients of x, of the memory, of weight and bias of each Linear, and of the other
    parameters.

    ``needs`` says which of weight and bias need one: all weights that there are do. ``gradients``
    are those of output, new memory and pooled sum, ``kept`` is a ``release_function._Kept``, and
    ``mixed`` are the MLP's results between its first input and its last result.
    """
    doutput, dnew_memory, dnew_sum = gradients
    more, x, bank = options.more, kept.x, reading.bank
    dnew_rows, dbank = options.gradients_of_rows(dnew_memory, x.shape[1])
    pooled_rows = kept.pooled.numel() // kept.pooled.shape[-1]
    found = iter(
        cpp.call(
            "release_layer_backward",
            doutput,
            dnew_rows,
            dnew_sum,
            x,
            kept.rows,
            kept.pooled,
            kept.tanh_operand,
            kept.gates,
            kept.gate_bias,
            (kept.attended, *mixed, kept.mixed),
            kept.candidate,
            [getattr(kept, name) for name in _STATISTICS],
            *reading,
            weights,
            [needs_bias for _, needs_bias in needs],
            kept.first_norm_weight,
            kept.second_norm_weight,
            kept.pool_weight,
            *_reading(options, _backward_products(x, bank, pooled_rows)),
            more.prefix,
            more.num_pooled,
            needs_memory,
            _is_whole(options, kept.rows, reading),
        )
    )
    dx = next(found).view(x.shape)
    dmemory = _of_memory(options, found, kept.rows, dbank, reading) if needs_memory else None
    of_linears = [tuple(next(found) if needed else None for needed in pair) for pair in needs]
    return dx, dmemory, of_linears, [*found]
